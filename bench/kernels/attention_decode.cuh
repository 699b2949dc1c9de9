// Attention of one query over many keys, from the plain way to the library's: each number adds one idea to the one before.
//   1  scores, softmax and sums as three launches, scores in device memory
//   2  one launch, a block per head, scores in shared memory, rows read by neighbouring threads
//   3  keys split over blocks, so that few heads fill the device too
//   4  reads of 16 bytes per thread
//   5  the library: the heads of a group share a pass over the keys; tiles arrive by asynchronous copies while others are used
// Includes nothing of the toolkit: the emulator checks them all (tests/cuda/bench_attention_decode.cpp), attention_decode.cu times them.
#pragma once

#include <m2lm/backends/cuda/kernels/attention.cuh>

#include <cstdint>

namespace m2lm_bench {

using namespace m2lm;
using namespace m2lm::cuda;  // where the emulator has threadIdx and so on

/// Keys and values [kv_heads][capacity][head_dim], q and y [heads][head_dim]; scratch: scratch_floats f32.
struct Decode {
  const Bf16* q = nullptr;
  const Bf16* keys = nullptr;
  const Bf16* values = nullptr;
  Bf16* y = nullptr;
  float* scratch = nullptr;
  int heads = 1, kv_heads = 1, head_dim = 64, capacity = 1, count = 1;
  float scale_log2 = 1;  ///< scale·log2 e
};

inline constexpr int threads = 128;
inline constexpr int keys_per_split = 256;

/// For all numbers.
inline std::int64_t scratch_floats(const Decode& d) {
  const std::int64_t splits = (d.count + keys_per_split - 1) / keys_per_split;
  return static_cast<std::int64_t>(d.heads) * (d.count + splits * (d.head_dim + 2));
}

M2LM_DEVICE const Bf16* rows_of_head(const Decode& d, const Bf16* rows, int head) {
  return rows + static_cast<std::int64_t>(head / (d.heads / d.kv_heads)) * d.capacity * d.head_dim;
}

// ---- 1 ----------------------------------------------------------------------------------------------------------------------

/// A thread per key and head.
M2LM_KERNEL void scores_of_keys(Decode d) {
  const int j = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x), head = static_cast<int>(blockIdx.y);
  if (j >= d.count) return;
  const Bf16* const k = rows_of_head(d, d.keys, head) + static_cast<std::int64_t>(j) * d.head_dim;
  float score = 0;
  for (int c = 0; c < d.head_dim; ++c) score += cuda::load(d.q[head * d.head_dim + c]) * cuda::load(k[c]);
  d.scratch[static_cast<std::int64_t>(head) * d.count + j] = score * d.scale_log2;
}

/// A block per head.
M2LM_KERNEL void softmax_of_scores(Decode d) {
  float* const scores = d.scratch + static_cast<std::int64_t>(blockIdx.x) * d.count;
  float largest = -INFINITY, sum = 0;
  for (int j = static_cast<int>(threadIdx.x); j < d.count; j += threads) largest = fmaxf(largest, scores[j]);
  largest = cuda::block_max(largest);
  for (int j = static_cast<int>(threadIdx.x); j < d.count; j += threads) sum += scores[j] = cuda::exp2_approx(scores[j] - largest);
  sum = cuda::block_sum(sum);
  for (int j = static_cast<int>(threadIdx.x); j < d.count; j += threads) scores[j] /= sum;
}

/// A thread per column and head.
M2LM_KERNEL void sums_of_values(Decode d) {
  const int head = static_cast<int>(blockIdx.x);
  const float* const p = d.scratch + static_cast<std::int64_t>(head) * d.count;
  const Bf16* const values = rows_of_head(d, d.values, head);
  for (int c = static_cast<int>(threadIdx.x); c < d.head_dim; c += threads) {
    float sum = 0;
    for (int j = 0; j < d.count; ++j) sum += p[j] * cuda::load(values[static_cast<std::int64_t>(j) * d.head_dim + c]);
    d.y[head * d.head_dim + c] = cuda::store<Bf16>(sum);
  }
}

