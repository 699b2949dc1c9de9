// Attention of many queries by warps (mma.sync, cp.async) and by warpgroups (wgmma, TMA; sm_90a alone) on a device: compares the results of the
// two, and times them: microseconds per call and products of the tensor cores per second, of the keys that are seen.
//   nvcc -std=c++20 -O3 -arch=sm_90a -DM2LM_SEPARATE_IMPL -I include -o attention_prefill bench/kernels/attention_prefill.cu -lcublasLt
// Runs both once per round, in turns; prints the median of the rounds. What it says decides default_prefill_kernel (backends/cuda/kernels.hpp).
// Exit status 1: results differ. 77: no device.
#include "device_program.hpp"

#include <m2lm/backends/cuda/kernels/attention.cuh>
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

void time_kernels(cuda::Device& device, std::int64_t tokens, std::int64_t heads, std::int64_t kv_heads, std::int64_t head_dim, bool causal) {
  constexpr int rounds = 9, calls = 10;
  constexpr cuda::PrefillKernel kernels[2] = {cuda::PrefillKernel::warps, cuda::PrefillKernel::warpgroups};
  Rng rng(1);
  const std::int64_t elements = tokens * heads * head_dim;
  Bf16* const q = m2lm_bench::random_bf16(device, elements, rng);
  KeyValues kv{DType::bf16, kv_heads, head_dim, tokens, nullptr, nullptr};
  kv.keys = reinterpret_cast<std::byte*>(m2lm_bench::random_bf16(device, tokens * kv_heads * head_dim, rng));
  kv.values = reinterpret_cast<std::byte*>(m2lm_bench::random_bf16(device, tokens * kv_heads * head_dim, rng));
  Bf16* const y[2] = {m2lm_bench::random_bf16(device, elements, rng), m2lm_bench::random_bf16(device, elements, rng)};
  void* const scratch = device.allocate(std::max<std::size_t>(16, cuda::attention_scratch<Bf16>(device.properties(), tokens, heads, kv, tokens)));
  const auto run = [&](int i) {
    cuda::attention<Bf16>(device, Matrix<const Bf16>(q, {tokens, heads * head_dim}), kv, {.length = nullptr, .first = 0, .most_keys = tokens},
                          {.causal = causal, .window = 0}, 1 / std::sqrt(static_cast<float>(head_dim)),
                          Matrix<Bf16>(y[i], {tokens, heads * head_dim}), {}, scratch, kernels[i]);
  };
  std::vector<double> seconds[2];
  for (int round = 0; round <= rounds; ++round)
    for (int i = 0; i < 2; ++i) {
      device.synchronize();
      const auto start = Clock::now();
      for (int call = 0; call < calls; ++call) run(i);
      device.synchronize();
      if (round > 0) seconds[i].push_back(std::chrono::duration<double>(Clock::now() - start).count() / calls);
    }

  // Both round probabilities and results to bf16, relative to other maxima: what they differ by is a few such roundings of values below 1.
  std::vector<Bf16> results[2];
  double largest = 0;
  for (int i = 0; i < 2; ++i) {
    results[i].resize(static_cast<std::size_t>(elements));
    device.copy_to_host(results[i].data(), y[i], results[i].size() * sizeof(Bf16));
  }
  for (std::size_t i = 0; i < results[0].size(); ++i) {
    const double difference = std::abs(static_cast<double>(to_float(results[0][i])) - static_cast<double>(to_float(results[1][i])));
    largest = difference <= largest ? largest : difference;  // NaN stays
  }
  std::printf("%lld tokens, %lld heads, %lld of keys, head_dim %lld%s: largest difference %.2g\n", static_cast<long long>(tokens),
              static_cast<long long>(heads), static_cast<long long>(kv_heads), static_cast<long long>(head_dim), causal ? ", causal" : "", largest);
  for (int i = 0; i < 2; ++i) {
    std::sort(seconds[i].begin(), seconds[i].end());
    const double median = seconds[i][seconds[i].size() / 2], products = 4.0 * static_cast<double>(elements * tokens) / (causal ? 2 : 1);
    std::printf("  %-10s  %9.2f us  %7.1f TFLOP/s\n", i == 0 ? "warps" : "warpgroups", median * 1e6, products / median * 1e-12);
  }
  for (void* p : {static_cast<void*>(q), static_cast<void*>(kv.keys), static_cast<void*>(kv.values), static_cast<void*>(y[0]),
                  static_cast<void*>(y[1]), scratch})
    device.release(p);
  require<Error>(largest <= 4 * 0x1.0p-8, "the two kernels differ by ", std::to_string(largest));
}

}  // namespace

int main() {
  return m2lm_bench::on_first_device([](cuda::Device& device) {
    if (device.properties().compute_capability != 90 || !cuda::has_body(device, cuda::attention_warpgroups<Bf16, 128>))
      std::printf("this device, or this program, has no kernel of warpgroups: both rows are the one of warps\n");
    for (const bool causal : {true, false})
      for (const std::int64_t tokens : {1024, 4096, 16384}) {
        time_kernels(device, tokens, 32, 32, 128, causal);
        time_kernels(device, tokens, 32, 8, 128, causal);
        time_kernels(device, tokens, 16, 16, 64, causal);
      }
  });
}
