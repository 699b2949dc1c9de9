// Times the ways of rms_norm.cuh on a device: microseconds per call and bytes of x and y per second.
//   nvcc -std=c++20 -O3 -arch=native -DM2LM_SEPARATE_IMPL -I include -o rms_norm bench/kernels/rms_norm.cu -lcublasLt
// Runs every way once per round, in turns; prints the median of the rounds. Exit status 77: no device.
#include "rms_norm.cuh"

#include "device_program.hpp"

#include <m2lm/backends/cuda/runtime.cuh>
#include <m2lm/core/rng.hpp>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <vector>

namespace {

using namespace m2lm;
using Clock = std::chrono::steady_clock;

void time_ways(cuda::Device& device, int rows, int cols) {
  constexpr int rounds = 9, calls = 50;
  Rng rng(1);
  const std::int64_t elements = std::int64_t{rows} * cols;
  m2lm_bench::Norm n{.rows = rows, .cols = cols};
  Bf16* const x = m2lm_bench::random_bf16(device, elements, rng);
  Bf16* const weight = m2lm_bench::random_bf16(device, cols, rng);
  n.x = x;
  n.weight = weight;
  n.y = static_cast<Bf16*>(device.allocate(static_cast<std::size_t>(elements) * sizeof(Bf16)));
  std::vector<std::vector<double>> seconds(m2lm_bench::norm_ways);
  for (int round = 0; round <= rounds; ++round)
    for (int way = 1; way <= m2lm_bench::norm_ways; ++way) {
      device.synchronize();
      const auto start = Clock::now();
      for (int call = 0; call < calls; ++call) m2lm_bench::run(device, way, n);
      device.synchronize();
      if (round > 0) seconds[static_cast<std::size_t>(way - 1)].push_back(std::chrono::duration<double>(Clock::now() - start).count() / calls);
    }
  std::printf("%d rows of %d\n", rows, cols);
  for (int way = 1; way <= m2lm_bench::norm_ways; ++way) {
    std::vector<double>& of_way = seconds[static_cast<std::size_t>(way - 1)];
    std::sort(of_way.begin(), of_way.end());
    const double median = of_way[of_way.size() / 2];
    std::printf("  %d  %9.2f us  %8.1f GB/s\n", way, median * 1e6, static_cast<double>(4 * elements) / median * 1e-9);
  }
  for (void* p : {static_cast<void*>(x), static_cast<void*>(weight), static_cast<void*>(n.y)}) device.release(p);
}

}  // namespace

int main() {
  return m2lm_bench::on_first_device([](cuda::Device& device) {
    for (const int rows : {1, 16, 512, 4096})
      for (const int cols : {1024, 2048, 4096, 8192}) time_ways(device, rows, cols);
  });
}