// ---- 2, 3 and 4 -------------------------------------------------------------------------------------------------------------

/// A block per head and split of `split_keys` keys. A key is scored by as many lanes as read it, Piece elements each; a thread sums
/// Piece columns of every groups-th value. Shared memory: scores of the split, then sums [groups][head_dim].
template <int Piece>
M2LM_KERNEL void attention_of_split(Decode d, int split_keys) {
  const int thread = static_cast<int>(threadIdx.x), head = static_cast<int>(blockIdx.x), split = static_cast<int>(blockIdx.y);
  const int begin = split * split_keys, here = begin + split_keys < d.count ? split_keys : d.count - begin;
  const int pieces = d.head_dim / Piece, lanes = pieces < 32 ? pieces : 32;
  float* const scores = cuda::dynamic_shared<float>();
  float* const sums = scores + split_keys;
  const Bf16* const keys = rows_of_head(d, d.keys, head) + static_cast<std::int64_t>(begin) * d.head_dim;
  const Bf16* const values = rows_of_head(d, d.values, head) + static_cast<std::int64_t>(begin) * d.head_dim;

  // All lanes of a warp go round equally often: they exchange.
  const int at_once = threads / lanes;
  for (int first = 0; first < here; first += at_once) {
    const int j = first + thread / lanes;
    float score = 0;
    for (int piece = thread % lanes; piece < pieces && j < here; piece += lanes) {
      float q[Piece], k[Piece];
      if constexpr (Piece == 1) {
        q[0] = cuda::load(d.q[head * d.head_dim + piece]);
        k[0] = cuda::load(keys[static_cast<std::int64_t>(j) * d.head_dim + piece]);
      } else {
        cuda::load_vector(d.q + head * d.head_dim + piece * Piece, q);
        cuda::load_vector(keys + static_cast<std::int64_t>(j) * d.head_dim + piece * Piece, k);
      }
      M2LM_UNROLL
      for (int e = 0; e < Piece; ++e) score += q[e] * k[e];
    }
    for (int mask = lanes / 2; mask > 0; mask /= 2) score += cuda::shuffle_xor(score, mask);
    if (thread % lanes == 0 && j < here) scores[j] = score * d.scale_log2;
  }
  __syncthreads();
  float largest = -INFINITY, total = 0;
  for (int j = thread; j < here; j += threads) largest = fmaxf(largest, scores[j]);
  largest = cuda::block_max(largest);
  for (int j = thread; j < here; j += threads) total += scores[j] = cuda::exp2_approx(scores[j] - largest);
  total = cuda::block_sum(total);

  const int groups = pieces < threads ? threads / pieces : 1, group = thread / pieces, piece = thread % pieces;
  if (group < groups) {
    float sum[Piece] = {};
    for (int j = group; j < here; j += groups) {
      float v[Piece];
      if constexpr (Piece == 1)
        v[0] = cuda::load(values[static_cast<std::int64_t>(j) * d.head_dim + piece]);
      else
        cuda::load_vector(values + static_cast<std::int64_t>(j) * d.head_dim + piece * Piece, v);
      M2LM_UNROLL
      for (int e = 0; e < Piece; ++e) sum[e] += scores[j] * v[e];
    }
    M2LM_UNROLL
    for (int e = 0; e < Piece; ++e) sums[group * d.head_dim + piece * Piece + e] = sum[e];
  }
  __syncthreads();
  const int splits = static_cast<int>(gridDim.y), index = head * splits + split;
  for (int c = thread; c < d.head_dim; c += threads) {
    float sum = 0;
    for (int g = 0; g < groups; ++g) sum += sums[g * d.head_dim + c];
    if (splits == 1)
      d.y[head * d.head_dim + c] = cuda::store<Bf16>(sum / total);
    else
      d.scratch[static_cast<std::int64_t>(index) * d.head_dim + c] = sum;
  }
  if (splits > 1 && thread == 0) {
    float* const statistics = d.scratch + static_cast<std::int64_t>(d.heads) * splits * d.head_dim + 2 * index;
    statistics[0] = largest;
    statistics[1] = total;
  }
}

