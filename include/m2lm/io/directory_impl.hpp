// Definitions of io/directory.hpp.
// Floor: io. May include: core, interop.
#pragma once

#include <m2lm/io/directory.hpp>
#include <m2lm/io/file_impl.hpp>

#include <dirent.h>

#include <cstdlib>
#include <memory>
#include <new>
#include <utility>

namespace m2lm::inline M2LM_ABI {

namespace detail {

/// Makes the names of a directory's files durable.
M2LM_IMPL void sync_directory(const std::string& path) {
  const Descriptor directory(::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  // Some file systems have no fsync of directories: they order names themselves.
  if (directory.fd < 0 || (::fsync(directory.fd) != 0 && errno != EINVAL && errno != EROFS))
    throw InputError(concat(path, ": cannot make the directory durable: ", system_message(errno)));
}

M2LM_IMPL std::string parent_of(const std::string& path) {
  const std::size_t slash = path.rfind('/');
  return slash == std::string::npos ? "." : slash == 0 ? "/" : path.substr(0, slash);
}

/// Swaps two directories in one step; false where the system or the file system cannot.
inline bool exchange([[maybe_unused]] const std::string& a, [[maybe_unused]] const std::string& b) {
#if defined(RENAME_EXCHANGE)
  return ::renameat2(AT_FDCWD, a.c_str(), AT_FDCWD, b.c_str(), RENAME_EXCHANGE) == 0;
#else
  return false;
#endif
}

/// Calls f(name) for every entry of a directory; returns the error number, or 0. (std::filesystem's iterators end the program when they
/// find no memory: libstdc++ 12.)
template <class F>
int for_each_entry(const std::string& path, F&& f) {
  const std::unique_ptr<DIR, int (*)(DIR*)> directory(::opendir(path.c_str()), [](DIR* d) { return ::closedir(d); });
  if (!directory) return errno;
  for (;;) {
    errno = 0;
    const dirent* entry = ::readdir(directory.get());
    if (entry == nullptr) return errno;
    const std::string name = entry->d_name;
    if (name != "." && name != "..") f(name);
  }
}

/// Removes what can be removed; never throws. What stays, for lack of memory too, has a name that says it is a part.
inline void remove_tree(const std::string& path) noexcept {
  try {
    (void)for_each_entry(path, [&](const std::string& name) {
      const std::string inner = join_path(path, name);
      if (::unlink(inner.c_str()) != 0 && errno != ENOENT) remove_tree(inner);
    });
    ::rmdir(path.c_str());
  } catch (const std::bad_alloc&) {
  }
}

/// The path without links; empty when it leads nowhere.
inline std::string real_path(const std::string& path) {
  const std::unique_ptr<char, void (*)(void*)> resolved(::realpath(path.c_str(), nullptr), std::free);
  if (!resolved && errno == ENOMEM) throw std::bad_alloc();
  return resolved ? std::string(resolved.get()) : std::string();
}

M2LM_IMPL void require_own_files(std::string_view directory) {
  const std::string root = real_path(std::string(directory)), revisions = parent_of(root);
  const std::string blobs = revisions.ends_with("/snapshots") ? parent_of(revisions) + "/blobs/" : std::string();
  std::string foreign;
  const int error = for_each_entry(root, [&](const std::string& name) {
    const std::string path = join_path(root, name);
    struct stat status {};
    if (::lstat(path.c_str(), &status) != 0) return;
    const bool link = S_ISLNK(status.st_mode);
    const std::string target = link ? real_path(path) : path;
    if (target.empty() || ::stat(target.c_str(), &status) != 0) return;  // leads nowhere: it is missing, should anybody ask for it
    const bool inside = !link || M2LM_FAULT(59) || target.starts_with(root + "/") || (!blobs.empty() && target.starts_with(blobs));
    const bool plain = S_ISREG(status.st_mode) || S_ISDIR(status.st_mode);
    if (inside && plain) return;
    foreign += concat(foreign.empty() ? "" : ", ", name, link ? " -> " + target : std::string(), plain ? "" : " (no regular file)");
  });
  if (error == ENOMEM) throw std::bad_alloc();
  require<CheckpointError>(foreign.empty(), directory, ": holds what is not its own: ", foreign,
                           "; a checkpoint's files must lie in its directory, unless LoadOptions::follow_links says that they are trusted");
}

}  // namespace detail

M2LM_IMPL DirectoryWriter::DirectoryWriter(std::string_view path) : path_(path) {
  static std::atomic<unsigned> counter{0};
  while (path_.size() > 1 && path_.back() == '/') path_.pop_back();
  const std::size_t slash = path_.rfind('/');
  const std::string name = slash == std::string::npos ? path_ : path_.substr(slash + 1);
  if (name.empty() || name == "." || name == "..") throw InputError(concat("\"", path, "\": give the directory to write by its name"));
  if (file_exists(path_)) throw InputError(concat(path, ": is a file; give the name of a directory to write"));
  temporary_ = concat(slash == std::string::npos ? std::string() : path_.substr(0, slash + 1), ".", name, ".", static_cast<long>(::getpid()), ".",
                      counter.fetch_add(1), ".part");
  if (::mkdir(temporary_.c_str(), 0777) != 0) {
    const std::string message = concat(temporary_, ": cannot make the directory: ", detail::system_message(errno));
    temporary_.clear();
    throw InputError(message);
  }
}

M2LM_IMPL DirectoryWriter::~DirectoryWriter() {
  if (!temporary_.empty()) detail::remove_tree(temporary_);
}

M2LM_IMPL void DirectoryWriter::commit(FunctionRef<bool(std::string_view)> replaced) {
  detail::sync_directory(temporary_);
  if (!directory_exists(path_)) {
    if (std::rename(temporary_.c_str(), path_.c_str()) != 0)
      throw InputError(concat(path_, ": cannot give the directory its name: ", detail::system_message(errno)));
    temporary_.clear();
    detail::sync_directory(detail::parent_of(path_));
    return;
  }
  if (!detail::exchange(temporary_, path_)) {
    // Without an exchange there is a moment in which neither has the name; the old directory is put back if the second step fails.
    std::string aside = temporary_ + ".old";
    if (std::rename(path_.c_str(), aside.c_str()) != 0)
      throw InputError(concat(path_, ": cannot replace the directory: ", detail::system_message(errno)));
    if (std::rename(temporary_.c_str(), path_.c_str()) != 0) {
      const int error = errno;
      (void)std::rename(aside.c_str(), path_.c_str());
      throw InputError(concat(path_, ": cannot replace the directory: ", detail::system_message(error)));
    }
    temporary_ = std::move(aside);
  }
  // `old` is the old directory now. What does not belong to the files that were replaced goes on where it was; nothing of the user's is
  // deleted, whatever fails from here on.
  const std::string old = std::exchange(temporary_, {});
  detail::sync_directory(detail::parent_of(path_));
  bool all_moved = true;
  const int error = detail::for_each_entry(old, [&](const std::string& name) {
    const std::string target = join_path(path_, name);
    if (replaced(name) || file_exists(target) || directory_exists(target)) return;
    if (std::rename(join_path(old, name).c_str(), target.c_str()) != 0) all_moved = false;
  });
  if (error == ENOMEM) throw std::bad_alloc();
  if (error != 0 || !all_moved)
    throw InputError(concat(path_, ": was written, but some of the directory's other files could not be moved over; they are in ", old));
  detail::remove_tree(old);
}

}  // namespace m2lm
