// Where tests find their files, and how they say that they were skipped.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <string>
#include <string_view>
#include <vector>

namespace m2lm_test {

inline std::string environment(const char* name, std::string fallback) {
  const char* value = std::getenv(name);
  return value && *value ? std::string(value) : fallback;
}

/// A file of the repository. ctest sets M2LM_SOURCE_DIR; a test that is run by hand is run there.
inline std::string source_file(std::string_view path) { return environment("M2LM_SOURCE_DIR", ".") + "/" + std::string(path); }

/// A file of the large assets beside the repository.
inline std::string asset_file(std::string_view path) {
  return environment("M2LM_ASSETS", source_file("../shared/assets")) + "/" + std::string(path);
}

inline bool readable(const std::string& path) {
  std::FILE* file = std::fopen(path.c_str(), "rb");
  if (file) std::fclose(file);
  return file != nullptr;
}

/// Reasons of the cases that were skipped; main prints them and tells ctest.
inline std::vector<std::string>& skipped() {
  static std::vector<std::string> reasons;
  return reasons;
}

}  // namespace m2lm_test

/// Leaves the test case, visibly, when `path` does not exist.
#define M2LM_SKIP_WITHOUT(path)                                                  \
  do {                                                                           \
    if (const std::string m2lm_path = (path); !m2lm_test::readable(m2lm_path)) { \
      m2lm_test::skipped().push_back("no " + m2lm_path);                         \
      return;                                                                    \
    }                                                                            \
  } while (false)
