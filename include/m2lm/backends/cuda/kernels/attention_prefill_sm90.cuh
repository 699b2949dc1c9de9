// Attention of many queries by products of a warpgroup (wgmma) and copies of whole tiles (TMA): sm_90 alone.
// The softmax is that of attention_prefill.cuh; that scores of the next tile are computed beside the sums of this one, and that one warp does
// nothing but ask for tiles, are ideas of FlashAttention-3 (arXiv 2407.08608).
// Floor: backends. May include: core, ops.
#pragma once

#include <m2lm/backends/cuda/device_sm90.cuh>
#include <m2lm/backends/cuda/kernels/attention_common.cuh>
#include <m2lm/backends/cuda/kernels/attention_plan.cuh>

namespace m2lm::inline M2LM_ABI::cuda {

/// Barriers of a stage: its tile is there; all warps are done with it.
struct TileBarriers {
  Barrier full, empty;
};

/// Blocks: [tiles of rows] × [key/value heads]. Shared memory: per stage a tile of keys, then per stage a tile of values.
///
/// Tiles come as tensors and not row by row: only those copies swizzle, and an unswizzled tile would have to be cut into pieces of 16 bytes. What
/// a tensor's copy brings is all that lies in the cache, also keys that no row sees. Their scores are replaced, whatever they are; their
/// values meet probabilities of 0, and 0·NaN is NaN, so in the (first and last) tiles that have such values the copying warp overwrites them
/// with zeros before it hands the tile over.
///
/// q stays in registers as the left operand of all products with keys, scores become the left operand of the products with values where they are.
/// requires heads of HeadDim elements and a scale above 0, and keys that are not split.
template <class E, int HeadDim>
M2LM_KERNEL void M2LM_LAUNCH_BOUNDS(attention_warpgroups_policy<HeadDim>.threads(), 1)
    attention_warpgroups([[maybe_unused]] AttentionArguments<E> a, [[maybe_unused]] M2LM_GRID_CONSTANT TensorMap key_map,
                         [[maybe_unused]] M2LM_GRID_CONSTANT TensorMap value_map) {
#if defined(M2LM_HAS_WARPGROUPS)
  constexpr AttentionWarpgroupsPolicy policy = attention_warpgroups_policy<HeadDim>;
  constexpr int key_tile = policy.keys, stages = policy.stages, boxes = policy.boxes(), box_bytes = policy.box_bytes(),
                tile_bytes = policy.tile_bytes(), warps = policy.warps(), dim_steps = HeadDim / 16, key_steps = key_tile / 16;
  M2LM_SHARED TileBarriers of_keys[stages], of_values[stages];
  M2LM_SHARED Barrier uncut;  // values have arrived, and some of them are to become zeros
  std::byte* const unaligned = dynamic_shared<std::byte>();
  std::byte* const tiles = unaligned + (policy.border - reinterpret_cast<std::uintptr_t>(unaligned) % policy.border) % policy.border;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int first = first_position(a);
  const BlockWork work = block_work(a, first, policy.rows(), key_tile);
  const int tile_count = work.span.end > work.tile_begin ? (work.span.end - work.tile_begin + key_tile - 1) / key_tile : 0;
  const auto keys_of = [&](int i) { return tiles + i % stages * tile_bytes; };
  const auto values_of = [&](int i) { return tiles + (stages + i % stages) * tile_bytes; };
  // The parity of the phase in which tile i arrives at its stage; the stage was left in the phase before.
  const auto parity_of = [](int i) { return static_cast<unsigned>(i / stages % 2); };

  if (thread == 0) {
    M2LM_UNROLL
    for (int stage = 0; stage < stages; ++stage) {
      barrier_init(&of_keys[stage].full, 1);
      barrier_init(&of_keys[stage].empty, warps);
      barrier_init(&of_values[stage].full, 1);
      barrier_init(&of_values[stage].empty, warps);
    }
    barrier_init(&uncut, 1);
    fence_barrier_init();
  }
  __syncthreads();

  if (warp >= warps) {
    release_registers<policy.copying_registers>();
    if (warp > warps) return;
    const auto ask_for = [&](std::byte* to, const TensorMap& map, int tile, Barrier* barrier) {
      if (lane != 0) return;
      barrier_arrive_expect(barrier, tile_bytes);
      M2LM_UNROLL
      for (int b = 0; b < boxes; ++b) copy_box(to + b * box_bytes, map, 64 * b, tile, work.kv_head, barrier);
    };
    unsigned cuts = 0;
    for (int i = 0; i < tile_count; ++i) {
      const int tile = work.tile_begin + i * key_tile;
      __syncwarp();  // lane 0 asks: no other lane may wait for a phase that has come round again
      barrier_wait(&of_keys[i % stages].empty, parity_of(i) ^ 1U);
      ask_for(keys_of(i), key_map, tile, &of_keys[i % stages].full);
      barrier_wait(&of_values[i % stages].empty, parity_of(i) ^ 1U);
      if (tile >= work.span.begin && tile + key_tile <= work.span.end) {
        ask_for(values_of(i), value_map, tile, &of_values[i % stages].full);
        continue;
      }
      ask_for(values_of(i), value_map, tile, &uncut);
      barrier_wait(&uncut, cuts++ % 2);
      for (int key = lane / 8; key < key_tile; key += 4) {
        if (tile + key >= work.span.begin && tile + key < work.span.end) continue;
        M2LM_UNROLL
        for (int b = 0; b < boxes; ++b) store16(values_of(i) + b * box_bytes + key * 128 + lane % 8 * 16, Bytes16{});  // swizzled or not
      }
      fence_proxy_async();
      __syncwarp();
      if (lane == 0) barrier_arrive(&of_values[i % stages].full);
    }
    return;
  }
  claim_registers<policy.registers>();

  // Fragments (PTX ISA, wgmma.m64nNk16): of the 16 rows of its warp a lane has rows lane / 4 and 8 later, columns 2·(lane % 4) and the next of
  // each 8.
  const int warp_first = work.row + 16 * warp, column = lane % 4 * 2;
  std::uint32_t q[dim_steps][4];
  M2LM_UNROLL
  for (int step = 0; step < dim_steps; ++step) {
    M2LM_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int row = warp_first + lane / 4 + i % 2 * 8;
      std::uint32_t pair[1] = {0};
      if (row < work.row_end) load_words(a.q + row_offset(a, a.q_stride, work.kv_head, row) + 16 * step + i / 2 * 8 + column, pair);
      q[step][i] = pair[0];
    }
  }
  float score[key_tile / 2] = {}, out[HeadDim / 2] = {}, maximum[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0}, factor[2];
  std::uint32_t p[key_steps][4];
  const int warp_last = warp_first + 15 < work.row_end - 1 ? warp_first + 15 : work.row_end - 1;
  const KeySpan of_first = visible_keys(a, first, warp_first), of_last = visible_keys(a, first, warp_last);
  const KeySpan all{of_last.begin > work.span.begin ? of_last.begin : work.span.begin, of_first.end < work.span.end ? of_first.end : work.span.end};

