// Attention of few queries on FMA units: bound by reading keys and values once. Also what every element type, head size and alignment
// has where tensor cores cannot be used.
// Floor: backends. May include: core, ops.
#pragma once

#include <m2lm/backends/cuda/kernels/attention_common.cuh>
#include <m2lm/backends/cuda/kernels/attention_plan.cuh>

namespace m2lm::inline M2LM_ABI::cuda {

/// Blocks: [tiles of Rows rows] × [key/value heads] × [splits]. Shared memory: a tile of keys, a tile of values, q, probabilities.
///
/// Keys and values of a tile arrive by asynchronous copies, each while the other is used: the next keys come while values are summed,
/// the next values while keys are scored. For scores a thread takes one key and all rows (so a key is converted once for the group);
/// for sums it takes 16 bytes of head_dim and every groups-th run of four keys. Running maxima are the same in all threads, running
/// sums of exponentials are each thread's own until the end.
template <class E, int Rows>
M2LM_KERNEL void M2LM_LAUNCH_BOUNDS(attention_rows_policy.threads, attention_rows_policy.blocks_per_multiprocessor)
    attention_rows(AttentionArguments<E> a, int key_tile) {
  constexpr int piece = 16 / static_cast<int>(sizeof(E));
  constexpr int threads = attention_rows_policy.threads, warps = attention_rows_policy.warps();
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int first = first_position(a);
  const BlockWork work = block_work(a, first, Rows, key_tile);
  if (a.splits > 1 && work.span.begin >= work.span.end) {
    write_empty_partial(a, work);
    return;
  }

  const int pieces = (a.head_dim + piece - 1) / piece, width = pieces * piece, stride = (pieces | 1) * piece;
  unsigned char* const shared = dynamic_shared<unsigned char>();
  E* const key_rows = reinterpret_cast<E*>(shared);
  E* const value_rows = key_rows + key_tile * stride;
  float* const sums = reinterpret_cast<float*>(shared);  // [groups][Rows][width], when the tiles are done with
  const int tile_bytes = 2 * key_tile * stride * static_cast<int>(sizeof(E)), sum_bytes = threads * Rows * piece * 4;
  float* const q = reinterpret_cast<float*>(shared + (tile_bytes > sum_bytes ? tile_bytes : sum_bytes));  // [Rows][width]
  float* const probabilities = q + Rows * width;                                                          // [Rows][key_tile]
  M2LM_SHARED float of_warps[warps][Rows];
  M2LM_SHARED int row_begin[Rows];
  M2LM_SHARED int row_end[Rows];

  const E* const keys = a.keys + work.kv_head * a.head_stride;
  const E* const values = a.values + work.kv_head * a.head_stride;
  stage_keys<threads>(key_rows, stride, keys, work.tile_begin, key_tile, work.span, width, a.head_dim, a.vectors);
  copy_async_commit();
  stage_keys<threads>(value_rows, stride, values, work.tile_begin, key_tile, work.span, width, a.head_dim, a.vectors);
  copy_async_commit();

  for (int i = thread; i < Rows * width; i += threads) {
    const int row = work.row + i / width, c = i % width;
    const bool valid = row < work.row_end && c < a.head_dim;
    q[i] = valid ? load(a.q[row_offset(a, a.q_stride, work.kv_head, row) + c]) * a.scale_log2 : 0.0F;
  }
  if (thread < Rows) {
    const int row = work.row + thread;
    const KeySpan seen = visible_keys(a, first, row);
    row_begin[thread] = seen.begin > work.span.begin ? seen.begin : work.span.begin;
    row_end[thread] = row >= work.row_end ? 0 : seen.end < work.span.end ? seen.end : work.span.end;
  }

  float maximum[Rows], sum[Rows], out[Rows][piece];
  M2LM_UNROLL
  for (int r = 0; r < Rows; ++r) {
    maximum[r] = -INFINITY;
    sum[r] = 0;
    M2LM_UNROLL
    for (int e = 0; e < piece; ++e) out[r][e] = 0;
  }
  const int groups = threads / pieces, group = thread / pieces, column = thread % pieces * piece;

  for (int tile = work.tile_begin; tile < work.span.end; tile += key_tile) {
    copy_async_wait<1>();
    __syncthreads();  // the keys are here
    float score[Rows];
    M2LM_UNROLL
    for (int r = 0; r < Rows; ++r) score[r] = 0;
    if (thread < key_tile) {
      for (int c = 0; c < width; c += piece) {
        float k[piece];
        load_vector(key_rows + thread * stride + c, k);
        M2LM_UNROLL
        for (int r = 0; r < Rows; ++r) {
          float part = 0;
          M2LM_UNROLL
          for (int e = 0; e < piece; e += 4) {
            float x[4];
            load_vector(q + r * width + c + e, x);
            M2LM_UNROLL
            for (int i = 0; i < 4; ++i) part += x[i] * k[e + i];
          }
          score[r] += part;
        }
      }
    }
    M2LM_UNROLL
    for (int r = 0; r < Rows; ++r) {
      const bool seen = thread < key_tile && tile + thread >= row_begin[r] && tile + thread < row_end[r];
      score[r] = seen ? score[r] : -INFINITY;
      const float largest = warp_max(score[r]);
      if (lane == 0) of_warps[warp][r] = largest;
    }
    __syncthreads();  // the maxima are here, and all have done with the keys
    if (tile + key_tile < work.span.end)
      stage_keys<threads>(key_rows, stride, keys, tile + key_tile, key_tile, work.span, width, a.head_dim, a.vectors);
    copy_async_commit();
    M2LM_UNROLL
    for (int r = 0; r < Rows; ++r) {
      float largest = maximum[r];
      M2LM_UNROLL
      for (int w = 0; w < warps; ++w) largest = fmaxf(largest, of_warps[w][r]);
      const float base = finite_maximum(largest);
      const float factor = exp2_approx(maximum[r] - base), p = exp2_approx(score[r] - base);
      maximum[r] = largest;
      sum[r] = sum[r] * factor + p;
      M2LM_UNROLL
      for (int e = 0; e < piece; ++e) out[r][e] *= factor;
      if (thread < key_tile) probabilities[r * key_tile + thread] = p;
    }
    copy_async_wait<1>();
    __syncthreads();  // the values are here, and the probabilities
    if (group < groups) {
      for (int k = 4 * group; k < key_tile; k += 4 * groups) {
        float p[Rows][4];
        M2LM_UNROLL
        for (int r = 0; r < Rows; ++r) load_vector(probabilities + r * key_tile + k, p[r]);
        M2LM_UNROLL
        for (int i = 0; i < 4; ++i) {
          float v[piece];
          load_vector(value_rows + (k + i) * stride + column, v);
          M2LM_UNROLL
          for (int r = 0; r < Rows; ++r) {
            // A value that this row does not see may be NaN: it is left out, not multiplied by zero.
            if (p[r][i] != 0.0F) {
              M2LM_UNROLL
              for (int e = 0; e < piece; ++e) out[r][e] += p[r][i] * v[e];
            }
          }
        }
      }
    }
    __syncthreads();  // all have done with the values
    if (tile + key_tile < work.span.end)
      stage_keys<threads>(value_rows, stride, values, tile + key_tile, key_tile, work.span, width, a.head_dim, a.vectors);
    copy_async_commit();
  }
  copy_async_wait<0>();
  __syncthreads();  // the sums lie where tiles were, to which copies may still be on their way

  M2LM_UNROLL
  for (int r = 0; r < Rows; ++r) {
    const float of_warp = warp_sum(sum[r]);
    if (lane == 0) of_warps[warp][r] = of_warp;
    if (group < groups) {
      float* const to = sums + (group * Rows + r) * width + column;
      M2LM_UNROLL
      for (int e = 0; e < piece; ++e) to[e] = out[r][e];
    }
  }
  __syncthreads();
  M2LM_UNROLL
  for (int r = 0; r < Rows; ++r) {
    const int row = work.row + r;
    float total = 0;
    M2LM_UNROLL
    for (int w = 0; w < warps; ++w) total += of_warps[w][r];
    if (row < work.row_end) {
      const std::int64_t index = partial_index(a, work.kv_head, row, work.split);
      const float base = finite_maximum(a.zero_logit != 0 ? fmaxf(maximum[r], 0.0F) : maximum[r]);
      const float factor = exp2_approx(maximum[r] - base);
      const float denominator = a.zero_logit != 0 ? total * factor + exp2_approx(-base) : total;
      for (int c = thread; c < a.head_dim; c += threads) {
        float value = 0;
        for (int g = 0; g < groups; ++g) value += sums[(g * Rows + r) * width + c];
        if (a.splits > 1)
          a.partial[index * a.head_dim + c] = value;
        else
          a.y[row_offset(a, a.y_stride, work.kv_head, row) + c] = store<E>(value * factor / denominator);
      }
      if (a.splits > 1 && thread == 0) {
        partial_statistics(a, index)[0] = maximum[r];
        partial_statistics(a, index)[1] = total;
      }
    }
  }
}

}  // namespace m2lm::cuda
