// The numbered ways of bench/kernels/attention_decode.cuh compute attention. The bound is that of attention.cpp for one query:
// scores of d products, sums of K, an output rounded to bf16.
// labels: no-sanitizer
#include <cuda/device_support.hpp>

#include "../../bench/kernels/attention_decode.cuh"

#include <algorithm>

namespace {

using namespace m2lm_test;

TEST_CASE("bench: every way of decode attention computes the same") {
  cuda::Device device(0);
  Random random(41);
  struct Size {
    int heads, kv_heads, head_dim, count;
  };
  for (const Size& size : {Size{4, 2, 64, 1}, Size{4, 1, 64, 129}, Size{2, 2, 128, 300}, Size{8, 2, 64, 600}}) {
    const int heads = size.heads, kv_heads = size.kv_heads, head_dim = size.head_dim, count = size.count;
    const int capacity = count + 3;
    const auto q = random.elements<Bf16>(heads * head_dim), k = random.elements<Bf16>(kv_heads * capacity * head_dim),
               v = random.elements<Bf16>(kv_heads * capacity * head_dim);
    const DeviceArray<Bf16> q_device(device, q), k_device(device, k), v_device(device, v);
    m2lm_bench::Decode d{.heads = heads, .kv_heads = kv_heads, .head_dim = head_dim, .capacity = capacity, .count = count};
    const double scale = 1 / std::sqrt(static_cast<double>(head_dim));
    d.scale_log2 = static_cast<float>(scale * 1.44269504088896341);
    const DeviceArray<float> scratch(device, static_cast<std::size_t>(m2lm_bench::scratch_floats(d)));
    KeyValues kv;
    kv.kv_heads = kv_heads;
    kv.head_dim = head_dim;
    const DeviceArray<std::byte> library(device, std::max<std::size_t>(16, cuda::attention_scratch<Bf16>(device.properties(), 1, heads, kv, count)));
    d.q = q_device.data();
    d.keys = k_device.data();
    d.values = v_device.data();
    d.scratch = scratch.data();
    for (int way = 1; way <= m2lm_bench::ways; ++way) {
      const DeviceMatrix<Bf16> y(device, 1, heads * head_dim);
      d.y = y.view().data();
      m2lm_bench::run(device, way, d, library.data());
      const std::vector<double> got = doubles(y.read());
      Worst worst;
      for (int h = 0; h < heads; ++h) {
        const auto row = [&](const std::vector<Bf16>& rows, int j, int c) {
          return static_cast<double>(to_float(rows[static_cast<std::size_t>((h / (heads / kv_heads) * capacity + j) * head_dim + c)]));
        };
        std::vector<double> score(static_cast<std::size_t>(count));
        double largest = -HUGE_VAL, magnitude = 0, sum = 0;
        for (int j = 0; j < count; ++j) {
          double s = 0, terms = 0;
          for (int c = 0; c < head_dim; ++c) {
            const double term = scale * static_cast<double>(to_float(q[static_cast<std::size_t>(h * head_dim + c)])) * row(k, j, c);
            s += term;
            terms += std::abs(term);
          }
          score[static_cast<std::size_t>(j)] = s;
          largest = std::max(largest, s);
          magnitude = std::max(magnitude, terms);
        }
        for (double& s : score) sum += s = std::exp(s - largest);
        const double u = 0x1.0p-24, each = (2 * head_dim + 8) * u * magnitude + (2 * magnitude + 8 + 3 * (count / 16 + 2)) * u;
        const double relative = std::exp(2 * each) * (1 + (3 * count + 8) * u) - 1;
        for (int c = 0; c < head_dim; ++c) {
          double want = 0, of_magnitudes = 0;
          for (int j = 0; j < count; ++j) {
            want += score[static_cast<std::size_t>(j)] * row(v, j, c) / sum;
            of_magnitudes += score[static_cast<std::size_t>(j)] * std::abs(row(v, j, c)) / sum;
          }
          const double bound = (1 + roundoff<Bf16>)*relative * of_magnitudes + roundoff<Bf16> * std::abs(want) + underflow<Bf16>;
          worst.add(got[static_cast<std::size_t>(h * head_dim + c)], want, bound, h * head_dim + c);
        }
      }
      CHECK_MESSAGE(worst.passed(), "way ", way, ", ", heads, " heads, ", count, " keys of ", head_dim, ": ", worst.where());
    }
  }
}

}  // namespace
