// Times the ways of sampling.cuh on a device, and the library's with limits: microseconds per call.
//   nvcc -std=c++20 -O3 -arch=native -DM2LM_SEPARATE_IMPL -I include -o sampling bench/kernels/sampling.cu -lcublasLt
// Runs everything once per round, in turns; prints the median of the rounds. Exit status 77: no device.
#include "sampling.cuh"

#include "device_program.hpp"

#include <m2lm/backends/cuda/runtime.cuh>
#include <m2lm/core/rng.hpp>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <vector>

namespace {

using namespace m2lm;
using Clock = std::chrono::steady_clock;

/// What is timed: a way, and the options of its rows.
struct Setting {
  const char* name;
  int way;
  SamplerRow row;
};
const std::vector<Setting> settings{{"1 a thread per row", 1, {.temperature = 1}},
                                    {"2 a block per row", 2, {.temperature = 1}},
                                    {"3 the library", 3, {.temperature = 1}},
                                    {"  greedy", 3, {}},
                                    {"  top-k 50", 3, {.temperature = 1, .top_k = 50}},
                                    {"  top-p 0.9", 3, {.temperature = 1, .top_p = 0.9}},
                                    {"  top-k 50, top-p 0.9", 3, {.temperature = 1, .top_p = 0.9, .top_k = 50}},
                                    {"  top-p 0.99 at temperature 4", 3, {.temperature = 4, .top_p = 0.99}}};

template <class T>
T* on_device(cuda::Device& device, const std::vector<T>& values) {
  auto* p = static_cast<T*>(device.allocate(values.size() * sizeof(T)));
  device.copy_to_device(p, values.data(), values.size() * sizeof(T));
  return p;
}

void time_settings(cuda::Device& device, int rows, int vocab) {
  constexpr int rounds = 9, calls = 20;
  Rng rng(1);
  // Normal logits: a few tokens take most of the weight.
  std::vector<float> logits(static_cast<std::size_t>(rows) * static_cast<std::size_t>(vocab));
  for (float& x : logits) x = static_cast<float>(3 * std::sqrt(-2 * std::log(1 - rng.uniform())) * std::cos(6.283185307179586 * rng.uniform()));
  // A copy for each call: sampling overwrites them.
  std::vector<float*> copies;
  for (int call = 0; call < calls; ++call) copies.push_back(on_device(device, logits));
  m2lm_bench::Draw d{.rows = rows, .vocab = vocab};
  d.ids = on_device(device, std::vector<std::int32_t>(static_cast<std::size_t>(rows)));
  d.scratch = device.allocate(cuda::sample_scratch(rows, vocab));
  d.states = on_device(device, std::vector<SamplerRow>(static_cast<std::size_t>(rows)));
  std::vector<std::vector<double>> seconds(settings.size());
  for (int round = 0; round <= rounds; ++round)
    for (std::size_t i = 0; i < settings.size(); ++i) {
      const std::vector<SamplerRow> states(static_cast<std::size_t>(rows), settings[i].row);
      device.copy_to_device(d.states, states.data(), states.size() * sizeof(SamplerRow));
      for (float* const copy : copies) device.copy_to_device(copy, logits.data(), logits.size() * sizeof(float));
      device.synchronize();
      const auto start = Clock::now();
      for (float* const copy : copies) {
        d.logits = copy;
        m2lm_bench::run(device, settings[i].way, d);
      }
      device.synchronize();
      if (round > 0) seconds[i].push_back(std::chrono::duration<double>(Clock::now() - start).count() / calls);
    }
  std::printf("%d rows of %d logits\n", rows, vocab);
  for (std::size_t i = 0; i < settings.size(); ++i) {
    std::sort(seconds[i].begin(), seconds[i].end());
    std::printf("  %-30s %9.2f us\n", settings[i].name, seconds[i][seconds[i].size() / 2] * 1e6);
  }
  for (float* const copy : copies) device.release(copy);
  for (void* p : {static_cast<void*>(d.ids), d.scratch, static_cast<void*>(d.states)}) device.release(p);
}

}  // namespace

int main() {
  return m2lm_bench::on_first_device([](cuda::Device& device) {
    for (const int rows : {1, 16})
      for (const int vocab : {32000, 128256}) time_settings(device, rows, vocab);
  });
}
