// The main function of the tests that run on a device. Exit status: as tests/main.cpp; 77 also where there is no device.
#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>

#include <support/environment.hpp>

#include <cuda_runtime_api.h>

#include <cstdio>

int main(int argc, char** argv) {
  int devices = 0;
  const cudaError_t found = cudaGetDeviceCount(&devices);
  if (found != cudaSuccess || devices == 0) {
    std::printf("skipped: no device (%s)\n", found == cudaSuccess ? "the driver names none" : cudaGetErrorString(found));
    return 77;
  }
  doctest::Context context(argc, argv);
  const int status = context.run();
  for (const std::string& reason : m2lm_test::skipped()) std::printf("SKIPPED: %s\n", reason.c_str());
  if (status != 0 || context.shouldExit()) return status;
  return m2lm_test::skipped().empty() ? 0 : 77;
}
