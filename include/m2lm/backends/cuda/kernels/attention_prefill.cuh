// Attention of many queries on tensor cores (mma.sync, sm_80 and later): tiles of rows and keys, softmax as the keys go by.
// Follows the online softmax of Milakov and Gimelshein (arXiv 1805.02867) and the tiling of FlashAttention-2 (arXiv 2307.08691).
// Floor: backends. May include: core, ops.
#pragma once

#include <m2lm/backends/cuda/kernels/attention_common.cuh>
#include <m2lm/backends/cuda/kernels/attention_plan.cuh>

namespace m2lm::inline M2LM_ABI::cuda {

/// Blocks: [tiles of rows] × [key/value heads] × [splits]. Shared memory: rows of q; per stage a tile of keys and a tile of values.
///
/// A warp has 32 rows and all keys of a tile, so scores and probabilities never leave its registers: the accumulator of scores has the
/// layout that the next product wants of its left operand. There is one barrier per tile: behind it the tile is there, and the memory
/// of the tile before is free for the tile after. Sizes of heads below HeadDim are padded with zeros in shared memory. A NaN among the
/// values of a key shows in all rows of the block, also in those that do not see the key (0·NaN); but what no row of the block sees
/// is not read. requires a scale above 0: the largest score is the largest product.
template <class E, int HeadDim>
M2LM_KERNEL void M2LM_LAUNCH_BOUNDS(attention_tiles_policy<HeadDim>.threads()) attention_tiles(AttentionArguments<E> a) {
  constexpr AttentionTilesPolicy policy = attention_tiles_policy<HeadDim>;
  constexpr int rows = policy.rows(), key_tile = policy.keys, stride = policy.stride(), threads = policy.threads();
  constexpr int row_blocks = policy.row_blocks, score_blocks = key_tile / 8, out_blocks = HeadDim / 8, pieces = HeadDim / 8;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int first = first_position(a);
  const BlockWork work = block_work(a, first, rows, key_tile);
  if (a.splits > 1 && work.span.begin >= work.span.end) {
    write_empty_partial(a, work);
    return;
  }

  E* const q_rows = dynamic_shared<E>();
  E* const key_rows = q_rows + rows * stride;                          // [stages][key_tile][stride]
  E* const value_rows = key_rows + policy.stages * key_tile * stride;  // the same
  const E* const keys = a.keys + work.kv_head * a.head_stride;
  const E* const values = a.values + work.kv_head * a.head_stride;

  for (int i = thread; i < rows * pieces; i += threads) {
    const int row = work.row + i / pieces, c = i % pieces * 8;
    const bool valid = row < work.row_end && c < a.head_dim;
    copy_async16(q_rows + i / pieces * stride + c, valid ? a.q + row_offset(a, a.q_stride, work.kv_head, row) + c : a.q, valid);
  }
  const auto stage_tile = [&](int tile, int stage) {
    stage_keys<threads>(key_rows + stage * key_tile * stride, stride, keys, tile, key_tile, work.span, HeadDim, a.head_dim, 1);
    stage_keys<threads>(value_rows + stage * key_tile * stride, stride, values, tile, key_tile, work.span, HeadDim, a.head_dim, 1);
    copy_async_commit();
  };
  stage_tile(work.tile_begin, 0);

  // Fragments (PTX ISA, mma.m16n8k16): lane l has rows l / 4 and l / 4 + 8 of a block of 16, columns 2·(l % 4) and the next of each 8.
  const int warp_row = warp * 16 * row_blocks;
  float out[row_blocks][out_blocks][4], maximum[row_blocks][2], sum[row_blocks][2];
  int position[row_blocks][2];
  M2LM_UNROLL
  for (int b = 0; b < row_blocks; ++b) {
    M2LM_UNROLL
    for (int n = 0; n < out_blocks; ++n) out[b][n][0] = out[b][n][1] = out[b][n][2] = out[b][n][3] = 0;
    M2LM_UNROLL
    for (int half = 0; half < 2; ++half) {
      maximum[b][half] = -INFINITY;
      sum[b][half] = 0;
      position[b][half] = first + (work.row + warp_row + 16 * b + 8 * half + lane / 4) / a.group;
    }
  }
  // Of the rows of this warp: the keys that one of them sees, and the keys that all of them see.
  const int warp_first = work.row + warp_row,
            warp_last = warp_first + 16 * row_blocks - 1 < work.row_end - 1 ? warp_first + 16 * row_blocks - 1 : work.row_end - 1;
  const KeySpan of_first = visible_keys(a, first, warp_first), of_last = visible_keys(a, first, warp_last);
  const KeySpan any{of_first.begin > work.span.begin ? of_first.begin : work.span.begin, of_last.end < work.span.end ? of_last.end : work.span.end};
  const KeySpan all{of_last.begin > work.span.begin ? of_last.begin : work.span.begin, of_first.end < work.span.end ? of_first.end : work.span.end};

  static_assert(policy.stages == 2);
  int stage = 0;
  for (int tile = work.tile_begin; tile < work.span.end; tile += key_tile, stage ^= 1) {
    copy_async_wait<0>();
    __syncthreads();
    if (tile + key_tile < work.span.end) stage_tile(tile + key_tile, stage ^ 1);
    if (warp_first >= work.row_end || tile >= any.end || tile + key_tile <= any.begin) continue;

    float score[row_blocks][score_blocks][4];
    M2LM_UNROLL
    for (int b = 0; b < row_blocks; ++b) {
      M2LM_UNROLL
      for (int n = 0; n < score_blocks; ++n) score[b][n][0] = score[b][n][1] = score[b][n][2] = score[b][n][3] = 0;
    }
    const E* const tile_keys = key_rows + stage * key_tile * stride + (lane % 8 + lane / 16 * 8) * stride + lane / 8 % 2 * 8;
    M2LM_UNROLL
    for (int c = 0; c < HeadDim; c += 16) {
      std::uint32_t x[row_blocks][4];
      M2LM_UNROLL
      for (int b = 0; b < row_blocks; ++b) load_matrix_x4(x[b], q_rows + (warp_row + 16 * b + lane % 16) * stride + c + lane / 16 * 8);
      M2LM_UNROLL
      for (int n = 0; n < score_blocks; n += 2) {
        std::uint32_t k[4];
        load_matrix_x4(k, tile_keys + 8 * n * stride + c);
        const std::uint32_t even[2] = {k[0], k[1]}, odd[2] = {k[2], k[3]};
        M2LM_UNROLL
        for (int b = 0; b < row_blocks; ++b) {
          mma_16x8x16<E>(score[b][n], x[b], even);
          mma_16x8x16<E>(score[b][n + 1], x[b], odd);
        }
      }
    }

    if (tile < all.begin || tile + key_tile > all.end) {  // some row does not see some key of the tile
      M2LM_UNROLL
      for (int b = 0; b < row_blocks; ++b) {
        M2LM_UNROLL
        for (int half = 0; half < 2; ++half) {
          const KeySpan seen = keys_seen_from(a, position[b][half]);
          const int begin = (seen.begin > work.span.begin ? seen.begin : work.span.begin) - tile - lane % 4 * 2;
          const int end = (seen.end < work.span.end ? seen.end : work.span.end) - tile - lane % 4 * 2;
          M2LM_UNROLL
          for (int n = 0; n < score_blocks; ++n) {
            M2LM_UNROLL
            for (int i = 0; i < 2; ++i) {
              const int key = 8 * n + i;
              score[b][n][2 * half + i] = key >= begin && key < end ? score[b][n][2 * half + i] : -INFINITY;
            }
          }
        }
      }
    }
    float factor[row_blocks][2];
    bool same = true;
    M2LM_UNROLL
    for (int b = 0; b < row_blocks; ++b) {
      M2LM_UNROLL
      for (int half = 0; half < 2; ++half) {
        float largest = -INFINITY;
        M2LM_UNROLL
        for (int n = 0; n < score_blocks; ++n) largest = fmaxf(largest, fmaxf(score[b][n][2 * half], score[b][n][2 * half + 1]));
        largest = fmaxf(largest, shuffle_xor(largest, 1));  // the four lanes that share a row
        largest = fmaxf(largest, shuffle_xor(largest, 2));
        largest = fmaxf(maximum[b][half], largest * a.scale_log2);
        same = same && largest == maximum[b][half];
        factor[b][half] = exp2_approx(maximum[b][half] - finite_maximum(largest));
        maximum[b][half] = largest;
      }
    }
    if (ballot(!same) != 0) {  // after the first tiles a maximum seldom changes
      M2LM_UNROLL
      for (int b = 0; b < row_blocks; ++b) {
        M2LM_UNROLL
        for (int n = 0; n < out_blocks; ++n) {
          M2LM_UNROLL
          for (int i = 0; i < 4; ++i) out[b][n][i] *= factor[b][i / 2];
        }
      }
    }
    std::uint32_t p[row_blocks][score_blocks / 2][4];
    M2LM_UNROLL
    for (int b = 0; b < row_blocks; ++b) {
      M2LM_UNROLL
      for (int half = 0; half < 2; ++half) {
        const float base = -finite_maximum(maximum[b][half]);
        float added = 0;
        M2LM_UNROLL
        for (int n = 0; n < score_blocks; ++n) {
          const float low = exp2_approx(fmaf(score[b][n][2 * half], a.scale_log2, base));
          const float high = exp2_approx(fmaf(score[b][n][2 * half + 1], a.scale_log2, base));
          added += low + high;
          p[b][n / 2][2 * (n % 2) + half] = pack<E>(low, high);
        }
        sum[b][half] = sum[b][half] * factor[b][half] + added;  // this lane's columns only, until the end
      }
    }

    const E* const tile_values = value_rows + stage * key_tile * stride + lane % 16 * stride + lane / 16 * 8;
    M2LM_UNROLL
    for (int k = 0; k < key_tile / 16; ++k) {
      M2LM_UNROLL
      for (int n = 0; n < out_blocks; n += 2) {
        std::uint32_t v[4];
        load_matrix_x4_transposed(v, tile_values + 16 * k * stride + 8 * n);
        const std::uint32_t even[2] = {v[0], v[1]}, odd[2] = {v[2], v[3]};
        M2LM_UNROLL
        for (int b = 0; b < row_blocks; ++b) {
          mma_16x8x16<E>(out[b][n], p[b][k], even);
          mma_16x8x16<E>(out[b][n + 1], p[b][k], odd);
        }
      }
    }
  }
  copy_async_wait<0>();
  __syncthreads();  // where no key is seen, copies of q by others may still be on their way
  if (warp_first >= work.row_end) return;

  M2LM_UNROLL
  for (int b = 0; b < row_blocks; ++b) {
    M2LM_UNROLL
    for (int half = 0; half < 2; ++half) {
      float total = sum[b][half];
      total += shuffle_xor(total, 1);
      total += shuffle_xor(total, 2);
      const int row = work.row + warp_row + 16 * b + 8 * half + lane / 4;
      if (a.splits > 1) {
        if (row < work.row_end) {
          const std::int64_t index = partial_index(a, work.kv_head, row, work.split);
          M2LM_UNROLL
          for (int n = 0; n < out_blocks; ++n) {
            const int c = 8 * n + lane % 4 * 2;
            const float pair[2] = {out[b][n][2 * half], out[b][n][2 * half + 1]};
            if (c < a.head_dim) store_vector(a.partial + index * a.head_dim + c, pair);
          }
          if (lane % 4 == 0) {
            partial_statistics(a, index)[0] = maximum[b][half];
            partial_statistics(a, index)[1] = total;
          }
        }
      } else {
        const float base = finite_maximum(a.zero_logit != 0 ? fmaxf(maximum[b][half], 0.0F) : maximum[b][half]);
        const float factor = exp2_approx(maximum[b][half] - base);
        const float denominator = a.zero_logit != 0 ? total * factor + exp2_approx(-base) : total;
        const float to_y = factor / denominator;
        M2LM_UNROLL
        for (int n = 0; n < out_blocks; ++n) {
          const float pair[2] = {out[b][n][2 * half] * to_y, out[b][n][2 * half + 1] * to_y};
          store_vector(q_rows + (warp_row + 16 * b + 8 * half + lane / 4) * stride + 8 * n + lane % 4 * 2, pair);
        }
      }
    }
  }
  if (a.splits > 1) return;
  // The rows go out through the warp's own rows of q, in pieces of 16 bytes.
  __syncwarp();
  for (int i = lane; i < 16 * row_blocks * pieces; i += 32) {
    const int row = warp_first + i / pieces, c = i % pieces * 8;
    if (row < work.row_end && c < a.head_dim)
      store16(a.y + row_offset(a, a.y_stride, work.kv_head, row) + c, load16(q_rows + (warp_row + i / pieces) * stride + c));
  }
}

}  // namespace m2lm::cuda
