// What the programs that time kernels share.
#pragma once

#include <m2lm/backends/cuda/runtime.hpp>

#include <cstdio>
#include <exception>
#include <string>

namespace m2lm_bench {

/// main: f(device) on the first device. Returns the exit status; 77 where there is no device.
template <class F>
int on_first_device(F f) {
  std::string reason;
  if (m2lm::cuda::device_count(&reason) == 0) {
    std::printf("skipped: no device (%s)\n", reason.c_str());
    return 77;
  }
  try {
    m2lm::cuda::Device device(0);
    std::printf("%s\n", device.properties().name.c_str());
    f(device);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}

}  // namespace m2lm_bench
