// Definitions of io/safetensors.hpp.
// Floor: io. May include: core, interop.
#pragma once

#include <m2lm/io/config_impl.hpp>
#include <m2lm/io/file_impl.hpp>
#include <m2lm/io/safetensors.hpp>

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <set>
#include <unordered_map>

namespace m2lm::inline M2LM_ABI {

static_assert(std::endian::native == std::endian::little, "m2lm: the checkpoint readers expect a little-endian machine");

struct Safetensors::File {
  struct Entry {
    std::string dtype_name;
    std::optional<DType> dtype;
    Shape shape;
    std::size_t begin = 0, end = 0;  // in the file
  };
  MappedFile mapping;
  std::vector<std::string> names;
  std::unordered_map<std::string, Entry> entries;
  std::map<std::string, std::string> metadata;

  const Entry& entry(std::string_view name) const {
    const auto found = entries.find(std::string(name));
    if (found == entries.end()) {
      const std::string nearest = detail::nearest_name(name, names);
      throw CheckpointError(concat(mapping.path(), ": has no tensor \"", name, "\"", nearest.empty() ? "" : "; the nearest name is \"",
                                   nearest, nearest.empty() ? "" : "\""));
    }
    return found->second;
  }
};

namespace detail {

M2LM_IMPL std::optional<DType> dtype_of_safetensors(std::string_view name) {
  if (name == "F64") return DType::f64;
  if (name == "F32") return DType::f32;
  if (name == "F16") return DType::f16;
  if (name == "BF16") return M2LM_FAULT(4) ? DType::f16 : DType::bf16;
  if (name == "I64") return DType::i64;
  if (name == "I32") return DType::i32;
  if (name == "I16") return DType::i16;
  if (name == "I8") return DType::i8;
  if (name == "U8") return DType::u8;
  if (name == "BOOL") return DType::boolean;
  return std::nullopt;
}

M2LM_IMPL std::string_view safetensors_name(DType dtype) {
  switch (dtype) {
    case DType::f64: return "F64";
    case DType::f32: return "F32";
    case DType::f16: return "F16";
    case DType::bf16: return "BF16";
    case DType::i64: return "I64";
    case DType::i32: return "I32";
    case DType::i16: return "I16";
    case DType::i8: return "I8";
    case DType::u8: return "U8";
    case DType::boolean: return "BOOL";
    case DType::q8:
    case DType::q4:
    case DType::q4_128:
    case DType::w8a8:
    case DType::inherit:
    case DType::native: break;
  }
  return {};
}

M2LM_IMPL std::string nearest_name(std::string_view name, std::span<const std::string> candidates) {
  std::string_view best;
  std::size_t best_distance = name.size() / 2 + 1;  // a name that shares less than half is no help
  std::vector<std::size_t> row;
  for (const std::string& candidate : candidates) {
    const std::size_t n = candidate.size();
    if ((n > name.size() ? n - name.size() : name.size() - n) >= best_distance) continue;
    row.resize(n + 1);
    for (std::size_t j = 0; j <= n; ++j) row[j] = j;
    for (std::size_t i = 1; i <= name.size(); ++i) {
      std::size_t diagonal = row[0];
      row[0] = i;
      for (std::size_t j = 1; j <= n; ++j) {
        const std::size_t replace = diagonal + (name[i - 1] != candidate[j - 1]);
        diagonal = row[j];
        row[j] = std::min({replace, row[j] + 1, row[j - 1] + 1});
      }
    }
    if (row[n] < best_distance) {
      best_distance = row[n];
      best = candidate;
    }
  }
  return std::string(best);
}

/// A number of a header that is not negative and fits std::int64_t.
M2LM_IMPL std::int64_t header_number(const Json& value, std::string_view path, std::string_view tensor, std::string_view what) {
  if (!value.is_number_unsigned() || value.get<std::uint64_t>() > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max()))
    throw CheckpointError(concat(path, ": tensor \"", tensor, "\": ", what, " must be whole numbers from 0 up, found ",
                                 value.dump(-1, ' ', true, Json::error_handler_t::replace).substr(0, 60)));
  return value.get<std::int64_t>();
}

}  // namespace detail

