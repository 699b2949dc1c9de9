// Definitions of io/file.hpp.
// Floor: io. May include: core, interop.
#pragma once

#include <m2lm/io/file.hpp>

#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <system_error>
#include <utility>

namespace m2lm::inline M2LM_ABI {

namespace detail {

M2LM_IMPL std::string system_message(int error) { return std::generic_category().message(error); }

/// Closes a descriptor at the end of a scope.
struct Descriptor {
  int fd = -1;
  explicit Descriptor(int descriptor) : fd(descriptor) {}
  ~Descriptor() {
    if (fd >= 0) ::close(fd);
  }
  Descriptor(Descriptor&& other) noexcept : fd(std::exchange(other.fd, -1)) {}
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
};

/// fsync, where the file system has one. `fail` gets the error number.
template <class F>
void flush_to_disk(int descriptor, F&& fail) {
  while (::fsync(descriptor) != 0) {
    if (errno == EINTR) continue;
    if (errno != EINVAL && errno != EROFS) fail(errno);
    return;
  }
}

M2LM_IMPL std::string too_long(std::string_view path, std::size_t max_bytes) {
  return concat(path, ": the file is longer than the ", max_bytes, " bytes that are read of such a file (max_bytes)");
}

M2LM_IMPL std::string try_read_file(std::string_view path, std::size_t max_bytes, std::string& out) {
  const std::string name(path);
  if (name.empty()) return "an empty file name was given";
  if (name.find('\0') != std::string::npos) return "a file name contains a NUL byte";
  const Descriptor file(::open(name.c_str(), O_RDONLY | O_CLOEXEC));
  if (file.fd < 0) return concat(path, ": cannot open the file: ", system_message(errno));
  struct stat status {};
  if (::fstat(file.fd, &status) != 0) return concat(path, ": cannot read the file: ", system_message(errno));
  if (S_ISDIR(status.st_mode)) return concat(path, ": is a directory; a file is needed");
  std::size_t expected = 0;
  if (S_ISREG(status.st_mode)) {
    if (static_cast<std::uintmax_t>(status.st_size) > max_bytes) return too_long(path, max_bytes);
    expected = static_cast<std::size_t>(status.st_size);
  }
  out.resize(expected + 1);  // one more than expected: the end of the file is seen without a second buffer
  std::size_t filled = 0;
  for (;;) {
    if (filled == out.size()) out.resize(out.size() * 2 + 4096);
    const ssize_t n = ::read(file.fd, out.data() + filled, out.size() - filled);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return concat(path, ": cannot read the file: ", system_message(errno));
    if (n == 0) break;
    filled += static_cast<std::size_t>(n);
    if (filled > max_bytes) return too_long(path, max_bytes);
  }
  out.resize(filled);
  return {};
}

// ---- mappings whose file may shrink (docs/design/003-truncated-mappings.md) ------------------------------------------------------------
// Reading a mapped page that its file no longer has raises SIGBUS in the reading thread. For the library's own mappings a handler puts
// zeros there and marks the mapping; whoever reads asks for the mark afterwards. The handler touches atomics and calls mmap, no more.

struct Mapping;

/// A slot of the list that the handler walks. Slots are never freed, only used again.
struct MappingSlot {
  std::atomic<std::uintptr_t> begin{0};  // 0: free; written last
  std::atomic<std::uintptr_t> end{0};
  std::atomic<bool> damaged{false};
  std::atomic<const Mapping*> mapping{nullptr};
  MappingSlot* next = nullptr;  // fixed before the slot is published
};
inline std::atomic<MappingSlot*> mapping_slots{nullptr};
static_assert(std::atomic<std::uintptr_t>::is_always_lock_free && std::atomic<bool>::is_always_lock_free &&
              std::atomic<MappingSlot*>::is_always_lock_free);

/// nullptr when no mapping holds the address.
inline MappingSlot* mapping_slot_of(std::uintptr_t address) {
  for (MappingSlot* slot = mapping_slots.load(); slot != nullptr; slot = slot->next) {
    const std::uintptr_t begin = slot->begin.load(), end = slot->end.load();
    if (begin != 0 && begin <= address && address < end && slot->begin.load() == begin) return slot;
  }
  return nullptr;
}

inline struct sigaction previous_sigbus = {};
inline std::uintptr_t page_bytes = 4096;

inline void on_sigbus(int signal, siginfo_t* info, void* context) {
  const int saved = errno;
  const auto address = reinterpret_cast<std::uintptr_t>(info->si_addr);
  if (info->si_code > 0) {  // from the kernel: the address is one
    if (MappingSlot* slot = mapping_slot_of(address)) {
      // All that follows too: a file cut short has none of it, and one signal for each page would take long.
      const std::uintptr_t page = address / page_bytes * page_bytes;
      slot->damaged.store(true);
      if (::mmap(reinterpret_cast<void*>(page), slot->end.load() - page, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0) !=
          MAP_FAILED) {
        errno = saved;
        return;
      }
    }
  }
  errno = saved;
  if ((previous_sigbus.sa_flags & SA_SIGINFO) != 0 && previous_sigbus.sa_sigaction != nullptr) return previous_sigbus.sa_sigaction(signal, info, context);
  if (previous_sigbus.sa_handler != SIG_DFL && previous_sigbus.sa_handler != SIG_IGN) return previous_sigbus.sa_handler(signal);
  if (info->si_code <= 0 && previous_sigbus.sa_handler == SIG_IGN) return;
  // The default: the instruction runs again, or the signal is sent again, and ends the program.
  struct sigaction standard {};
  standard.sa_handler = SIG_DFL;
  ::sigaction(SIGBUS, &standard, nullptr);
  if (info->si_code <= 0) ::raise(signal);
}

inline bool install_sigbus_handler() {
  page_bytes = static_cast<std::uintptr_t>(::sysconf(_SC_PAGESIZE));
  if (::sigaction(SIGBUS, nullptr, &previous_sigbus) != 0) return false;
  struct sigaction own {};
  own.sa_sigaction = on_sigbus;
  own.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART;
  ::sigemptyset(&own.sa_mask);
  return ::sigaction(SIGBUS, &own, nullptr) == 0;
}

/// A mapped file and its place in the list.
struct Mapping {
  Descriptor file;
  std::string path;
  void* address = nullptr;
  std::size_t size = 0;
  MappingSlot* slot = nullptr;

