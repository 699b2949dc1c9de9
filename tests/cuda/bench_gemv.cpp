// The numbered ways of bench/kernels/gemv.cuh compute products. The bound is that of linear.cpp: (3k + 16)·2^-24·Σ|x·w|, and rounding to bf16.
// labels: no-sanitizer
#include "device_support.hpp"

#include "../../bench/kernels/gemv.cuh"

#include <memory>

namespace {

using namespace m2lm_test;

void compare(const std::vector<double>& w, const std::vector<Bf16>& x, const std::vector<Bf16>& y, const std::string& what) {
  Worst worst;
  for (std::size_t r = 0; r < y.size(); ++r) {
    double sum = 0, terms = 0;
    for (std::size_t c = 0; c < x.size(); ++c) {
      const double term = w[r * x.size() + c] * static_cast<double>(to_float(x[c]));
      sum += term;
      terms += std::abs(term);
    }
    const double bound = (3 * static_cast<double>(x.size()) + 16) * 0x1.0p-24 * terms;
    worst.add(static_cast<double>(to_float(y[r])), sum, bound + 1.01 * roundoff<Bf16> * std::abs(sum) + underflow<Bf16>,
              static_cast<std::int64_t>(r));
  }
  CHECK_MESSAGE(worst.passed(), what, ", ", y.size(), " rows of ", x.size(), ": ", worst.where());
}

/// The elements of y before: no result.
std::vector<Bf16> nothing(std::int64_t count) { return std::vector<Bf16>(static_cast<std::size_t>(count), Bf16{0x7fc0}); }

TEST_CASE("every way of bench/kernels/gemv.cuh computes the product with weights of bf16") {
  cuda::Device device(0);
  Random random(1);
  for (const auto& [rows, cols] : {std::pair{1, 8}, {5, 264}, {130, 40}, {33, 1400}}) {
    const auto x = random.elements<Bf16>(cols), w = random.elements<Bf16>(std::int64_t{rows} * cols);
    const DeviceArray<Bf16> in(device, x), weight(device, w);
    for (int way = 1; way <= m2lm_bench::gemv_ways; ++way) {
      const DeviceArray<Bf16> out(device, nothing(rows));
      m2lm_bench::run(device, way, {.w = weight.data(), .x = in.data(), .y = out.data(), .rows = rows, .cols = cols});
      compare(doubles(w), x, out.read(), concat("way ", way));
    }
  }
}

TEST_CASE("every way of bench/kernels/gemv.cuh computes the product with weights of 4 bits") {
  const auto device = std::make_shared<cuda::Device>(0);
  Random random(2);
  for (const auto& [rows, cols] : {std::pair{1, 32}, {5, 96}, {130, 160}, {33, 4192}}) {
    const auto x = random.elements<Bf16>(cols);
    const auto values = random.elements<float>(std::int64_t{rows} * cols);
    std::vector<Q4Block> blocks;
    std::vector<double> w;
    for (std::size_t i = 0; i < values.size(); i += 32) {
      blocks.push_back(quantise_q4(values.data() + i));
      for (std::int64_t j = 0; j < 32; ++j) w.push_back(static_cast<double>(dequantise(blocks.back(), j)));
    }
    std::vector<std::byte> apart;
    std::vector<Half> scales;
    m2lm_bench::take_apart(blocks, apart, scales);
    const DeviceArray<Bf16> in(*device, x);
    const DeviceArray<Q4Block> device_blocks(*device, blocks);
    const DeviceArray<std::byte> device_values(*device, apart);
    const DeviceArray<Half> device_scales(*device, scales);
    const AnyTensor source(DType::q4, Shape{rows, cols}, reinterpret_cast<const std::byte*>(blocks.data()), nullptr);
    const PackedMatrix packed = cuda::pack<Bf16>(*device, device, std::span(&source, 1), DType::q4, false);
    for (int way = 1; way <= m2lm_bench::gemv_q4_ways; ++way) {
      const DeviceArray<Bf16> out(*device, nothing(rows));
      m2lm_bench::run(*device, way,
                      {.blocks = reinterpret_cast<const std::byte*>(device_blocks.data()),
                       .values = device_values.data(),
                       .scales = device_scales.data(),
                       .x = in.data(),
                       .y = out.data(),
                       .rows = rows,
                       .cols = cols},
                      packed);
      compare(w, x, out.read(), concat("q4, way ", way));
    }
  }
}

}  // namespace