M2LM_IMPL Safetensors Safetensors::open(std::string_view path, const SafetensorsLimits& limits) {
  auto file = std::make_shared<File>();
  file->mapping = MappedFile::open(path);
  const auto bytes = file->mapping.bytes();
  const auto check = [&](bool ok, const auto&... what) { require<CheckpointError>(ok, path, ": ", what...); };

  check(bytes.size() >= 8, "a safetensors file begins with 8 bytes of header length, the file has ", bytes.size(),
        " bytes: it is truncated or not a safetensors file");
  std::uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, bytes.data(), 8);
  check(header_bytes <= limits.max_header_bytes, "the header claims ", header_bytes, " bytes, more than the ", limits.max_header_bytes,
        " allowed (SafetensorsLimits::max_header_bytes): damaged or not a safetensors file");
  check(header_bytes <= bytes.size() - 8, "the header claims ", header_bytes, " bytes, the file has ", bytes.size() - 8,
        " after the length: the file is truncated");
  const std::string_view header(reinterpret_cast<const char*>(bytes.data()) + 8, static_cast<std::size_t>(header_bytes));
  check(!header.empty() && header.front() == '{', "the header does not begin with '{': damaged or not a safetensors file");

  detail::OwnedJson document;
  const JsonLimits json_limits{.max_bytes = limits.max_header_bytes, .max_string_bytes = limits.max_header_bytes};
  const std::string problem = detail::try_parse_json(header, true, json_limits, document);
  check(problem.empty(), "the header is not valid: ", problem);
  const detail::Json& json = document.root;
  const std::size_t tensors = json.size() - (json.contains("__metadata__") ? 1U : 0U);
  check(tensors <= limits.max_tensors, "the header describes ", tensors, " tensors, more than the ", limits.max_tensors,
        " allowed (SafetensorsLimits::max_tensors)");
  const auto check_name = [&](const std::string& text) {
    check(text.size() <= limits.max_name_bytes, "the name \"", text.substr(0, 20), "...\" has ", text.size(), " bytes, more than the ", limits.max_name_bytes, " allowed (SafetensorsLimits::max_name_bytes)");
  };

  const std::size_t data_begin = 8 + header.size();
  const std::size_t data_bytes = bytes.size() - data_begin;
  for (const auto& item : json.items()) {
    const std::string& name = item.key();
    const detail::Json& value = item.value();
    check_name(name);
    if (name == "__metadata__") {
      check(value.is_object(), "__metadata__ must be an object of strings");
      for (const auto& pair : value.items()) {
        check(pair.value().is_string(), "__metadata__.", pair.key(), " must be a string");
        file->metadata.emplace(pair.key(), pair.value().get<std::string>());
      }
      continue;
    }
    const auto check_tensor = [&](bool ok, const auto&... what) { check(ok, "tensor \"", name, "\": ", what...); };
    check_tensor(value.is_object(), "its description must be an object");
    for (const auto& pair : value.items())
      check_tensor(pair.key() == "dtype" || pair.key() == "shape" || pair.key() == "data_offsets", "unknown key \"", pair.key(), "\"");
    check_tensor(value.contains("dtype") && value["dtype"].is_string(), "\"dtype\" is missing or not a string");
    check_tensor(value.contains("shape") && value["shape"].is_array(), "\"shape\" is missing or not an array");
    check_tensor(value.contains("data_offsets") && value["data_offsets"].is_array() && value["data_offsets"].size() == 2,
                 "\"data_offsets\" is missing or not two numbers");
    File::Entry entry;
    entry.dtype_name = value["dtype"].get<std::string>();
    entry.dtype = detail::dtype_of_safetensors(entry.dtype_name);

    const detail::Json& extents = value["shape"];
    check_tensor(extents.size() <= static_cast<std::size_t>(max_rank), "has ", extents.size(), " dimensions, at most ", max_rank,
                 " are supported");
    std::vector<std::int64_t> shape;
    std::int64_t elements = 1;
    bool overflow = false;
    for (const detail::Json& extent : extents) {
      shape.push_back(detail::header_number(extent, path, name, "the extents"));
      overflow = __builtin_mul_overflow(elements, shape.back(), &elements) || overflow;
    }
    check_tensor(!overflow, "shape ", shape_string(shape), " has more elements than can be counted");
    entry.shape = Shape(shape);

    const std::int64_t begin = detail::header_number(value["data_offsets"][0], path, name, "the data offsets");
    const std::int64_t end = detail::header_number(value["data_offsets"][1], path, name, "the data offsets");
    check_tensor(begin <= end, "its data end at ", end, ", before they begin at ", begin);
    check_tensor(static_cast<std::uint64_t>(end) <= data_bytes, "its data end at byte ", end, ", the file holds ", data_bytes,
                 " bytes of data: the file is truncated");
    if (entry.dtype) {
      std::int64_t wanted = 0;
      overflow = __builtin_mul_overflow(elements, static_cast<std::int64_t>(dtype_size(*entry.dtype)), &wanted);
      check_tensor(!overflow && wanted == end - begin, "shape ", shape_string(shape), " of ", entry.dtype_name, " takes ",
                   overflow ? std::string("more than 2^63") : std::to_string(wanted), " bytes, its data offsets give ", end - begin);
    }
    entry.begin = data_begin + static_cast<std::size_t>(begin);
    entry.end = data_begin + static_cast<std::size_t>(end);
    file->names.push_back(name);
    file->entries.emplace(name, std::move(entry));
  }

  const auto position = [&](const std::string& name) {
    const File::Entry& entry = file->entries.at(name);
    return std::pair(entry.begin, entry.end);
  };
  std::sort(file->names.begin(), file->names.end(), [&](const std::string& a, const std::string& b) {
    return position(a) != position(b) ? position(a) < position(b) : a < b;
  });
  std::size_t covered = data_begin;
  std::string_view before = "the header";
  for (const std::string& name : file->names) {
    const auto [begin, end] = position(name);
    check(begin == covered, "tensor \"", name, "\" begins at byte ", begin - data_begin, " of the data, ",
          begin < covered ? "inside " : "with a gap after ", before, ", which ends at ", covered - data_begin);
    covered = end;
    before = name;
  }
  check(covered == bytes.size(), "the tensors cover ", covered - data_begin, " bytes of data, the file holds ", data_bytes);
  file->mapping.require_intact();
  Safetensors out;
  out.file_ = std::move(file);
  return out;
}