  const auto begin_scores = [&](int i) {
    barrier_wait(&of_keys[i % stages].full, parity_of(i));
    wgmma_fence();
    M2LM_UNROLL
    for (int step = 0; step < dim_steps; ++step)
      wgmma<E, key_tile, false>(score, q[step], tile_descriptor(keys_of(i) + step / 4 * box_bytes + step % 4 * 32, box_bytes), step > 0);
    wgmma_commit();
  };
  const auto begin_sums = [&](int i) {
    barrier_wait(&of_values[i % stages].full, parity_of(i));
    wgmma_fence();
    M2LM_UNROLL
    for (int step = 0; step < key_steps; ++step) wgmma<E, HeadDim, true>(out, p[step], tile_descriptor(values_of(i) + step * 2048, box_bytes), true);
    wgmma_commit();
  };
  const auto leave = [&](Barrier* empty) {
    if (lane == 0) barrier_arrive(empty);
  };
  // Scores become probabilities; `factor` is what earlier sums are to be multiplied by.
  const auto weigh_scores = [&](int i) {
    const int tile = work.tile_begin + i * key_tile;
    if (tile < all.begin || tile + key_tile > all.end) {  // some row does not see some key of the tile
      M2LM_UNROLL
      for (int half = 0; half < 2; ++half) {
        const KeySpan seen = visible_keys(a, first, warp_first + lane / 4 + 8 * half);
        const int begin = (seen.begin > work.span.begin ? seen.begin : work.span.begin) - tile - column;
        const int end = (seen.end < work.span.end ? seen.end : work.span.end) - tile - column;
        M2LM_UNROLL
        for (int n = 0; n < key_tile / 8; ++n) {
          M2LM_UNROLL
          for (int j = 0; j < 2; ++j) {
            float& s = score[4 * n + 2 * half + j];
            s = 8 * n + j >= begin && 8 * n + j < end ? s : -INFINITY;
          }
        }
      }
    }
    M2LM_UNROLL
    for (int half = 0; half < 2; ++half) {
      float largest = -INFINITY;
      M2LM_UNROLL
      for (int n = 0; n < key_tile / 8; ++n) largest = fmaxf(largest, fmaxf(score[4 * n + 2 * half], score[4 * n + 2 * half + 1]));
      largest = fmaxf(largest, shuffle_xor(largest, 1));  // the four lanes that share a row
      largest = fmaxf(largest, shuffle_xor(largest, 2));
      largest = fmaxf(maximum[half], largest * a.scale_log2);
      const float base = -finite_maximum(largest);
      factor[half] = exp2_approx(maximum[half] + base);
      maximum[half] = largest;
      float added = 0;
      M2LM_UNROLL
      for (int n = 0; n < key_tile / 8; ++n) {
        M2LM_UNROLL
        for (int j = 0; j < 2; ++j) {
          float& s = score[4 * n + 2 * half + j];
          s = exp2_approx(fmaf(s, a.scale_log2, base));
          added += s;
        }
      }
      sum[half] = sum[half] * factor[half] + added;  // this lane's columns only, until the end
    }
  };
  const auto pack_probabilities = [&] {
    M2LM_UNROLL
    for (int n = 0; n < key_tile / 8; ++n) {
      M2LM_UNROLL
      for (int half = 0; half < 2; ++half) p[n / 2][2 * (n % 2) + half] = pack<E>(score[4 * n + 2 * half], score[4 * n + 2 * half + 1]);
    }
  };