/// A block per head.
M2LM_KERNEL void combine_splits(Decode d, int splits) {
  const int head = static_cast<int>(blockIdx.x);
  const float* const statistics = d.scratch + static_cast<std::int64_t>(d.heads) * splits * d.head_dim + 2 * head * splits;
  float largest = -INFINITY, total = 0;
  for (int s = 0; s < splits; ++s) largest = fmaxf(largest, statistics[2 * s]);
  for (int s = 0; s < splits; ++s) total += statistics[2 * s + 1] * cuda::exp2_approx(statistics[2 * s] - largest);
  for (int c = static_cast<int>(threadIdx.x); c < d.head_dim; c += threads) {
    float sum = 0;
    for (int s = 0; s < splits; ++s)
      sum += d.scratch[static_cast<std::int64_t>(head * splits + s) * d.head_dim + c] * cuda::exp2_approx(statistics[2 * s] - largest);
    d.y[head * d.head_dim + c] = cuda::store<Bf16>(sum / total);
  }
}

// ---- the ways ---------------------------------------------------------------------------------------------------------------

inline constexpr int ways = 5;

/// Keys that way 2 has room for.
inline int most_keys_of_one_block(const Decode& d, std::size_t shared_bytes) {
  return static_cast<int>(shared_bytes / sizeof(float)) - 8 * threads - d.head_dim - 64;
}

/// Enqueues way 1 to 5. requires head_dim 8, 16, 32, 64 or 128; d.count > 0.
/// `library_scratch`: cuda::attention_scratch bytes, for way 5.
inline void run(cuda::Device& device, int way, const Decode& d, void* library_scratch) {
  const auto heads = static_cast<unsigned>(d.heads);
  const auto split = [&](auto kernel, int piece, int split_keys) {
    const int splits = (d.count + split_keys - 1) / split_keys, pieces = d.head_dim / piece, groups = pieces < threads ? threads / pieces : 1;
    const auto floats = static_cast<std::size_t>(split_keys + groups * d.head_dim);
    cuda::launch(device, "attention_of_split", kernel, {heads, static_cast<unsigned>(splits), 1, threads, 1, floats * sizeof(float)}, d, split_keys);
    if (splits > 1) cuda::launch(device, "combine_splits", combine_splits, {heads, 1, 1, threads, 1, 0}, d, splits);
  };
  switch (way) {
    case 1:
      cuda::launch(device, "scores_of_keys", scores_of_keys, {static_cast<unsigned>((d.count + threads - 1) / threads), heads, 1, threads, 1, 0}, d);
      cuda::launch(device, "softmax_of_scores", softmax_of_scores, {heads, 1, 1, threads, 1, 0}, d);
      cuda::launch(device, "sums_of_values", sums_of_values, {heads, 1, 1, threads, 1, 0}, d);
      break;
    case 2: split(attention_of_split<1>, 1, d.count); break;
    case 3: split(attention_of_split<1>, 1, keys_per_split); break;
    case 4: split(attention_of_split<8>, 8, keys_per_split); break;
    default: {
      KeyValues kv;
      kv.format = DType::bf16;
      kv.kv_heads = d.kv_heads;
      kv.head_dim = d.head_dim;
      kv.capacity = d.capacity;
      kv.keys = const_cast<std::byte*>(reinterpret_cast<const std::byte*>(d.keys));
      kv.values = const_cast<std::byte*>(reinterpret_cast<const std::byte*>(d.values));
      const std::int64_t columns = static_cast<std::int64_t>(d.heads) * d.head_dim;
      cuda::attention<Bf16>(device, Matrix<const Bf16>(d.q, {1, columns}), kv, {.length = nullptr, .first = d.count - 1, .most_keys = d.count},
                            {.causal = true, .window = 0}, d.scale_log2 / 1.44269504088896341F, Matrix<Bf16>(d.y, {1, columns}), {}, library_scratch);
    }
  }
}

}  // namespace m2lm_bench
