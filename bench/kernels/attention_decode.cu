// Times the ways of attention_decode.cuh on a device: microseconds per call and the share of keys and values read per second.
//   nvcc -std=c++20 -O3 -arch=native -DM2LM_SEPARATE_IMPL -I include -o attention_decode bench/kernels/attention_decode.cu -lcublasLt
// Runs every way once per round, in turns; prints the median of the rounds. Exit status 77: no device.
#include "attention_decode.cuh"

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

void time_ways(cuda::Device& device, int heads, int kv_heads, int head_dim, int count) {
  constexpr int rounds = 9, calls = 50;
  Rng rng(1);
  m2lm_bench::Decode d{.heads = heads, .kv_heads = kv_heads, .head_dim = head_dim, .capacity = count, .count = count};
  d.scale_log2 = 1.44269504F / std::sqrt(static_cast<float>(head_dim));
  const std::int64_t row = static_cast<std::int64_t>(heads) * head_dim, cache = static_cast<std::int64_t>(kv_heads) * count * head_dim;
  // Several caches in turns, more than the L2 cache holds, as the layers of a model are.
  const int caches = static_cast<int>(std::max<std::int64_t>(1, (std::int64_t{256} << 20) / (4 * cache)));
  std::vector<void*> memory;
  std::vector<m2lm_bench::Decode> problems;
  d.q = static_cast<const Bf16*>(memory.emplace_back(m2lm_bench::random_bf16(device, row, rng)));
  d.y = static_cast<Bf16*>(memory.emplace_back(device.allocate(static_cast<std::size_t>(row) * sizeof(Bf16))));
  d.scratch = static_cast<float*>(memory.emplace_back(device.allocate(static_cast<std::size_t>(m2lm_bench::scratch_floats(d)) * sizeof(float))));
  KeyValues kv;
  kv.kv_heads = kv_heads;
  kv.head_dim = head_dim;
  void* library_scratch =
      memory.emplace_back(device.allocate(std::max<std::size_t>(16, cuda::attention_scratch<Bf16>(device.properties(), 1, heads, kv, count))));
  for (int i = 0; i < caches; ++i) {
    d.keys = static_cast<const Bf16*>(memory.emplace_back(m2lm_bench::random_bf16(device, cache, rng)));
    d.values = static_cast<const Bf16*>(memory.emplace_back(m2lm_bench::random_bf16(device, cache, rng)));
    problems.push_back(d);
  }
  std::vector<std::vector<double>> seconds(m2lm_bench::ways);
  for (int round = 0; round <= rounds; ++round)
    for (int way = 1; way <= m2lm_bench::ways; ++way) {
      if (way == 2 && count > m2lm_bench::most_keys_of_one_block(d, device.properties().shared_bytes_per_block)) continue;
      device.synchronize();
      const auto start = Clock::now();
      for (int call = 0; call < calls; ++call)
        m2lm_bench::run(device, way, problems[static_cast<std::size_t>(call) % problems.size()], library_scratch);
      device.synchronize();
      if (round > 0) seconds[static_cast<std::size_t>(way - 1)].push_back(std::chrono::duration<double>(Clock::now() - start).count() / calls);
    }
  std::printf("%d heads, %d of keys, head_dim %d, %d keys\n", heads, kv_heads, head_dim, count);
  for (int way = 1; way <= m2lm_bench::ways; ++way) {
    std::vector<double>& of_way = seconds[static_cast<std::size_t>(way - 1)];
    if (of_way.empty()) {
      std::printf("  %d  does not fit\n", way);
      continue;
    }
    std::sort(of_way.begin(), of_way.end());
    const double median = of_way[of_way.size() / 2];
    std::printf("  %d  %9.2f us  %8.1f GB/s\n", way, median * 1e6, static_cast<double>(4 * cache) / median * 1e-9);
  }
  for (void* p : memory) device.release(p);
}

}  // namespace

int main() {
  return m2lm_bench::on_first_device([](cuda::Device& device) {
    for (const int count : {128, 1024, 4096, 16384}) {
      time_ways(device, 32, 32, 128, count);
      time_ways(device, 32, 8, 128, count);
      time_ways(device, 32, 4, 64, count);
    }
  });
}
