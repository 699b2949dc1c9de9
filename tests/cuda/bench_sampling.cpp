// The numbered ways of bench/kernels/sampling.cuh draw Sampler's tokens.
// labels: no-sanitizer
#include "device_support.hpp"

#include "../../bench/kernels/sampling.cuh"

#include <m2lm/sampling/processors.hpp>

TEST_CASE("every way of bench/kernels/sampling.cuh draws the same token") {
  using namespace m2lm_test;
  cuda::Device device(0);
  Random random(1);
  for (const int rows : {1, 40})
    for (const int vocab : {1, 33, 1500}) {
      const auto logits = random.elements<float>(std::int64_t{rows} * vocab, 3);
      std::vector<SamplerRow> states;
      std::vector<std::int32_t> expected;
      Sampler sampler({.temperature = 1}, vocab);
      for (int r = 0; r < rows; ++r) {
        states.push_back({.seed = static_cast<std::uint64_t>(random.integer(0, 1000000)), .temperature = 1});
        std::vector<float> row(logits.begin() + std::ptrdiff_t{r} * vocab, logits.begin() + std::ptrdiff_t{r + 1} * vocab);
        Rng rng(states.back().seed);
        expected.push_back(sampler.sample(row, {}, rng));
      }
      const DeviceArray<std::byte> scratch(device, cuda::sample_scratch(rows, vocab));
      for (int way = 1; way <= m2lm_bench::draw_ways; ++way) {
        const DeviceArray<float> device_logits(device, logits);
        const DeviceArray<SamplerRow> device_states(device, states);
        const DeviceArray<std::int32_t> ids(device, std::vector<std::int32_t>(static_cast<std::size_t>(rows), -9));
        m2lm_bench::run(device, way,
                        {.logits = device_logits.data(),
                         .states = device_states.data(),
                         .ids = ids.data(),
                         .scratch = scratch.data(),
                         .rows = rows,
                         .vocab = vocab});
        CHECK_MESSAGE(ids.read() == expected, "way ", way, ", ", rows, " rows of ", vocab);
        CHECK(device_states.read().back().counter == 1);
      }
    }
}