  /// throws CheckpointError, and std::bad_alloc before anything is mapped.
  Mapping(Descriptor&& descriptor, std::string_view name, std::size_t bytes) : file(std::move(descriptor)), path(name), size(bytes) {
    static const bool installed = install_sigbus_handler();
    require<CheckpointError>(installed, path, ": cannot map the file: no handler for SIGBUS can be installed");
    slot = take_slot();
    address = ::mmap(nullptr, size, PROT_READ, MAP_PRIVATE, file.fd, 0);
    if (address == MAP_FAILED) {
      const int error = errno;
      slot->mapping.store(nullptr);
      const std::string message = concat(path, ": cannot map the file into memory: ", system_message(error));
      if (error == ENOMEM) throw CapacityError(message);
      throw CheckpointError(message);
    }
    const auto begin = reinterpret_cast<std::uintptr_t>(address);
    slot->damaged.store(false);
    slot->end.store(begin + (size + page_bytes - 1) / page_bytes * page_bytes);
    slot->begin.store(begin);
  }
  ~Mapping() {
    slot->begin.store(0);
    ::munmap(address, size);
    slot->mapping.store(nullptr);
  }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;

  void require_intact() const {
    if (M2LM_FAULT(56)) return;
    struct stat status {};
    const bool shorter = ::fstat(file.fd, &status) != 0 || static_cast<std::uintmax_t>(status.st_size) < size;
    require<CheckpointError>(!shorter, path, ": the file was truncated while it was in use: it has ", static_cast<std::int64_t>(status.st_size), " of ", size,
                             " bytes; load the checkpoint again when it is whole");
    require<CheckpointError>(!slot->damaged.load(), path, ": a part of the file could not be read while it was in use (it was truncated, or its disk fails); "
                             "load the checkpoint again when it is whole");
  }

