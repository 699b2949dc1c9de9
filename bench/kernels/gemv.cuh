// A matrix times a vector, from the plain way to the library's: each number adds one idea to the one before. The time of a step of decoding is that
// of reading weights, so what counts is how many bytes of them are on their way at once, and that nothing else takes longer.
//
// Weights of bf16:
//   1  a thread per row
//   2  a warp per row: neighbouring lanes read neighbouring elements
//   3  16 bytes per access
//   4  four accesses are on their way before the first is used, past the L1 cache, which keeps x
//   5  the library: two rows share what is read of x, and few rows are cut until their warps fill the device
// Weights of 4 bits in blocks of 32 (q4):
//   1  a thread per row, blocks of 18 bytes as files have them
//   2  a warp per row: neighbouring lanes read neighbouring blocks, 2 bytes at a time
//   3  values and scales apart: a block's values are one access of 16 bytes
//   4  two integers become two floats by their bits: no conversion, which runs at a fraction of the rate of an addition
//   5  four accesses are on their way before the first is used
//   6  the library: values lie as a lane of mma wants them, and tensor cores do the sums
// Includes nothing of the toolkit: the emulator checks them all (tests/cuda/bench_gemv.cpp), gemv.cu times them.
#pragma once

#include <m2lm/backends/cuda/kernels/linear.cuh>

#include <cstddef>
#include <cstdint>

