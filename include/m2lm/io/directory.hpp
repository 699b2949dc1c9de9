// DirectoryWriter: a directory of files that appears whole, or not at all.
// Floor: io. May include: core, interop.
#pragma once

#include <m2lm/core/function_ref.hpp>
#include <m2lm/io/file.hpp>

#include <string>
#include <string_view>

namespace m2lm::inline M2LM_ABI {

/// Files are written into a hidden directory beside `path`; commit gives it the name in one step, in exchange for the directory that
/// had it. So whoever opens `path`, at whatever moment the program or the machine stops, finds the old files or the new ones, all
/// of them. Without commit nothing of `path` changes and what was written is removed (after a kill: "PATH.….part" stays behind).
class DirectoryWriter {
  std::string path_, temporary_;

 public:
  /// throws InputError when the directory beside `path` cannot be made.
  explicit DirectoryWriter(std::string_view path);
  ~DirectoryWriter();
  DirectoryWriter(const DirectoryWriter&) = delete;
  DirectoryWriter& operator=(const DirectoryWriter&) = delete;

  /// Where to write: a file of this path becomes `path`/name on commit.
  std::string operator/(std::string_view name) const { return join_path(temporary_, name); }

  /// Gives the directory its name. Of a directory that had it, what `replaced` is true for goes; the rest moves over, except where a
  /// new file has the name. throws InputError; the old directory is then untouched.
  void commit(FunctionRef<bool(std::string_view)> replaced);
};

namespace detail {

/// throws CheckpointError naming them when entries of the directory are symbolic links that lead out of it, or no regular files. The
/// links of the Hugging Face cache, from snapshots/REVISION to blobs, lead nowhere else.
void require_own_files(std::string_view directory);

}  // namespace detail

}  // namespace m2lm