  if (tile_count > 0) {
    begin_scores(0);
    wgmma_wait<0>();
    hold(score);
    leave(&of_keys[0].empty);
    weigh_scores(0);
    pack_probabilities();
    for (int i = 0; i + 1 < tile_count; ++i) {
      begin_scores(i + 1);
      begin_sums(i);
      wgmma_wait<1>();
      hold(score);
      leave(&of_keys[(i + 1) % stages].empty);
      weigh_scores(i + 1);  // beside the products with values
      wgmma_wait<0>();
      hold(out);
      hold(p);
      leave(&of_values[i % stages].empty);
      M2LM_UNROLL
      for (int c = 0; c < HeadDim / 2; ++c) out[c] *= factor[c / 2 % 2];
      pack_probabilities();
    }
    begin_sums(tile_count - 1);
    wgmma_wait<0>();
    hold(out);
    hold(p);
  }

  M2LM_UNROLL
  for (int half = 0; half < 2; ++half) {
    float total = sum[half];
    total += shuffle_xor(total, 1);
    total += shuffle_xor(total, 2);
    const float base = finite_maximum(a.zero_logit != 0 ? fmaxf(maximum[half], 0.0F) : maximum[half]);
    const float of_sums = exp2_approx(maximum[half] - base);
    const float to_y = of_sums / (a.zero_logit != 0 ? total * of_sums + exp2_approx(-base) : total);
    const int row = warp_first + lane / 4 + 8 * half;
    if (row >= work.row_end) continue;
    E* const y = a.y + row_offset(a, a.y_stride, work.kv_head, row) + column;
    M2LM_UNROLL
    for (int n = 0; n < HeadDim / 8; ++n) {
      const float pair[2] = {out[4 * n + 2 * half] * to_y, out[4 * n + 2 * half + 1] * to_y};
      store_vector(y + 8 * n, pair);
    }
  }
#endif
}

}  // namespace m2lm::cuda
