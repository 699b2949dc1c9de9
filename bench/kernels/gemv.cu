// Checks the ways of gemv.cuh on a device against sums on the host, and times them: microseconds per call and bytes of weights per second.
//   nvcc -std=c++20 -O3 -arch=native -DM2LM_SEPARATE_IMPL -I include -o gemv bench/kernels/gemv.cu -lcublasLt
// Runs every way once per round, in turns; prints the median of the rounds. Exit status 1: a way is wrong. 77: no device.
#include "gemv.cuh"

#include "device_program.hpp"

#include <m2lm/backends/cuda/runtime.cuh>
#include <m2lm/core/rng.hpp>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <functional>
#include <vector>

namespace {

using namespace m2lm;
using Clock = std::chrono::steady_clock;

/// Device memory that lives as long as the problems that use it.
class Memory {
  cuda::Device& device_;
  std::vector<void*> all_;

 public:
  explicit Memory(cuda::Device& device) : device_(device) {}
  ~Memory() {
    for (void* p : all_) device_.release(p);
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  template <class T>
  T* holding(const std::vector<T>& values) {
    auto* p = static_cast<T*>(all_.emplace_back(device_.allocate(values.size() * sizeof(T))));
    device_.copy_to_device(p, values.data(), values.size() * sizeof(T));
    return p;
  }
};

std::vector<float> random_values(std::int64_t count, Rng& rng) {
  std::vector<float> values(static_cast<std::size_t>(count));
  for (float& x : values) x = static_cast<float>(2 * rng.uniform() - 1);
  return values;
}
std::vector<Bf16> rounded(const std::vector<float>& values) {
  std::vector<Bf16> out;
  for (const float x : values) out.push_back(to_bf16(x));
  return out;
}

/// throws Error for a y that is not w·x within (3k + 16)·2^-24·Σ|w·x| and the rounding to bf16; looks at some rows. weight(row, column).
void check(cuda::Device& device, const char* what, int way, const Bf16* y_device, int rows, const std::vector<Bf16>& x,
           const std::function<float(std::int64_t, std::int64_t)>& weight) {
  std::vector<Bf16> y(static_cast<std::size_t>(rows));
  device.copy_to_host(y.data(), y_device, y.size() * sizeof(Bf16));
  for (std::int64_t row = 0; row < rows; row += 1 + rows / 61) {
    double sum = 0, terms = 0;
    for (std::size_t c = 0; c < x.size(); ++c) {
      const double term = static_cast<double>(weight(row, static_cast<std::int64_t>(c))) * static_cast<double>(to_float(x[c]));
      sum += term;
      terms += std::abs(term);
    }
    const double got = static_cast<double>(to_float(y[static_cast<std::size_t>(row)]));
    const double bound = (3 * static_cast<double>(x.size()) + 16) * 0x1.0p-24 * terms + 0x1.02p-8 * std::abs(sum);
    require<Error>(std::abs(got - sum) <= bound, what, ", way ", way, ": row ", row, " is ", std::to_string(got), " instead of ",
                   std::to_string(sum));
  }
}

/// Times `run(way, problem)`; `copies` problems in turns, so that no weight is in a cache.
void time_ways(cuda::Device& device, const char* what, int ways, int copies, double bytes, const std::function<void(int, int)>& run) {
  constexpr int rounds = 9, calls = 50;
  std::vector<std::vector<double>> seconds(static_cast<std::size_t>(ways));
  for (int round = 0; round <= rounds; ++round)
    for (int way = 1; way <= ways; ++way) {
      device.synchronize();
      const auto start = Clock::now();
      for (int call = 0; call < calls; ++call) run(way, call % copies);
      device.synchronize();
      if (round > 0) seconds[static_cast<std::size_t>(way - 1)].push_back(std::chrono::duration<double>(Clock::now() - start).count() / calls);
    }
  for (int way = 1; way <= ways; ++way) {
    std::vector<double>& of_way = seconds[static_cast<std::size_t>(way - 1)];
    std::sort(of_way.begin(), of_way.end());
    const double median = of_way[of_way.size() / 2];
    std::printf("  %-5s %d  %9.2f us  %8.1f GB/s\n", what, way, median * 1e6, bytes / median * 1e-9);
  }
}

/// More bytes than any L2 cache holds.
constexpr std::int64_t not_cached = std::int64_t{256} << 20;

void time_matrix(const std::shared_ptr<cuda::Device>& device, int rows, int cols) {
  Rng rng(1);
  Memory memory(*device);
  const std::int64_t elements = std::int64_t{rows} * cols;
  const std::vector<Bf16> x = rounded(random_values(cols, rng));
  const Bf16* const x_device = memory.holding(x);
  Bf16* const y = memory.holding(std::vector<Bf16>(static_cast<std::size_t>(rows)));
  std::printf("%d rows of %d\n", rows, cols);

  std::vector<float> values = random_values(elements, rng);
  {
    const std::vector<Bf16> w = rounded(values);
    const int copies = static_cast<int>(1 + not_cached / (2 * elements));
    std::vector<m2lm_bench::Gemv> problems;
    for (int i = 0; i < copies; ++i) problems.push_back({.w = memory.holding(w), .x = x_device, .y = y, .rows = rows, .cols = cols});
    for (int way = 1; way <= m2lm_bench::gemv_ways; ++way) {
      m2lm_bench::run(*device, way, problems[0]);
      check(*device, "bf16", way, y, rows, x, [&](std::int64_t r, std::int64_t c) { return to_float(w[static_cast<std::size_t>(r * cols + c)]); });
    }
    time_ways(*device, "bf16", m2lm_bench::gemv_ways, copies, 2.0 * static_cast<double>(elements),
              [&](int way, int i) { m2lm_bench::run(*device, way, problems[static_cast<std::size_t>(i)]); });
  }
  std::vector<Q4Block> blocks;
  for (std::size_t i = 0; i < values.size(); i += 32) blocks.push_back(quantise_q4(values.data() + i));
  std::vector<std::byte> apart;
  std::vector<Half> scales;
  m2lm_bench::take_apart(blocks, apart, scales);
  const AnyTensor source(DType::q4, Shape{rows, cols}, reinterpret_cast<const std::byte*>(blocks.data()), nullptr);
  const int copies = static_cast<int>(1 + not_cached * 16 / (9 * elements));
  std::vector<m2lm_bench::GemvQ4> problems;
  std::vector<PackedMatrix> packed;
  for (int i = 0; i < copies; ++i) {
    problems.push_back({.blocks = reinterpret_cast<const std::byte*>(memory.holding(blocks)),
                        .values = memory.holding(apart),
                        .scales = memory.holding(scales),
                        .x = x_device,
                        .y = y,
                        .rows = rows,
                        .cols = cols});
    packed.push_back(cuda::pack<Bf16>(*device, device, std::span(&source, 1), DType::q4, false));
  }
  for (int way = 1; way <= m2lm_bench::gemv_q4_ways; ++way) {
    m2lm_bench::run(*device, way, problems[0], packed[0]);
    check(*device, "q4", way, y, rows, x,
          [&](std::int64_t r, std::int64_t c) { return dequantise(blocks[static_cast<std::size_t>((r * cols + c) / 32)], c % 32); });
  }
  time_ways(*device, "q4", m2lm_bench::gemv_q4_ways, copies, 18.0 / 32 * static_cast<double>(elements),
            [&](int way, int i) { m2lm_bench::run(*device, way, problems[static_cast<std::size_t>(i)], packed[static_cast<std::size_t>(i)]); });
}

}  // namespace

int main() {
  return m2lm_bench::on_first_device([](cuda::Device& first) {
    const auto device = std::make_shared<cuda::Device>(first.properties().ordinal);  // packed weights share it
    for (const auto& [rows, cols] : {std::pair{4096, 4096}, {11008, 4096}, {4096, 11008}, {32000, 4096}, {2048, 2048}})
      time_matrix(device, rows, cols);
  });
}
