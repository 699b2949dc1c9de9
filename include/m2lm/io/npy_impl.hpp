// Definitions of io/npy.hpp.
// Floor: io. May include: core, interop.
#pragma once

#include <m2lm/interop/stb.hpp>
#include <m2lm/io/npy.hpp>
#include <m2lm/io/safetensors_impl.hpp>
#include <m2lm/io/zip_impl.hpp>

#include <algorithm>
#include <array>
#include <charconv>
#include <cstring>
#include <limits>
#include <set>
#include <string>

namespace m2lm::inline M2LM_ABI {

namespace detail {

/// NumPy's letter and size of an element; empty for a dtype that numpy has not.
M2LM_IMPL std::string_view npy_type(DType dtype) {
  switch (dtype) {
    case DType::f64: return "f8";
    case DType::f32: return "f4";
    case DType::f16: return "f2";
    case DType::i64: return "i8";
    case DType::i32: return "i4";
    case DType::i16: return "i2";
    case DType::i8: return "i1";
    case DType::u8: return "u1";
    case DType::boolean: return "b1";
    default: return "";
  }
}

/// What the header of a .npy file says.
struct NpyHeader {
  DType dtype = DType::f32;
  bool big_endian = false, fortran_order = false;
  Shape shape;
  std::size_t data = 0;  // where the elements begin
};

/// Reads the literal of a dict that numpy writes: {'descr': '<f4', 'fortran_order': False, 'shape': (3, 4), }.
class NpyDict {
  std::string_view text_, name_;

 public:
  NpyDict(std::string_view text, std::string_view name) : text_(text), name_(name) {}

  [[noreturn]] void fail(std::string_view what) const {
    throw CheckpointError(concat(name_, ": the header of the array ", what, ": the file is damaged or not written by numpy.save"));
  }
  void read(NpyHeader& out) {
    expect('{');
    bool type = false, order = false, shape = false;
    while (!next_is('}')) {
      const std::string_view key = quoted();
      expect(':');
      bool* seen = key == "descr" ? &type : key == "fortran_order" ? &order : key == "shape" ? &shape : nullptr;
      if (!seen || *seen) fail(concat("has the key '", key, "'", seen ? " twice" : ""));
      *seen = true;
      if (seen == &type) read_type(out);
      if (seen == &order) out.fortran_order = boolean();
      if (seen == &shape) out.shape = extents();
      if (!next_is(',')) {
        expect('}');
        break;
      }
    }
    skip_spaces();
    if (!text_.empty()) fail("goes on behind the dict");
    if (!type || !order || !shape) fail("lacks descr, fortran_order or shape");
  }

