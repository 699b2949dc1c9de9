// Drawing a token from logits, from the plain way to the library's: each number adds one idea to the one before.
//   1  a thread per row: largest, sum, and a walk along the running sum
//   2  a block per row: each thread has a share of the tokens, and the walk goes over warps, threads and one share
//   3  the library: the logits are read by many blocks, one per chunk of a row; the block that draws reads sums of chunks, and one chunk
// Includes nothing of the toolkit: the emulator checks them all (tests/cuda/bench_sampling.cpp), sampling.cu times them.
#pragma once

#include <m2lm/backends/cuda/kernels/sampling.cuh>

#include <cstdint>

namespace m2lm_bench {

using namespace m2lm;
using namespace m2lm::cuda;  // where the emulator has threadIdx and so on

/// logits [rows][vocab]; the state of each row; ids [rows]. The numbers 1 and 2 draw at temperature 1 without limits.
struct Draw {
  float* logits = nullptr;
  SamplerRow* states = nullptr;
  std::int32_t* ids = nullptr;
  void* scratch = nullptr;  ///< sample_scratch
  int rows = 1, vocab = 1;
};

inline constexpr int draw_ways = 3;

M2LM_DEVICE double next_uniform(SamplerRow& state) { return cuda::detail::uniform_of(state.seed, state.counter++); }

template <class D>
M2LM_KERNEL void draw_by_threads(D d) {
  const int row = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (row >= d.rows) return;
  const float* const logits = d.logits + std::int64_t{row} * d.vocab;
  float largest = -INFINITY;
  double sum = 0, before = 0;
  for (int i = 0; i < d.vocab; ++i) largest = fmaxf(largest, logits[i]);
  const auto weight = [&](int i) { return cuda::detail::weight_of(largest, logits[i]); };
  for (int i = 0; i < d.vocab; ++i) sum += weight(i);
  d.ids[row] = cuda::detail::first_beyond(0, d.vocab, next_uniform(d.states[row]) * sum, before, weight);
}

template <class D>
M2LM_KERNEL void draw_by_blocks(D d) {
  const float* const logits = d.logits + std::int64_t{blockIdx.x} * d.vocab;
  float largest = -INFINITY;
  for (int i = static_cast<int>(threadIdx.x); i < d.vocab; i += static_cast<int>(blockDim.x)) largest = fmaxf(largest, logits[i]);
  largest = block_max(largest);
  const auto weight = [&](int i) { return cuda::detail::weight_of(largest, logits[i]); };
  const cuda::detail::RunningWeights sums = cuda::detail::add_weights(d.vocab, weight);
  SamplerRow state = d.states[blockIdx.x];
  double before = 0;
  const int id = cuda::detail::find_weight(sums, d.vocab, next_uniform(state) * sums.total, before, weight);
  if (threadIdx.x != 0) return;  // find_weight has waited until all have read the state
  d.states[blockIdx.x] = state;
  d.ids[blockIdx.x] = id;
}

inline void run(Device& device, int way, const Draw& d) {
  const auto rows = static_cast<unsigned>(d.rows);
  if (way == 1) launch(device, "draw_by_threads", draw_by_threads<Draw>, {.grid_x = (rows + 31) / 32, .block_x = 32}, d);
  if (way == 2) launch(device, "draw_by_blocks", draw_by_blocks<Draw>, {.grid_x = rows, .block_x = sampling_policy.choosing_threads}, d);
  if (way == 3) cuda::sample(device, Matrix<float>(d.logits, {d.rows, d.vocab}), d.states, nullptr, d.ids, d.scratch);
}

}  // namespace m2lm_bench
