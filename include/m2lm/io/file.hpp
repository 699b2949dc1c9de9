// Files: whole reads, atomic writes and read-only mappings, with errors that name the file.
// Floor: io. May include: core, interop.
#pragma once

#include <m2lm/core/error.hpp>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>

namespace m2lm::inline M2LM_ABI {

/// True when `path` names something that is there and is not a directory.
bool file_exists(std::string_view path);
/// True when `path` names a directory.
bool directory_exists(std::string_view path);
/// When the file was last changed, as "seconds.nanoseconds" since 1970; empty when that is not known.
std::string file_time(std::string_view path);

/// "dir/name"; `name` alone when `directory` is empty.
std::string join_path(std::string_view directory, std::string_view name);

/// The whole file. throws InputError naming the file: missing, a directory, unreadable, or longer than `max_bytes`.
std::string read_file(std::string_view path, std::size_t max_bytes = std::size_t{1} << 30);

/// Writes next to `path` and renames on commit, so that a reader sees the old file or the whole new one, never a part.
/// Without commit the temporary file is removed and `path` is untouched.
class FileWriter {
  std::string path_, temporary_;
  int descriptor_ = -1;
  std::uint64_t written_ = 0;

 public:
  /// throws InputError when the file cannot be made.
  explicit FileWriter(std::string_view path);
  ~FileWriter();
  FileWriter(const FileWriter&) = delete;
  FileWriter& operator=(const FileWriter&) = delete;

  /// throws CapacityError when the disk is full, InputError on any other failure.
  void write(std::span<const std::byte> bytes);
  /// The bytes of a text. throws as the other.
  void write(std::string_view text) { write(std::as_bytes(std::span(text.data(), text.size()))); }
  /// Flushes the bytes to the disk, gives the file its name, and flushes the directory: after a crash the old file or the whole new one
  /// is there. throws as `write`; only when flushing the directory fails is the new file there all the same.
  void commit();

 private:
  [[noreturn]] void fail(std::string_view what, int error) const;
};

/// The bytes become the file's content, atomically. throws as FileWriter.
void write_file(std::string_view path, std::span<const std::byte> bytes);
/// The same of a text.
inline void write_file(std::string_view path, std::string_view text) {
  write_file(path, std::as_bytes(std::span(text.data(), text.size())));
}

/// A read-only memory mapping. Copies share it; it lives as long as the last copy or `owner`.
class MappedFile {
  std::shared_ptr<const void> owner_;
  const std::byte* data_ = nullptr;
  std::size_t size_ = 0;
  std::string path_;

 public:
  MappedFile() = default;
  /// throws CheckpointError naming the file when it is missing, not a regular file, or cannot be mapped. An empty file gives no bytes.
  /// A page that cannot be read any more (the file was truncated, or its disk fails) reads as zeros instead of ending the program:
  /// the first call installs a SIGBUS handler for the library's own mappings, which passes everything else on to the one before it.
  static MappedFile open(std::string_view path);

  /// The whole file. Valid as long as one owner() lives.
  std::span<const std::byte> bytes() const { return {data_, size_}; }
  /// Keeps the mapping alive.
  const std::shared_ptr<const void>& owner() const { return owner_; }
  /// As it was opened.
  const std::string& path() const { return path_; }
  /// throws CheckpointError naming the file when it is shorter than when it was mapped, or a page of it could not be read.
  void require_intact() const;
  /// Tells the system that the whole pages inside [begin, begin + length) are not needed now: they stop counting as used memory
  /// and are read again from the file when touched.
  void release(std::size_t begin, std::size_t length) const;
};

namespace detail {

/// MappedFile::require_intact of the mapping that `data` lies in; nothing when it lies in none.
void require_intact_mapping(const std::byte* data);

/// Reads a file into `out`; returns what went wrong, or an empty string.
std::string try_read_file(std::string_view path, std::size_t max_bytes, std::string& out);

}  // namespace detail

}  // namespace m2lm
