// The main function of every doctest program. Exit status: 0 passed, 77 passed but something was skipped, else failed.
#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>

#include <support/environment.hpp>

#include <cstdio>

int main(int argc, char** argv) {
  doctest::Context context(argc, argv);
  const int status = context.run();
  for (const std::string& reason : m2lm_test::skipped()) std::printf("SKIPPED: %s\n", reason.c_str());
  if (status != 0 || context.shouldExit()) return status;
  return m2lm_test::skipped().empty() ? 0 : 77;
}
