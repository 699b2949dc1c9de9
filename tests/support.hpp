// What unit tests share: where files are, temporary directories, and the visible line of a skipped test.
#pragma once

#include <support/environment.hpp>

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>

namespace m2lm_test {

/// Root of the repository.
inline std::string source_dir() { return environment("M2LM_SOURCE_DIR", "."); }

/// A file below tests/golden.
inline std::string golden(std::string_view path) { return source_file("tests/golden/" + std::string(path)); }

/// Directory of the large assets beside the repository, if it is there.
inline std::optional<std::string> assets() {
  std::string path = asset_file("");
  std::error_code ignored;
  if (!std::filesystem::is_directory(path, ignored)) return std::nullopt;
  path.pop_back();
  return path;
}

/// Says on stdout that a test did not run, and counts it: main prints the sum and tells ctest.
inline void skip(std::string_view test, std::string_view reason) {
  std::printf("[skip] %s: %s\n", std::string(test).c_str(), std::string(reason).c_str());
  skipped().push_back(std::string(test) + ": " + std::string(reason));
}

/// A directory that is removed with all it holds.
class TemporaryDirectory {
  std::string path_;

 public:
  TemporaryDirectory() {
    std::string name = (std::filesystem::temp_directory_path() / "m2lm-test-XXXXXX").string();
    if (!::mkdtemp(name.data())) throw std::system_error(errno, std::generic_category(), name);
    path_ = name;
  }
  ~TemporaryDirectory() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  TemporaryDirectory(const TemporaryDirectory&) = delete;
  TemporaryDirectory& operator=(const TemporaryDirectory&) = delete;

  const std::string& path() const { return path_; }
  std::string operator/(std::string_view name) const { return path_ + "/" + std::string(name); }
  /// Writes a file and returns its path.
  std::string write(std::string_view name, std::string_view content) const {
    const std::string path = *this / name;
    std::ofstream(path, std::ios::binary).write(content.data(), static_cast<std::streamsize>(content.size()));
    return path;
  }
};

/// The message of the E that f throws; empty when it throws none. Another exception passes through.
template <class E, class F>
std::string message_of(F&& f) {
  try {
    f();
  } catch (const E& error) {
    return error.what();
  }
  return {};
}

inline bool has(std::string_view text, std::string_view part) { return text.find(part) != std::string_view::npos; }

}  // namespace m2lm_test