 private:
  MappingSlot* take_slot() {
    for (MappingSlot* s = mapping_slots.load(); s != nullptr; s = s->next) {
      const Mapping* none = nullptr;
      if (s->mapping.compare_exchange_strong(none, this)) return s;
    }
    auto* fresh = new MappingSlot;  // stays reachable from the list to the end of the program
    fresh->mapping.store(this);
    fresh->next = mapping_slots.load();
    while (!mapping_slots.compare_exchange_weak(fresh->next, fresh)) {
    }
    return fresh;
  }
};

M2LM_IMPL void require_intact_mapping(const std::byte* data) {
  if (const MappingSlot* slot = mapping_slot_of(reinterpret_cast<std::uintptr_t>(data)))
    if (const Mapping* mapping = slot->mapping.load()) mapping->require_intact();
}

}  // namespace detail

M2LM_IMPL bool file_exists(std::string_view path) {
  struct stat status {};
  return ::stat(std::string(path).c_str(), &status) == 0 && !S_ISDIR(status.st_mode);
}

M2LM_IMPL bool directory_exists(std::string_view path) {
  struct stat status {};
  return ::stat(std::string(path).c_str(), &status) == 0 && S_ISDIR(status.st_mode);
}

M2LM_IMPL std::string file_time(std::string_view path) {
  struct stat status {};
  if (::stat(std::string(path).c_str(), &status) != 0) return {};
  const std::string nanoseconds = std::to_string(status.st_mtim.tv_nsec);
  return concat(status.st_mtim.tv_sec, ".", std::string(9 - std::min<std::size_t>(9, nanoseconds.size()), '0'), nanoseconds);
}

M2LM_IMPL std::string join_path(std::string_view directory, std::string_view name) {
  std::string out(directory);
  if (!out.empty() && out.back() != '/') out += '/';
  out += name;
  return out;
}

M2LM_IMPL std::string read_file(std::string_view path, std::size_t max_bytes) {
  std::string out;
  const std::string problem = detail::try_read_file(path, max_bytes, out);
  if (!problem.empty()) throw InputError(problem);
  return out;
}

M2LM_IMPL FileWriter::FileWriter(std::string_view path) : path_(path) {
  static std::atomic<unsigned> counter{0};
  if (directory_exists(path)) throw InputError(concat(path, ": is a directory; give the name of a file to write"));
  // Beside the target, because a rename is atomic only inside one file system.
  temporary_ = concat(path, ".", static_cast<long>(::getpid()), ".", counter.fetch_add(1), ".part");
  descriptor_ = ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
  if (descriptor_ < 0) {
    const int error = errno;
    temporary_.clear();
    fail("cannot write the file", error);
  }
}

M2LM_IMPL FileWriter::~FileWriter() {
  if (descriptor_ >= 0) ::close(descriptor_);
  if (!temporary_.empty()) ::unlink(temporary_.c_str());
}

M2LM_IMPL void FileWriter::fail(std::string_view what, int error) const {
  const std::string message = concat(path_, ": ", what, " (", written_, " bytes were written): ", detail::system_message(error));
  if (error == ENOSPC || error == EDQUOT || error == EFBIG) throw CapacityError(message + ": free some space or choose another disk");
  throw InputError(message);
}

M2LM_IMPL void FileWriter::write(std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    const ssize_t n = ::write(descriptor_, bytes.data(), bytes.size());
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) fail("cannot write the file", n < 0 ? errno : EIO);
    written_ += static_cast<std::uint64_t>(n);
    bytes = bytes.subspan(static_cast<std::size_t>(n));
  }
}

M2LM_IMPL void FileWriter::commit() {
  // The content is on the disk before the name is: after a power cut the name may not stand for an empty file. Some file systems
  // report a full disk only here.
  if (!M2LM_FAULT(55)) detail::flush_to_disk(descriptor_, [&](int error) { fail("cannot write the file", error); });
  const int closed = ::close(std::exchange(descriptor_, -1));
  if (closed != 0) fail("cannot write the file", errno);
  if (std::rename(temporary_.c_str(), path_.c_str()) != 0) fail("cannot give the file its name", errno);
  temporary_.clear();
  const std::size_t slash = path_.rfind('/');
  const std::string directory = slash == std::string::npos ? "." : path_.substr(0, slash + 1);
  // A directory that cannot be opened for reading cannot be flushed; the file is whole all the same.
  if (const detail::Descriptor parent(::open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC)); parent.fd >= 0)
    detail::flush_to_disk(parent.fd, [&](int error) { fail("the file is written, but its new name may be lost in a power cut", error); });
}

M2LM_IMPL void write_file(std::string_view path, std::span<const std::byte> bytes) {
  FileWriter writer(path);
  writer.write(bytes);
  writer.commit();
}

M2LM_IMPL MappedFile MappedFile::open(std::string_view path) {
  MappedFile out;
  out.path_ = std::string(path);
  detail::Descriptor file(::open(out.path_.c_str(), O_RDONLY | O_CLOEXEC));
  if (file.fd < 0) throw CheckpointError(concat(path, ": cannot open the file: ", detail::system_message(errno)));
  struct stat status {};
  if (::fstat(file.fd, &status) != 0) throw CheckpointError(concat(path, ": cannot read the file: ", detail::system_message(errno)));
  if (!S_ISREG(status.st_mode)) throw CheckpointError(concat(path, ": is not a regular file"));
  out.size_ = static_cast<std::size_t>(status.st_size);
  if (out.size_ == 0) return out;
  auto mapping = std::make_shared<detail::Mapping>(std::move(file), path, out.size_);
  out.data_ = static_cast<const std::byte*>(mapping->address);
  out.owner_ = std::move(mapping);
  return out;
}

M2LM_IMPL void MappedFile::require_intact() const {
  if (owner_) static_cast<const detail::Mapping*>(owner_.get())->require_intact();
}

M2LM_IMPL void MappedFile::release(std::size_t begin, std::size_t length) const {
  const auto page = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
  if (begin >= size_) return;
  const std::size_t end = length < size_ - begin ? begin + length : size_;
  const std::size_t first = (begin + page - 1) / page * page;
  const std::size_t last = end == size_ ? end : end / page * page;  // the file's last page is ours alone
  if (first < last) ::madvise(const_cast<std::byte*>(data_ + first), last - first, MADV_DONTNEED);
}

}  // namespace m2lm
