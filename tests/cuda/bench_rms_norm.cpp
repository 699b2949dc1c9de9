// The numbered ways of bench/kernels/rms_norm.cuh compute RMSNorm. The bound is that of rows.cpp.
// labels: no-sanitizer
#include "device_support.hpp"

#include "../../bench/kernels/rms_norm.cuh"

TEST_CASE("every way of bench/kernels/rms_norm.cuh normalises rows") {
  using namespace m2lm_test;
  cuda::Device device(0);
  Random random(1);
  for (const int rows : {1, 5, 130})
    for (const int cols : {8, 264, 2048}) {
      const auto x = random.elements<Bf16>(std::int64_t{rows} * cols), w = random.elements<Bf16>(cols);
      const DeviceArray<Bf16> in(device, x), weight(device, w);
      DeviceArray<Bf16> out(device, x);
      for (int way = 1; way <= m2lm_bench::norm_ways; ++way) {
        out.write(std::vector<Bf16>(x.size(), Bf16{0x7fc0}));
        m2lm_bench::run(device, way, {.x = in.data(), .weight = weight.data(), .y = out.data(), .rows = rows, .cols = cols});
        const auto y = out.read();
        Worst worst;
        for (int r = 0; r < rows; ++r) {
          double squares = 0;
          for (int c = 0; c < cols; ++c) squares += std::pow(to_float(x[static_cast<std::size_t>(r * cols + c)]), 2);
          for (int c = 0; c < cols; ++c) {
            const auto i = static_cast<std::size_t>(r * cols + c);
            const double expected =
                to_float(x[i]) / std::sqrt(squares / cols + static_cast<double>(1e-5F)) * to_float(w[static_cast<std::size_t>(c)]);
            worst.add(to_float(y[i]), expected,
                      ((cols + 2) / 2.0 + 6) * roundoff<float> * std::abs(expected) + 1.01 * roundoff<Bf16> * std::abs(expected) + underflow<Bf16>,
                      static_cast<std::int64_t>(i));
          }
        }
        CHECK_MESSAGE(worst.passed(), "way ", way, ", ", rows, " rows of ", cols, ": ", worst.where());
      }
    }
}