M2LM_IMPL const MappedFile& Safetensors::mapping() const { return file_->mapping; }
M2LM_IMPL std::span<const std::string> Safetensors::names() const { return file_->names; }
M2LM_IMPL bool Safetensors::contains(std::string_view name) const { return file_->entries.contains(std::string(name)); }
M2LM_IMPL std::optional<DType> Safetensors::dtype(std::string_view name) const { return file_->entry(name).dtype; }
M2LM_IMPL const std::map<std::string, std::string>& Safetensors::metadata() const { return file_->metadata; }

M2LM_IMPL AnyTensor Safetensors::tensor(std::string_view name) const {
  const File::Entry& entry = file_->entry(name);
  if (!entry.dtype)
    throw CheckpointError(concat(path(), ": tensor \"", name, "\" has dtype ", entry.dtype_name,
                                 ", which is not supported; supported are F64, F32, F16, BF16, I64, I32, I16, I8, U8 and BOOL"));
  return AnyTensor(*entry.dtype, entry.shape, file_->mapping.bytes().data() + entry.begin, file_->mapping.owner());
}

M2LM_IMPL void write_safetensors(std::string_view path, std::span<const NamedTensor> tensors,
                                 const std::map<std::string, std::string>& metadata, std::size_t alignment) {
  JsonWriter header;
  header.begin_object();
  if (!metadata.empty()) {
    header.key("__metadata__").begin_object();
    for (const auto& [key, value] : metadata) header.member(key, value);
    header.end_object();
  }
  std::set<std::string_view> seen;
  std::size_t offset = 0;
  for (const auto& [name, tensor] : tensors) {
    require<CheckpointError>(name != "__metadata__" && seen.insert(name).second, path, ": tensor \"", name,
                             "\" cannot be written: the name is reserved or given twice");
    require<CheckpointError>(tensor.has_value() && !detail::safetensors_name(tensor.dtype()).empty(), path, ": tensor \"", name,
                             "\" cannot be written: it has no value or no dtype that can be stored");
    header.key(name).begin_object().member("dtype", detail::safetensors_name(tensor.dtype())).key("shape").begin_array();
    for (const std::int64_t extent : tensor.shape().extents()) header.value(extent);
    header.end_array().key("data_offsets").begin_array().value(offset).value(offset + tensor.bytes()).end_array().end_object();
    offset += tensor.bytes();
  }
  header.end_object();
  std::string text = header.text();
  std::uint64_t length = 0;
  text.append((alignment - (sizeof(length) + text.size()) % alignment) % alignment, ' ');  // so that the data begin on such a border
  length = text.size();
  FileWriter writer(path);
  writer.write(std::as_bytes(std::span(&length, 1)));
  writer.write(text);
  for (const NamedTensor& item : tensors) writer.write({item.tensor.data(), item.tensor.bytes()});
  for (const NamedTensor& item : tensors) detail::require_intact_mapping(item.tensor.data());
  writer.commit();
}

}  // namespace m2lm
