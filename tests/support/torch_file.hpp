// Files as torch.save writes them, made piece by piece: pickles by opcode, zip archives with every number open to change.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

namespace m2lm_test {

template <class T>
std::string little_endian(T value) {
  std::string out(sizeof(T), '\0');
  std::memcpy(out.data(), &value, sizeof(T));
  return out;
}

/// The text of a pickle; each call adds one instruction or a few.
class PickleText {
  std::string text_ = "\x80\x02";

 public:
  const std::string& text() const { return text_; }
  PickleText& raw(std::string_view bytes) {
    text_ += bytes;
    return *this;
  }
  PickleText& global(std::string_view module, std::string_view name) { return raw("c").raw(module).raw("\n").raw(name).raw("\n"); }
  PickleText& string(std::string_view s) { return raw("X").raw(little_endian(static_cast<std::uint32_t>(s.size()))).raw(s); }
  PickleText& integer(std::int64_t x) { return raw("\x8a\x08").raw(little_endian(x)); }
  PickleText& integers(const std::vector<std::int64_t>& list) {
    raw("(");
    for (const std::int64_t x : list) integer(x);
    return raw("t");
  }
  /// A tensor that takes all of what torch.save would write.
  PickleText& tensor(std::string_view storage_type, std::string_view key, std::int64_t elements, std::int64_t offset,
                     const std::vector<std::int64_t>& shape, const std::vector<std::int64_t>& strides) {
    global("torch._utils", "_rebuild_tensor_v2")
        .raw("((")
        .string("storage")
        .global("torch", storage_type)
        .string(key)
        .string("cpu")
        .integer(elements)
        .raw("tQ");
    return integer(offset).integers(shape).integers(strides).raw("\x89").global("collections", "OrderedDict").raw(")RtR");
  }
};

struct ZipMember {
  std::string name, data;
  std::uint32_t crc = 0;
  std::uint16_t method = 0, flags = 0;
  /// Added to what is true in the directory.
  std::uint64_t size_error = 0, offset_error = 0;
};

/// CRC-32, bit by bit: another way than the library's.
inline std::uint32_t slow_crc32(std::string_view data) {
  std::uint32_t c = ~0U;
  for (const char byte : data) {
    c ^= static_cast<unsigned char>(byte);
    for (int k = 0; k < 8; ++k) c = (c >> 1U) ^ ((c & 1U) ? 0xedb88320U : 0U);
  }
  return ~c;
}

inline ZipMember zip_member(std::string_view name, std::string_view data) {
  return {.name = std::string(name), .data = std::string(data), .crc = slow_crc32(data)};
}

/// The archive; with `wide` in zip64 throughout. `count_error` and `directory_error` are added to the end record's numbers.
inline std::string zip_archive(const std::vector<ZipMember>& members, bool wide = false, std::uint64_t count_error = 0,
                               std::uint64_t directory_error = 0) {
  const auto u16 = [](std::uint64_t x) { return little_endian(static_cast<std::uint16_t>(x)); };
  const auto u32 = [](std::uint64_t x) { return little_endian(static_cast<std::uint32_t>(x)); };
  const auto u64 = [](std::uint64_t x) { return little_endian(x); };
  std::string out, directory;
  for (const ZipMember& m : members) {
    const std::uint64_t offset = out.size() + m.offset_error, size = m.data.size() + m.size_error;
    out += "PK\x03\x04" + u16(20) + u16(m.flags) + u16(m.method) + u32(0) + u32(m.crc) + u32(size) + u32(size) + u16(m.name.size()) + u16(0) +
           m.name + m.data;
    directory += "PK\x01\x02" + u16(20) + u16(20) + u16(m.flags) + u16(m.method) + u32(0) + u32(m.crc) + u32(wide ? ~0U : size) +
                 u32(wide ? ~0U : size) + u16(m.name.size()) + u16(wide ? 28 : 0) + u16(0) + u16(0) + u16(0) + u32(0) + u32(wide ? ~0U : offset) +
                 m.name;
    if (wide) directory += u16(1) + u16(24) + u64(size) + u64(size) + u64(offset);
  }
  const std::uint64_t begin = out.size() + directory_error, count = members.size() + count_error;
  const std::uint64_t end = out.size() + directory.size();
  out += directory;
  if (wide) {
    out += "PK\x06\x06" + u64(44) + u16(45) + u16(45) + u32(0) + u32(0) + u64(count) + u64(count) + u64(directory.size()) + u64(begin);
    out += "PK\x06\x07" + u32(0) + u64(end) + u32(1);
  }
  return out + "PK\x05\x06" + u16(0) + u16(0) + u16(wide ? 0xffff : count) + u16(wide ? 0xffff : count) + u32(wide ? ~0U : directory.size()) +
         u32(wide ? ~0U : begin) + u16(0);
}

/// A whole file: the pickle and storages "0", "1", ….
inline std::string torch_file(std::string_view pickle, const std::vector<std::string>& storages, bool wide = false) {
  std::vector<ZipMember> members{zip_member("archive/data.pkl", pickle), zip_member("archive/byteorder", "little")};
  for (std::size_t i = 0; i < storages.size(); ++i) members.push_back(zip_member("archive/data/" + std::to_string(i), storages[i]));
  members.push_back(zip_member("archive/version", "3\n"));
  return zip_archive(members, wide);
}

}  // namespace m2lm_test