 private:
  void skip_spaces() {
    while (!text_.empty() && (text_.front() == ' ' || text_.front() == '\n')) text_.remove_prefix(1);
  }
  bool next_is(char c) {
    skip_spaces();
    if (text_.empty() || text_.front() != c) return false;
    text_.remove_prefix(1);
    return true;
  }
  void expect(char c) {
    if (!next_is(c)) fail(concat("lacks a ", c));
  }
  std::string_view quoted() {
    expect('\'');
    const std::size_t end = text_.find('\'');
    if (end == std::string_view::npos) fail("has a text without end");
    const std::string_view out = text_.substr(0, end);
    text_.remove_prefix(end + 1);
    return out;
  }
  bool boolean() {
    skip_spaces();
    const bool value = text_.starts_with("True");
    if (!value && !text_.starts_with("False")) fail("has neither True nor False for fortran_order");
    text_.remove_prefix(value ? 4 : 5);
    return value;
  }
  void read_type(NpyHeader& out) {
    skip_spaces();
    if (text_.starts_with('[')) throw CheckpointError(concat(name_, ": is an array of records; arrays of plain numbers are read"));
    const std::string_view type = quoted();
    if (type.size() == 3 && std::string_view("<>|=").find(type.front()) != std::string_view::npos)
      for (const DType dtype : {DType::f64, DType::f32, DType::f16, DType::i64, DType::i32, DType::i16, DType::i8, DType::u8, DType::boolean})
        if (type.substr(1) == npy_type(dtype)) {
          out.dtype = dtype;
          out.big_endian = type.front() == '>';
          return;
        }
    throw CheckpointError(concat(name_, ": is an array of '", type, "'", type.ends_with('O') ? " (Python objects, which are never unpickled)" : "",
                                 "; f8, f4, f2, i8, i4, i2, i1, u1 and b1 are read: convert it with .astype"));
  }
  Shape extents() {
    expect('(');
    std::array<std::int64_t, max_rank> out{};
    std::size_t rank = 0;
    while (!next_is(')')) {
      std::int64_t extent = 0;
      const auto [end, error] = std::from_chars(text_.data(), text_.data() + text_.size(), extent);
      if (error != std::errc{} || extent < 0) fail("has an extent that is no number");
      text_.remove_prefix(static_cast<std::size_t>(end - text_.data()));
      if (rank == out.size()) throw CheckpointError(concat(name_, ": the array has more than ", max_rank, " dimensions"));
      out[rank++] = extent;
      if (next_is(',')) continue;
      expect(')');
      break;
    }
    return Shape(std::span<const std::int64_t>(out.data(), rank));
  }
};

/// Bytes of an array; fails when its extents have no such number.
M2LM_IMPL std::size_t npy_bytes(const NpyHeader& header, std::string_view name) {
  std::size_t bytes = dtype_size(header.dtype);
  bool none = false;
  for (const std::int64_t extent : header.shape.extents()) {
    none = none || extent == 0;
    const auto n = static_cast<std::size_t>(std::max<std::int64_t>(extent, 1));
    require<CheckpointError>(n <= static_cast<std::size_t>(std::numeric_limits<std::int64_t>::max()) / bytes, name, ": the array's shape ",
                             header.shape.string(), " is larger than any memory");
    bytes *= n;
  }
  return none ? 0 : bytes;
}

/// The elements in row-major order and the machine's byte order.
M2LM_IMPL AnyTensor npy_copy(const NpyHeader& header, std::span<const std::byte> data) {
  const std::size_t size = dtype_size(header.dtype), n = data.size() / size;
  const std::shared_ptr<std::byte[]> out(aligned_bytes(data.size()));
  std::array<std::int64_t, max_rank> stride{}, index{};
  const int rank = header.shape.rank();
  std::int64_t step = 1;
  for (int i = 0; i < rank; ++i) {  // of column-major order; of row-major order the loop goes the other way
    const auto k = static_cast<std::size_t>(header.fortran_order ? i : rank - 1 - i);
    stride[k] = step;
    step *= header.shape[static_cast<int>(k)];
  }
  std::int64_t from = 0;
  for (std::size_t i = 0; i < n; ++i) {
    std::byte* element = out.get() + i * size;
    std::memcpy(element, data.data() + static_cast<std::size_t>(from) * size, size);
    if (header.big_endian) std::reverse(element, element + size);
    for (int k = rank - 1; k >= 0; --k) {
      const auto axis = static_cast<std::size_t>(k);
      from += stride[axis];
      if (++index[axis] < header.shape[k]) break;
      from -= stride[axis] * index[axis];
      index[axis] = 0;
    }
  }
  return AnyTensor(header.dtype, header.shape, out.get(), out);
}

M2LM_IMPL std::string npy_header(const AnyTensor& tensor, std::string_view path) {
  require<CheckpointError>(tensor.has_value() && !npy_type(tensor.dtype()).empty(), path, ": ",
                           tensor.has_value() ? concat("numpy has no ", dtype_name(tensor.dtype()), ": convert it with AnyTensor::to<float>()")
                                              : std::string("the tensor has no value"));
  std::string dict = concat("{'descr': '", dtype_size(tensor.dtype()) == 1 ? "|" : "<", npy_type(tensor.dtype()), "', 'fortran_order': False, 'shape': (");
  for (int i = 0; i < tensor.shape().rank(); ++i) dict += concat(i ? " " : "", tensor.shape()[i], i == 0 || i + 1 < tensor.shape().rank() ? "," : "");
  dict += "), }";
  constexpr std::size_t fixed = 10, border = 64;  // magic, version and length; where the elements begin
  dict.append((border - (fixed + dict.size() + 1) % border) % border, ' ');
  dict += '\n';
  const auto length = static_cast<std::uint16_t>(dict.size());
  return concat("\x93NUMPY", '\x01', '\0', static_cast<char>(length & 0xffU), static_cast<char>(length >> 8), dict);
}

/// What a deflated entry becomes. stb, which reads PNG, has the other half of zlib already.
M2LM_IMPL std::span<const std::byte> inflate(const ZipArchive& archive, const ZipArchive::Entry& entry, std::shared_ptr<const void>& owner) {
  const auto check = [&](bool ok, const auto&... what) {
    require<CheckpointError>(ok, archive.file().path(), ": entry \"", entry.name, "\": ", what...);
  };
  constexpr auto most = static_cast<std::size_t>(std::numeric_limits<int>::max());
  check(entry.size <= most && entry.unpacked <= most, "is compressed and larger than 2 GiB; numpy.savez writes it without compression");
  const std::shared_ptr<std::byte[]> out(aligned_bytes(entry.unpacked));
  const std::span<const std::byte> packed = archive.bytes(entry);
  const int length = stb::m2lm_stbi_zlib_decode_noheader_buffer(reinterpret_cast<char*>(out.get()), static_cast<int>(entry.unpacked),
                                                               reinterpret_cast<const char*>(packed.data()), static_cast<int>(packed.size()));
  check(length == static_cast<int>(entry.unpacked), "cannot be unpacked: the file is damaged");
  const std::span<const std::byte> bytes(out.get(), entry.unpacked);
  check(zip_checksum(bytes) == entry.crc32, "its checksum is ", zip_checksum(bytes), ", the directory says ", entry.crc32, ": the file is damaged");
  owner = out;
  return bytes;
}

}  // namespace detail

M2LM_IMPL AnyTensor parse_npy(std::span<const std::byte> bytes, std::shared_ptr<const void> owner, std::string_view name) {
  constexpr std::string_view magic = "\x93NUMPY";
  const std::string_view text(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  require<CheckpointError>(text.starts_with(magic) && text.size() >= 10, name, ": does not begin as a .npy file does");
  const auto major = std::to_integer<unsigned>(bytes[6]);
  require<CheckpointError>(major >= 1 && major <= 3, name, ": is a .npy file of version ", major, "; 1 to 3 are read");
  const std::size_t fixed = major == 1 ? 10 : 12;
  std::size_t length = 0;
  if (text.size() >= fixed)
    length = major == 1 ? detail::zip_number<std::uint16_t>(bytes, 8) : detail::zip_number<std::uint32_t>(bytes, 8);
  require<CheckpointError>(text.size() >= fixed && length <= text.size() - fixed, name, ": its header is said to have ", length,
                           " bytes, the file has ", text.size(), ": the file is truncated or damaged");
  detail::NpyHeader header;
  header.data = fixed + length;
  detail::NpyDict(text.substr(fixed, length), name).read(header);
  const std::size_t size = detail::npy_bytes(header, name);
  require<CheckpointError>(bytes.size() - header.data == size, name, ": an array ", header.shape.string(), " of ", dtype_name(header.dtype), " has ", size,
                           " bytes, the file has ", bytes.size() - header.data, " behind its header");
  const auto data = bytes.subspan(header.data);
  const bool columns_first = header.fortran_order && header.shape.rank() > 1;
  if (columns_first || (header.big_endian && dtype_size(header.dtype) > 1)) return detail::npy_copy(header, data);
  return AnyTensor(header.dtype, header.shape, data.data(), std::move(owner));
}

M2LM_IMPL AnyTensor load_npy(std::string_view path) {
  const MappedFile file = MappedFile::open(path);
  AnyTensor out = parse_npy(file.bytes(), file.owner(), path);
  file.require_intact();
  return out;
}

M2LM_IMPL void save_npy(std::string_view path, const AnyTensor& tensor) {
  const std::string header = detail::npy_header(tensor, path);
  FileWriter writer(path);
  writer.write(header);
  writer.write({tensor.data(), tensor.bytes()});
  detail::require_intact_mapping(tensor.data());
  writer.commit();
}

M2LM_IMPL std::vector<NamedTensor> load_npz(std::string_view path) {
  const ZipArchive archive = ZipArchive::open(MappedFile::open(path), ZipArchive::Methods::stored_or_deflated);
  std::vector<NamedTensor> out;
  for (const ZipArchive::Entry& entry : archive.entries()) {
    const std::string_view name = entry.name;
    require<CheckpointError>(name.ends_with(".npy"), path, ": entry \"", name, "\" is no .npy file, so this is no .npz file");
    std::shared_ptr<const void> owner = archive.file().owner();
    const auto bytes = entry.deflated ? detail::inflate(archive, entry, owner) : archive.checked_bytes(entry);
    out.push_back({std::string(name.substr(0, name.size() - 4)), parse_npy(bytes, std::move(owner), concat(path, ": entry \"", name, "\""))});
  }
  archive.file().require_intact();
  return out;
}

M2LM_IMPL void save_npz(std::string_view path, std::span<const NamedTensor> tensors) {
  constexpr std::uint64_t limit = 0xffffffff;  // of a zip archive without zip64
  constexpr std::size_t border = 64;
  const auto number = [](std::string& out, std::uint64_t value, std::size_t bytes) {
    for (std::size_t i = 0; i < bytes; ++i) out += i < sizeof(value) ? static_cast<char>((value >> (8 * i)) & 0xffU) : '\0';
  };
  FileWriter writer(path);
  std::string directory;
  std::set<std::string_view> seen;
  std::uint64_t offset = 0;
  for (const auto& [name, tensor] : tensors) {
    require<CheckpointError>(!name.empty() && name.size() <= 0x7fff && seen.insert(name).second, path, ": array \"", name,
                             "\" cannot be written: its name is empty, too long, or given twice");
    const std::string file = name + ".npy", header = detail::npy_header(tensor, concat(path, ": array \"", name, "\""));
    const std::uint64_t size = header.size() + tensor.bytes();
    require<CheckpointError>(size <= limit && offset + size + detail::zip_local_size + file.size() + border <= limit && seen.size() < 0xffff, path,
                             ": array \"", name, "\" does not fit: a .npz file has at most 4 GiB and 65,534 arrays here; save some with save_npy");
    std::uint32_t crc = detail::zip_checksum(std::as_bytes(std::span(header)));
    crc = detail::zip_checksum({tensor.data(), tensor.bytes()}, crc);
    // What stands alike in the local header and in the directory: versions, flags (names are UTF-8), stored, 1980-01-01.
    std::string common;
    number(common, 20, 2);
    number(common, 0x800, 2);
    number(common, 0, 2);
    number(common, 0x00210000, 4);
    number(common, crc, 4);
    number(common, size, 4);
    number(common, size, 4);
    number(common, file.size(), 2);
    // An extra field of zeros moves the data to a border; it needs 4 bytes for itself.
    const std::size_t begin = static_cast<std::size_t>(offset) + detail::zip_local_size + file.size();
    std::size_t padding = (border - begin % border) % border;
    if (padding != 0 && padding < 4) padding += border;
    std::string local;
    number(local, detail::zip_local_mark, 4);
    local += common;
    number(local, padding, 2);
    local += file;
    if (padding != 0) {
      number(local, 0x4d32, 2);
      number(local, padding - 4, 2);
      local.append(padding - 4, '\0');
    }
    number(directory, detail::zip_central_mark, 4);
    number(directory, 20, 2);
    directory += common;
    number(directory, 0, 12);  // no extra field, no comment, the first volume, no attributes
    number(directory, offset, 4);
    directory += file;
    writer.write(local);
    writer.write(header);
    writer.write({tensor.data(), tensor.bytes()});
    detail::require_intact_mapping(tensor.data());
    offset += local.size() + size;
  }
  std::string end;
  number(end, detail::zip_end_mark, 4);
  number(end, 0, 4);
  number(end, seen.size(), 2);
  number(end, seen.size(), 2);
  number(end, directory.size(), 4);
  number(end, offset, 4);
  number(end, 0, 2);
  require<CheckpointError>(offset + directory.size() <= limit, path, ": a .npz file has at most 4 GiB here");
  writer.write(directory);
  writer.write(end);
  writer.commit();
}

}  // namespace m2lm