namespace m2lm_bench {

using namespace m2lm;
using namespace m2lm::cuda;  // where the emulator has threadIdx and so on

/// y [rows] = w [rows][cols] · x [cols]. requires cols a multiple of 8.
struct Gemv {
  const Bf16* w = nullptr;
  const Bf16* x = nullptr;
  Bf16* y = nullptr;
  int rows = 1, cols = 8;
};
/// The same of blocks: as files have them, and taken apart. requires cols a multiple of 32.
struct GemvQ4 {
  const std::byte* blocks = nullptr;  ///< [rows][cols / 32] Q4Block
  const std::byte* values = nullptr;  ///< [rows][cols / 32] of the 16 bytes of values
  const Half* scales = nullptr;       ///< [rows][cols / 32]
  const Bf16* x = nullptr;
  Bf16* y = nullptr;
  int rows = 1, cols = 32;
};

inline constexpr int gemv_ways = 5, gemv_q4_ways = 6;
inline constexpr unsigned gemv_threads = 128;
inline constexpr int gemv_ahead = 4;

/// The row of a kernel that has a warp per row; the last one for warps that are too many, which store the same.
template <class G>
M2LM_DEVICE int row_of_warp(const G& g) {
  const int row = static_cast<int>(blockIdx.x * (gemv_threads / 32) + warp_index());
  return row < g.rows ? row : g.rows - 1;
}
template <class G>
M2LM_DEVICE void store_row(const G& g, int row, float sum) {
  sum = warp_sum(sum);
  if (lane_index() == 0) g.y[row] = store<Bf16>(sum);
}

// ---- bf16 -------------------------------------------------------------------------------------------------------------------

template <class G>
M2LM_KERNEL void gemv_by_threads(G g) {
  const int row = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (row >= g.rows) return;
  const Bf16* const w = g.w + std::int64_t{row} * g.cols;
  float sum = 0;
  for (int c = 0; c < g.cols; ++c) sum += load(w[c]) * load(g.x[c]);
  g.y[row] = store<Bf16>(sum);
}

template <class G>
M2LM_KERNEL void gemv_by_warps(G g) {
  const int row = row_of_warp(g);
  const Bf16* const w = g.w + std::int64_t{row} * g.cols;
  float sum = 0;
  for (int c = static_cast<int>(lane_index()); c < g.cols; c += 32) sum += load(w[c]) * load(g.x[c]);
  store_row(g, row, sum);
}

template <class G>
M2LM_KERNEL void gemv_by_vectors(G g) {
  const int row = row_of_warp(g);
  const Bf16* const w = g.w + std::int64_t{row} * g.cols;
  float sum = 0;
  for (int c = static_cast<int>(lane_index()) * 8; c < g.cols; c += 32 * 8) {
    float weight[8], x[8];
    load_vector(w + c, weight);
    load_vector(g.x + c, x);
    M2LM_UNROLL
    for (int i = 0; i < 8; ++i) sum += weight[i] * x[i];
  }
  store_row(g, row, sum);
}

template <class G>
M2LM_KERNEL void gemv_with_loads_ahead(G g) {
  const int row = row_of_warp(g);
  const Bf16* const w = g.w + std::int64_t{row} * g.cols;
  float sum = 0;
  for (int begin = static_cast<int>(lane_index()) * 8; begin < g.cols; begin += gemv_ahead * 32 * 8) {
    Bytes16 piece[gemv_ahead];
    M2LM_UNROLL
    for (int a = 0; a < gemv_ahead; ++a)
      if (begin + a * 32 * 8 < g.cols) piece[a] = load16_streaming(w + begin + a * 32 * 8);
    M2LM_UNROLL
    for (int a = 0; a < gemv_ahead; ++a) {
      if (begin + a * 32 * 8 >= g.cols) break;
      float x[8];
      load_vector(g.x + begin + a * 32 * 8, x);
      M2LM_UNROLL
      for (int i = 0; i < 4; ++i) {
        float low, high;
        unpack<Bf16>(piece[a].words[i], low, high);
        sum += low * x[2 * i] + high * x[2 * i + 1];
      }
    }
  }
  store_row(g, row, sum);
}

// ---- 4 bits -----------------------------------------------------------------------------------------------------------------

/// Of a block as files have it: its scale, then 16 bytes, of which byte j has values j and j + 16.
M2LM_DEVICE float dot_block(const std::byte* block, const Bf16* x) {
  const auto* const halves = reinterpret_cast<const std::uint16_t*>(block);
  float sum = 0;
  M2LM_UNROLL
  for (int i = 0; i < 8; ++i) {
    const unsigned four = halves[1 + i];
    M2LM_UNROLL
    for (int v = 0; v < 4; ++v)  // values 2i, 2i + 16, 2i + 1, 2i + 17
      sum += static_cast<float>(static_cast<int>(four >> (4 * v) & 15U) - 8) * load(x[2 * i + v / 2 + v % 2 * 16]);
  }
  return load(Half{halves[0]}) * sum;
}

/// Of the values of a block in registers, taken out one by one.
M2LM_DEVICE float dot_integers(const Bytes16& values, const Bf16* x) {
  float sum = 0, input[16];
  M2LM_UNROLL
  for (int half = 0; half < 2; ++half) {  // low digits are values 0 … 15, high digits 16 … 31
    M2LM_UNROLL
    for (int c = 0; c < 16; c += 8) {
      float eight[8];
      load_vector(x + 16 * half + c, eight);
      M2LM_UNROLL
      for (int i = 0; i < 8; ++i) input[c + i] = eight[i];
    }
    M2LM_UNROLL
    for (int j = 0; j < 16; ++j) sum += static_cast<float>(static_cast<int>(values.words[j / 4] >> (8 * (j % 4) + 4 * half) & 15U) - 8) * input[j];
  }
  return sum;
}

/// The same, two by two: the bits of q under those of 128 make 128 + q in bf16.
M2LM_DEVICE float dot_bits(const Bytes16& values, const Bf16* x) {
  float sum = 0;
  M2LM_UNROLL
  for (int half = 0; half < 2; ++half) {
    M2LM_UNROLL
    for (int c = 0; c < 16; c += 8) {
      float input[8];
      load_vector(x + 16 * half + c, input);
      M2LM_UNROLL
      for (int i = 0; i < 4; ++i) {  // of a word bytes 0 and 2, then 1 and 3
        const std::uint32_t q = values.words[c / 4 + i / 2] >> (8 * (i % 2) + 4 * half);
        float low, high;
        unpack<Bf16>(subtract_pairs<Bf16>(and_or(q, 0x000f000fU, 0x43004300U), 0x43084308U), low, high);
        const int j = i / 2 * 4 + i % 2;
        sum += low * input[j] + high * input[j + 2];
      }
    }
  }
  return sum;
}

template <class G>
M2LM_KERNEL void gemv_q4_by_threads(G g) {
  const int row = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x), blocks = g.cols / 32;
  if (row >= g.rows) return;
  float sum = 0;
  for (int b = 0; b < blocks; ++b) sum += dot_block(g.blocks + (std::int64_t{row} * blocks + b) * 18, g.x + 32 * b);
  g.y[row] = store<Bf16>(sum);
}

template <class G>
M2LM_KERNEL void gemv_q4_by_warps(G g) {
  const int row = row_of_warp(g), blocks = g.cols / 32;
  float sum = 0;
  for (int b = static_cast<int>(lane_index()); b < blocks; b += 32) sum += dot_block(g.blocks + (std::int64_t{row} * blocks + b) * 18, g.x + 32 * b);
  store_row(g, row, sum);
}

/// Numbers 3 and 4.
template <bool ByBits, class G>
M2LM_KERNEL void gemv_q4_by_vectors(G g) {
  const int row = row_of_warp(g), blocks = g.cols / 32;
  const std::int64_t first = std::int64_t{row} * blocks;
  float sum = 0;
  for (int b = static_cast<int>(lane_index()); b < blocks; b += 32) {
    const Bytes16 values = load16(g.values + (first + b) * 16);
    if constexpr (ByBits)
      sum += load(g.scales[first + b]) * dot_bits(values, g.x + 32 * b);
    else
      sum += load(g.scales[first + b]) * dot_integers(values, g.x + 32 * b);
  }
  store_row(g, row, sum);
}

