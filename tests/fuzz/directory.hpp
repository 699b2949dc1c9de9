// A directory with one file that has the bytes of the input: for readers that take a directory.
#pragma once

#include "fuzz.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <string>

namespace m2lm_fuzz {

class Directory {
  std::string path_, file_;
  int descriptor_ = -1;

 public:
  explicit Directory(const char* name) {
    path_ = std::string(access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp") + "/m2lm-fuzz-XXXXXX";
    check(mkdtemp(path_.data()) != nullptr, "a directory can be made");
    file_ = path_ + "/" + name;
    descriptor_ = open(file_.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    check(descriptor_ >= 0, "a file can be made");
  }
  ~Directory() {
    close(descriptor_);
    unlink(file_.c_str());
    rmdir(path_.c_str());
  }
  Directory(const Directory&) = delete;
  Directory& operator=(const Directory&) = delete;
  void put(const std::uint8_t* data, std::size_t size) {
    check(ftruncate(descriptor_, static_cast<off_t>(size)) == 0 && pwrite(descriptor_, data, size, 0) == static_cast<ssize_t>(size),
          "the file can be written");
  }
  const std::string& path() const { return path_; }
};

}  // namespace m2lm_fuzz
