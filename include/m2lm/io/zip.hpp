// ZipArchive: the entries of a zip file, as views of the mapped file.
// Floor: io. May include: core, interop.
#pragma once

#include <m2lm/io/file.hpp>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace m2lm::inline M2LM_ABI {

/// A zip or zip64 archive. Nothing in it is believed unchecked: every entry lies inside the file, none overlaps another.
/// Source: PKWARE's APPNOTE.TXT, sections 4.3 to 4.5.
class ZipArchive {
 public:
  /// One file in the archive.
  struct Entry {
    std::string name;
    std::size_t begin = 0, size = 0;  ///< of the data, in the file
    std::size_t unpacked = 0;         ///< bytes that a deflated entry becomes, as the directory says; otherwise `size`
    std::uint32_t crc32 = 0;          ///< what the directory says; see `checked_bytes`
    bool deflated = false;
  };
  /// What entries may be: only stored, as torch.save writes them, or also compressed by the method "deflate".
  enum class Methods : std::uint8_t { stored, stored_or_deflated };

  ZipArchive() = default;
  /// Reads the central directory and every local header. throws CheckpointError naming the file, the entry and both sides of a
  /// contradiction: not a zip file, truncated, encrypted entries or those of another method, several volumes, equal names, overlaps.
  static ZipArchive open(MappedFile file, Methods methods = Methods::stored);

  /// The archive as it lies in memory.
  const MappedFile& file() const { return state_->file; }
  /// In the order of the central directory.
  std::span<const Entry> entries() const { return state_->entries; }
  /// nullptr when there is no such entry.
  const Entry* find(std::string_view name) const;
  /// The entry's data as they lie in the file: deflated ones are not unpacked.
  std::span<const std::byte> bytes(const Entry& entry) const { return file().bytes().subspan(entry.begin, entry.size); }
  /// The same of a stored entry, after comparing the checksum. throws CheckpointError when it differs.
  std::span<const std::byte> checked_bytes(const Entry& entry) const;

 private:
  struct State {
    MappedFile file;
    std::vector<Entry> entries;
    std::vector<std::size_t> by_name;  // indices of entries in the order of their names
  };
  std::shared_ptr<const State> state_;
};

namespace detail {

/// CRC-32 with the reflected polynomial 0xEDB88320, of bytes behind those whose checksum is `before`.
std::uint32_t zip_checksum(std::span<const std::byte> bytes, std::uint32_t before = 0);

}  // namespace detail

}  // namespace m2lm
