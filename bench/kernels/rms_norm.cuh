// RMSNorm of rows of bf16, from the plain way to the library's: each number adds one idea to the one before.
//   1  a thread per row
//   2  a block per row: neighbouring threads read neighbouring elements, and the sum is shared; the row is read twice
//   3  16 bytes per access, and the row stays in registers between the sum and the product: it is read once
//   4  the library: the weight is asked for before the sum is known; few rows get as many threads as they have vectors
// Includes nothing of the toolkit: the emulator checks them all (tests/cuda/bench_rms_norm.cpp), rms_norm.cu times them.
#pragma once

#include <m2lm/backends/cuda/kernels/rows.cuh>

#include <cstdint>

namespace m2lm_bench {

using namespace m2lm;
using namespace m2lm::cuda;  // where the emulator has threadIdx and so on

/// x, y [rows][cols], weight [cols]. requires, for number 3, cols a multiple of 8 and at most 8,192.
struct Norm {
  const Bf16* x = nullptr;
  const Bf16* weight = nullptr;
  Bf16* y = nullptr;
  int rows = 1, cols = 8;
  float eps = 1e-5F;
};

inline constexpr int norm_ways = 4;
inline constexpr unsigned norm_threads = 128;

M2LM_DEVICE float norm_scale(float squares, const Norm& n) { return 1.0F / sqrtf(squares / static_cast<float>(n.cols) + n.eps); }

template <class N>
M2LM_KERNEL void rms_norm_by_threads(N n) {
  const int row = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (row >= n.rows) return;
  const Bf16* const x = n.x + std::int64_t{row} * n.cols;
  Bf16* const y = n.y + std::int64_t{row} * n.cols;
  float squares = 0;
  for (int i = 0; i < n.cols; ++i) squares += load(x[i]) * load(x[i]);
  const float scale = norm_scale(squares, n);
  for (int i = 0; i < n.cols; ++i) y[i] = store<Bf16>(load(x[i]) * scale * load(n.weight[i]));
}

template <class N>
M2LM_KERNEL void rms_norm_by_blocks(N n) {
  const Bf16* const x = n.x + std::int64_t{blockIdx.x} * n.cols;
  Bf16* const y = n.y + std::int64_t{blockIdx.x} * n.cols;
  float squares = 0;
  for (int i = static_cast<int>(threadIdx.x); i < n.cols; i += static_cast<int>(blockDim.x)) squares += load(x[i]) * load(x[i]);
  const float scale = norm_scale(block_sum(squares), n);
  for (int i = static_cast<int>(threadIdx.x); i < n.cols; i += static_cast<int>(blockDim.x))
    y[i] = store<Bf16>(load(x[i]) * scale * load(n.weight[i]));
}

template <class N>
M2LM_KERNEL void rms_norm_in_registers(N n) {
  constexpr int elements = 8, held = 8;
  const std::int64_t begin = std::int64_t{blockIdx.x} * n.cols;
  float x[held][elements] = {}, squares = 0;
  M2LM_UNROLL
  for (int v = 0; v < held; ++v) {
    const int i = (v * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) * elements;
    if (i >= n.cols) continue;
    load_vector(n.x + begin + i, x[v]);
    M2LM_UNROLL
    for (int e = 0; e < elements; ++e) squares += x[v][e] * x[v][e];
  }
  const float scale = norm_scale(block_sum(squares), n);
  M2LM_UNROLL
  for (int v = 0; v < held; ++v) {
    const int i = (v * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) * elements;
    if (i >= n.cols) continue;
    float weight[elements];
    load_vector(n.weight + i, weight);
    M2LM_UNROLL
    for (int e = 0; e < elements; ++e) x[v][e] *= scale * weight[e];
    store_vector(n.y + begin + i, x[v]);
  }
}

inline void run(Device& device, int way, const Norm& n) {
  const auto rows = static_cast<unsigned>(n.rows);
  if (way == 1)
    launch(device, "rms_norm_by_threads", rms_norm_by_threads<Norm>, {.grid_x = (rows + norm_threads - 1) / norm_threads, .block_x = norm_threads},
           n);
  if (way == 2) launch(device, "rms_norm_by_blocks", rms_norm_by_blocks<Norm>, {.grid_x = rows, .block_x = norm_threads}, n);
  if (way == 3) launch(device, "rms_norm_in_registers", rms_norm_in_registers<Norm>, {.grid_x = rows, .block_x = norm_threads}, n);
  if (way == 4) cuda::rms_norm<Bf16>(device, Matrix<const Bf16>(n.x, {n.rows, n.cols}), n.weight, n.eps, Matrix<Bf16>(n.y, {n.rows, n.cols}));
}

}  // namespace m2lm_bench
