// What the programs that time kernels share.
#pragma once

#include <m2lm/backends/cuda/runtime.hpp>
#include <m2lm/core/dtype.hpp>
#include <m2lm/core/rng.hpp>

#include <cstdint>
#include <cstdio>
#include <exception>
#include <string>
#include <vector>

namespace m2lm_bench {

/// `count` numbers from -1 to 1 in the device's memory.
inline m2lm::Bf16* random_bf16(m2lm::cuda::Device& device, std::int64_t count, m2lm::Rng& rng) {
  std::vector<m2lm::Bf16> values(static_cast<std::size_t>(count));
  for (m2lm::Bf16& x : values) x = m2lm::to_bf16(static_cast<float>(2 * rng.uniform() - 1));
  auto* p = static_cast<m2lm::Bf16*>(device.allocate(values.size() * sizeof(m2lm::Bf16)));
  device.copy_to_device(p, values.data(), values.size() * sizeof(m2lm::Bf16));
  return p;
}

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