template <class G>
M2LM_KERNEL void gemv_q4_with_loads_ahead(G g) {
  const int row = row_of_warp(g), blocks = g.cols / 32;
  const std::int64_t first = std::int64_t{row} * blocks;
  float sum = 0;
  for (int begin = static_cast<int>(lane_index()); begin < blocks; begin += gemv_ahead * 32) {
    Bytes16 values[gemv_ahead];
    Half scale[gemv_ahead];
    M2LM_UNROLL
    for (int a = 0; a < gemv_ahead; ++a) {
      if (begin + a * 32 >= blocks) break;
      values[a] = load16_streaming(g.values + (first + begin + a * 32) * 16);
      scale[a] = g.scales[first + begin + a * 32];
    }
    M2LM_UNROLL
    for (int a = 0; a < gemv_ahead; ++a)
      if (begin + a * 32 < blocks) sum += load(scale[a]) * dot_bits(values[a], g.x + 32 * (begin + a * 32));
  }
  store_row(g, row, sum);
}

// ---- the ways ---------------------------------------------------------------------------------------------------------------

namespace detail {

/// The library, with weights that lie as `packed` says.
inline void multiply(Device& device, const PackedMatrix& packed, const Bf16* x, Bf16* y) {
  cuda::linear<Bf16, Bf16>(device, Matrix<const Bf16>(x, {1, packed.cols}), packed, nullptr, Activation::none, Matrix<const Bf16>{},
                           Matrix<Bf16>(y, {1, packed.rows}), nullptr);
}

}  // namespace detail

/// Enqueues way 1 to 5.
inline void run(Device& device, int way, const Gemv& g) {
  const auto rows = static_cast<unsigned>(g.rows);
  const LaunchShape by_threads{.grid_x = (rows + gemv_threads - 1) / gemv_threads, .block_x = gemv_threads};
  const LaunchShape by_warps{.grid_x = (rows + gemv_threads / 32 - 1) / (gemv_threads / 32), .block_x = gemv_threads};
  switch (way) {
    case 1: return launch(device, "gemv_by_threads", gemv_by_threads<Gemv>, by_threads, g);
    case 2: return launch(device, "gemv_by_warps", gemv_by_warps<Gemv>, by_warps, g);
    case 3: return launch(device, "gemv_by_vectors", gemv_by_vectors<Gemv>, by_warps, g);
    case 4: return launch(device, "gemv_with_loads_ahead", gemv_with_loads_ahead<Gemv>, by_warps, g);
    default: {
      PackedMatrix packed{.format = DType::bf16, .rows = g.rows, .cols = g.cols, .gated = false, .data = {}, .bytes = 0};
      packed.data = std::shared_ptr<const std::byte>(std::shared_ptr<void>(), reinterpret_cast<const std::byte*>(g.w));  // who has it keeps it
      detail::multiply(device, packed, g.x, g.y);
    }
  }
}

/// Enqueues way 1 to 6. `packed`: the same blocks as the library has them, for way 6.
inline void run(Device& device, int way, const GemvQ4& g, const PackedMatrix& packed) {
  const auto rows = static_cast<unsigned>(g.rows);
  const LaunchShape by_threads{.grid_x = (rows + gemv_threads - 1) / gemv_threads, .block_x = gemv_threads};
  const LaunchShape by_warps{.grid_x = (rows + gemv_threads / 32 - 1) / (gemv_threads / 32), .block_x = gemv_threads};
  switch (way) {
    case 1: return launch(device, "gemv_q4_by_threads", gemv_q4_by_threads<GemvQ4>, by_threads, g);
    case 2: return launch(device, "gemv_q4_by_warps", gemv_q4_by_warps<GemvQ4>, by_warps, g);
    case 3: return launch(device, "gemv_q4_by_vectors", gemv_q4_by_vectors<false, GemvQ4>, by_warps, g);
    case 4: return launch(device, "gemv_q4_by_vectors, by bits", gemv_q4_by_vectors<true, GemvQ4>, by_warps, g);
    case 5: return launch(device, "gemv_q4_with_loads_ahead", gemv_q4_with_loads_ahead<GemvQ4>, by_warps, g);
    default: detail::multiply(device, packed, g.x, g.y);
  }
}

/// Blocks as the ways 3 to 5 want them.
inline void take_apart(std::span<const Q4Block> blocks, std::vector<std::byte>& values, std::vector<Half>& scales) {
  for (const Q4Block& block : blocks) {
    for (const std::uint8_t pair : block.pairs) values.push_back(static_cast<std::byte>(pair));
    scales.push_back(block.scale);
  }
}

}  // namespace m2lm_bench
