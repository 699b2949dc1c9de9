// Definitions of io/zip.hpp.
// Floor: io. May include: core, interop.
#pragma once

#include <m2lm/io/file_impl.hpp>
#include <m2lm/io/zip.hpp>

#include <algorithm>
#include <array>
#include <cstring>
#include <optional>
#include <utility>

namespace m2lm::inline M2LM_ABI {

namespace detail {

inline constexpr std::size_t zip_end_size = 22, zip_locator_size = 20, zip64_end_size = 56, zip_central_size = 46, zip_local_size = 30;
inline constexpr std::uint32_t zip_end_mark = 0x06054b50, zip_locator_mark = 0x07064b50, zip64_end_mark = 0x06064b50, zip_central_mark = 0x02014b50,
                               zip_local_mark = 0x04034b50;

/// A little-endian number at `at`. requires at + sizeof(T) <= bytes.size().
template <class T>
T zip_number(std::span<const std::byte> bytes, std::size_t at) {
  T value{};
  std::memcpy(&value, bytes.data() + at, sizeof(T));
  return value;
}

/// Where the central directory is, and how many entries it has.
struct ZipDirectory {
  std::uint64_t begin = 0, size = 0, entries = 0;
};

/// The end record is the last one whose comment reaches exactly to the end of the file.
inline std::optional<std::size_t> find_zip_end(std::span<const std::byte> bytes) {
  constexpr std::size_t longest_comment = 0xffff;
  if (bytes.size() < zip_end_size) return std::nullopt;
  const std::size_t last = bytes.size() - zip_end_size;
  for (std::size_t at = last;; --at) {
    if (zip_number<std::uint32_t>(bytes, at) == zip_end_mark && zip_number<std::uint16_t>(bytes, at + 20) == last - at) return at;
    if (at == 0 || last - at == longest_comment) return std::nullopt;
  }
}

M2LM_IMPL std::uint32_t zip_checksum(std::span<const std::byte> bytes, std::uint32_t before) {
  static constexpr auto table = [] {
    std::array<std::uint32_t, 256> out{};
    for (std::uint32_t i = 0; i < 256; ++i) {
      std::uint32_t c = i;
      for (int k = 0; k < 8; ++k) c = (c & 1U) ? 0xedb88320U ^ (c >> 1) : c >> 1;
      out[i] = c;
    }
    return out;
  }();
  std::uint32_t c = ~before;
  for (const std::byte b : bytes) c = table[(c ^ std::to_integer<std::uint32_t>(b)) & 0xffU] ^ (c >> 8);
  return ~c;
}

}  // namespace detail

M2LM_IMPL ZipArchive ZipArchive::open(MappedFile file, Methods methods) {
  using detail::zip_number;
  auto state = std::make_shared<State>();
  state->file = std::move(file);
  const std::span<const std::byte> bytes = state->file.bytes();
  const auto check = [&](bool ok, const auto&... what) { require<CheckpointError>(ok, state->file.path(), ": ", what...); };

  const std::optional<std::size_t> end = detail::find_zip_end(bytes);
  check(end.has_value(), "no end of a zip archive is found: the file is truncated or not a zip file");
  check(zip_number<std::uint16_t>(bytes, *end + 4) == 0 && zip_number<std::uint16_t>(bytes, *end + 6) == 0, "the archive is one of several volumes");
  detail::ZipDirectory directory{.begin = zip_number<std::uint32_t>(bytes, *end + 16),
                                 .size = zip_number<std::uint32_t>(bytes, *end + 12),
                                 .entries = zip_number<std::uint16_t>(bytes, *end + 10)};
  std::size_t directory_limit = *end;  // the directory ends before this
  if (*end >= detail::zip_locator_size && zip_number<std::uint32_t>(bytes, *end - detail::zip_locator_size) == detail::zip_locator_mark) {
    const std::size_t locator = *end - detail::zip_locator_size;
    const auto at = zip_number<std::uint64_t>(bytes, locator + 8);
    check(locator >= detail::zip64_end_size && at <= locator - detail::zip64_end_size, "the zip64 end record is said to be at byte ", at,
          ", the file has ", bytes.size());
    check(zip_number<std::uint32_t>(bytes, at) == detail::zip64_end_mark, "there is no zip64 end record at byte ", at, ": the file is damaged");
    directory = {.begin = zip_number<std::uint64_t>(bytes, at + 48),
                 .size = zip_number<std::uint64_t>(bytes, at + 40),
                 .entries = zip_number<std::uint64_t>(bytes, at + 32)};
    directory_limit = at;
  }
  check(directory.begin <= directory_limit && directory.size <= directory_limit - directory.begin, "the zip directory is said to be ", directory.size,
        " bytes from byte ", directory.begin, " on, the file has ", bytes.size(), ": the file is truncated or damaged");
  check(directory.entries <= directory.size / detail::zip_central_size, "the zip directory cannot hold ", directory.entries, " entries in ",
        directory.size, " bytes");

  std::size_t at = directory.begin;
  const std::size_t directory_end = directory.begin + directory.size;
  for (std::uint64_t i = 0; i < directory.entries; ++i) {
    check(directory_end - at >= detail::zip_central_size && zip_number<std::uint32_t>(bytes, at) == detail::zip_central_mark, "entry ", i,
          " of the zip directory is damaged");
    const std::size_t name_size = zip_number<std::uint16_t>(bytes, at + 28), extra_size = zip_number<std::uint16_t>(bytes, at + 30),
                      comment_size = zip_number<std::uint16_t>(bytes, at + 32);
    check(directory_end - at - detail::zip_central_size >= name_size + extra_size + comment_size, "entry ", i,
          " of the zip directory is longer than it");
    Entry entry;
    const auto name_bytes = bytes.subspan(at + detail::zip_central_size, name_size);
    entry.name.assign(reinterpret_cast<const char*>(name_bytes.data()), name_bytes.size());
    const auto check_entry = [&](bool ok, const auto&... what) { check(ok, "entry \"", entry.name, "\": ", what...); };
    const auto flags = zip_number<std::uint16_t>(bytes, at + 8), method = zip_number<std::uint16_t>(bytes, at + 10);
    check_entry((flags & 1U) == 0, "is encrypted");
    constexpr std::uint16_t deflate = 8;
    entry.deflated = method == deflate && methods == Methods::stored_or_deflated;
    check_entry(method == 0 || entry.deflated, "is compressed (method ", method, "); only stored entries are read here",
                methods == Methods::stored ? ", as torch.save writes them" : ", and those of method 8");
    entry.crc32 = zip_number<std::uint32_t>(bytes, at + 16);
    std::uint64_t stored = zip_number<std::uint32_t>(bytes, at + 20), size = zip_number<std::uint32_t>(bytes, at + 24),
                  local = zip_number<std::uint32_t>(bytes, at + 42);
    // Numbers that do not fit in 32 bits stand, in this order, in the extra field 1.
    constexpr std::uint32_t elsewhere = 0xffffffffU;
    auto extra = bytes.subspan(at + detail::zip_central_size + name_size, extra_size);
    while (extra.size() >= 4) {
      const auto id = zip_number<std::uint16_t>(extra, 0), length = zip_number<std::uint16_t>(extra, 2);
      check_entry(length <= extra.size() - 4, "its extra field ", id, " is longer than the rest of them");
      if (id == 1) {
        auto wide = extra.subspan(4, length);
        for (std::uint64_t* number : {&size, &stored, &local}) {
          if (*number != elsewhere) continue;
          check_entry(wide.size() >= 8, "its zip64 field is too short");
          *number = zip_number<std::uint64_t>(wide, 0);
          wide = wide.subspan(8);
        }
      }
      extra = extra.subspan(4U + length);
    }
    // No byte of deflated data stands for more than 1,032 of the original.
    if (entry.deflated)
      check_entry(size / 1032 <= stored, "is said to become ", size, " bytes, which ", stored, " deflated ones cannot hold");
    else
      check_entry(stored == size, "is stored in ", stored, " bytes, but has ", size);
    check_entry(local <= directory.begin && directory.begin - local >= detail::zip_local_size, "is said to be at byte ", local,
                ", where the directory is");
    check_entry(zip_number<std::uint32_t>(bytes, local) == detail::zip_local_mark, "nothing begins at byte ", local, ": the file is damaged");
    const std::size_t local_name = zip_number<std::uint16_t>(bytes, local + 26), local_extra = zip_number<std::uint16_t>(bytes, local + 28);
    const std::size_t room = directory.begin - local - detail::zip_local_size;
    check_entry(local_name + local_extra <= room && stored <= room - local_name - local_extra, "its ", stored,
                " bytes do not fit before the directory: ", "the file is truncated or damaged");
    const auto local_bytes = bytes.subspan(local + detail::zip_local_size, local_name);
    check_entry(std::equal(name_bytes.begin(), name_bytes.end(), local_bytes.begin(), local_bytes.end()), "has another name where its data are");
    entry.begin = local + detail::zip_local_size + local_name + local_extra;
    entry.size = stored;
    entry.unpacked = size;
    at += detail::zip_central_size + name_size + extra_size + comment_size;
    state->entries.push_back(std::move(entry));
  }
  check(at == directory_end, "the zip directory has ", directory_end - at, " bytes behind its last entry");

  std::vector<std::size_t>& order = state->by_name;
  for (std::size_t i = 0; i < state->entries.size(); ++i) order.push_back(i);
  const auto entry = [&](std::size_t i) -> const Entry& { return state->entries[i]; };
  std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return entry(a).begin < entry(b).begin; });
  for (std::size_t i = 1; i < order.size(); ++i)
    check(entry(order[i - 1]).begin + entry(order[i - 1]).size <= entry(order[i]).begin, "entries \"", entry(order[i - 1]).name, "\" and \"",
          entry(order[i]).name, "\" overlap");
  std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return entry(a).name < entry(b).name; });
  for (std::size_t i = 1; i < order.size(); ++i)
    check(entry(order[i - 1]).name != entry(order[i]).name, "entry \"", entry(order[i]).name, "\" is there twice");
  ZipArchive out;
  out.state_ = std::move(state);
  return out;
}

M2LM_IMPL const ZipArchive::Entry* ZipArchive::find(std::string_view name) const {
  const auto found = std::lower_bound(state_->by_name.begin(), state_->by_name.end(), name,
                                      [&](std::size_t i, std::string_view wanted) { return state_->entries[i].name < wanted; });
  if (found == state_->by_name.end() || state_->entries[*found].name != name) return nullptr;
  return &state_->entries[*found];
}

M2LM_IMPL std::span<const std::byte> ZipArchive::checked_bytes(const Entry& entry) const {
  const std::span<const std::byte> out = bytes(entry);
  const std::uint32_t found = detail::zip_checksum(out);
  require<CheckpointError>(found == entry.crc32 || M2LM_FAULT(53), file().path(), ": entry \"", entry.name, "\": its checksum is ", found,
                           ", the directory says ", entry.crc32, ": the file is damaged");
  return out;
}

}  // namespace m2lm
