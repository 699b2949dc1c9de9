// What the fuzz targets share: a file that is only in memory, and the promise that every refusal is an m2lm::Error.
#pragma once

#include <m2lm/core/error.hpp>

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <span>
#include <string>
#include <string_view>

namespace m2lm_fuzz {

/// Stops the run as a finding when a property that must hold for every input does not.
inline void check(bool ok, std::string_view what) {
  if (ok) return;
  std::fprintf(stderr, "broken promise: %.*s\n", static_cast<int>(what.size()), what.data());
  std::abort();
}

/// Runs `f`. Any other exception than m2lm::Error leaves it and is a finding, and so is a refusal that says nothing.
template <class F>
bool accepted(F&& f) {
  try {
    f();
    return true;
  } catch (const m2lm::Error& error) {
    check(!std::string_view(error.what()).empty(), "an error has a message");
    return false;
  }
}

inline std::string_view text(const std::uint8_t* data, std::size_t size) { return {reinterpret_cast<const char*>(data), size}; }

/// A regular file of the given content that exists in memory only.
class MemoryFile {
  int descriptor_;
  std::string path_;

 public:
  MemoryFile() : descriptor_(memfd_create("m2lm-fuzz", MFD_CLOEXEC)), path_("/proc/self/fd/" + std::to_string(descriptor_)) {
    check(descriptor_ >= 0, "a file in memory can be made");
  }
  ~MemoryFile() { close(descriptor_); }
  MemoryFile(const MemoryFile&) = delete;
  MemoryFile& operator=(const MemoryFile&) = delete;

  void put(const std::uint8_t* data, std::size_t size) {
    check(ftruncate(descriptor_, static_cast<off_t>(size)) == 0 && pwrite(descriptor_, data, size, 0) == static_cast<ssize_t>(size),
          "the file in memory can be written");
  }
  const std::string& path() const { return path_; }
};

/// Cuts the input into parts: the targets' way to make several values of one input.
class Parts {
  std::span<const std::uint8_t> rest_;

 public:
  Parts(const std::uint8_t* data, std::size_t size) : rest_(data, size) {}
  bool empty() const { return rest_.empty(); }
  std::uint8_t byte() {
    if (rest_.empty()) return 0;
    const std::uint8_t first = rest_.front();
    rest_ = rest_.subspan(1);
    return first;
  }
  /// Up to the next zero byte, or the end.
  std::string_view string() {
    std::size_t n = 0;
    while (n < rest_.size() && rest_[n] != 0) ++n;
    const std::string_view out = text(rest_.data(), n);
    rest_ = rest_.subspan(n < rest_.size() ? n + 1 : n);
    return out;
  }
};

}  // namespace m2lm_fuzz
