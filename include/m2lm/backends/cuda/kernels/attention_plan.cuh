// Which attention kernel runs, and in what shape: a function of the device and of sizes. A launch is shaped for the most keys that
// there can be, so that it can be recorded once and replayed while the sequence grows.
// Floor: backends. May include: core, ops.
#pragma once

#include <m2lm/backends/cuda/runtime.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace m2lm::inline M2LM_ABI::cuda {

/// The kernel on FMA units (attention_decode.cuh): few rows share a pass over the keys; a thread scores one key of a tile. A row is a
/// query of one head; the rows of a block belong to the heads of one group.
struct AttentionRowsPolicy {
  int threads = 128;
  int most_rows = 8;    ///< 8 rows: about as many instructions to issue as an H200 needs to read the keys (counted)
  int most_keys = 128;  ///< of a tile: one per thread
  int least_keys = 16;  ///< of a tile, where head_dim is large
  int most_head_dim = 512;
  int blocks_per_multiprocessor = 2;         ///< that shared memory is to leave room for, and that keys are split for
  std::size_t preferred_shared = 80 * 1024;  ///< two blocks on a multiprocessor of sm_80 (164 KiB) and of sm_90 (228 KiB)
  std::int64_t least_keys_per_split = 128;

  M2LM_HOST_DEVICE constexpr int warps() const { return threads / 32; }
};
inline constexpr AttentionRowsPolicy attention_rows_policy{};

/// The kernel on tensor cores (attention_prefill.cuh). Sizes of heads up to `head_dim` are padded to it in shared memory.
struct AttentionTilesPolicy {
  int head_dim = 64;
  int warps = 4;
  int row_blocks = 2;  ///< blocks of 16 rows per warp: keys read from shared memory once serve 32 rows
  int keys = 64;       ///< of a tile
  int stages = 2;      ///< tiles in shared memory: one is used while the next arrives
  std::int64_t least_keys_per_split = 256;

  M2LM_HOST_DEVICE constexpr int threads() const { return 32 * warps; }
  M2LM_HOST_DEVICE constexpr int rows() const { return 16 * row_blocks * warps; }
  /// Elements between rows in shared memory. An odd number of 16-byte pieces: eight rows at one column lie in different banks.
  M2LM_HOST_DEVICE constexpr int stride() const { return head_dim + 8; }
  /// Rows of q, and stages of keys and values, of elements of 2 bytes.
  M2LM_HOST_DEVICE constexpr std::size_t shared_bytes() const {
    return static_cast<std::size_t>(rows() + 2 * stages * keys) * static_cast<std::size_t>(stride()) * 2;
  }
};
/// 32 rows of sums and of scores have to stay in 255 registers.
constexpr AttentionTilesPolicy make_attention_tiles_policy(int head_dim) { return {.head_dim = head_dim, .keys = head_dim > 96 ? 32 : 64}; }
template <int HeadDim>
inline constexpr AttentionTilesPolicy attention_tiles_policy = make_attention_tiles_policy(HeadDim);
/// The sizes that are instantiated.
inline constexpr int attention_tiles_head_dims[] = {64, 80, 96, 128};

/// The kernel on products of a warpgroup (attention_prefill_sm90.cuh): sm_90 alone.
struct AttentionWarpgroupsPolicy {
  int head_dim = 64;
  int warpgroups = 2;  ///< of 64 rows each; while one is at its softmax the tensor cores work for the other
  int keys = 128;      ///< of a tile
  int stages = 2;      ///< tiles in shared memory
  /// Of a thread that computes, and of one that copies: with 384 threads each has 168 at first, of the 65,536 of a multiprocessor.
  int registers = 232, copying_registers = 40;

  M2LM_HOST_DEVICE constexpr int warps() const { return 4 * warpgroups; }            ///< that compute
  M2LM_HOST_DEVICE constexpr int threads() const { return 128 * (warpgroups + 1); }  ///< one warp of the last warpgroup asks for the tiles
  M2LM_HOST_DEVICE constexpr int rows() const { return 64 * warpgroups; }
  /// A tile lies in boxes of 64 columns, 128 bytes wide, whose swizzle repeats every 1,024 bytes: each begins on such a border.
  M2LM_HOST_DEVICE constexpr int boxes() const { return head_dim / 64; }
  M2LM_HOST_DEVICE constexpr int box_bytes() const { return keys * 128; }
  M2LM_HOST_DEVICE constexpr int tile_bytes() const { return boxes() * box_bytes(); }
  M2LM_HOST_DEVICE constexpr std::size_t shared_bytes() const { return static_cast<std::size_t>(2 * stages * tile_bytes()) + border; }
  static constexpr std::size_t border = 1024;
};
constexpr AttentionWarpgroupsPolicy make_attention_warpgroups_policy(int head_dim) { return {.head_dim = head_dim}; }
template <int HeadDim>
inline constexpr AttentionWarpgroupsPolicy attention_warpgroups_policy = make_attention_warpgroups_policy(HeadDim);
/// The sizes that are instantiated; others are not padded to them.
inline constexpr int attention_warpgroups_head_dims[] = {64, 128};

/// Sizes of one call.
struct AttentionSizes {
  std::int64_t tokens = 1, heads = 1, kv_heads = 1, head_dim = 1, most_keys = 1;
  std::int64_t window = 0;  ///< keys of a window, or 0
  std::size_t element_bytes = 2;
  bool vectors = true;  ///< q, y, keys and values can be read in pieces of 16 bytes, and the scale is above 0

  constexpr std::int64_t group() const { return heads / kv_heads; }
  constexpr std::int64_t rows() const { return tokens * group(); }  ///< per key/value head
};

/// What is launched: row_tiles × kv_heads × splits blocks and, if the keys are split, a second kernel that combines.
struct AttentionPlan {
  int tiles_head_dim = 0;  ///< the instance of the tensor core kernel, or 0: the kernel on FMA units
  int rows = 1;            ///< of a block
  int key_tile = 1;
  std::int64_t row_tiles = 1, splits = 1;
  std::int64_t keys_per_split = 1;  ///< a multiple of key_tile
  std::int64_t most_splits = 1;     ///< for any window
  std::size_t shared_bytes = 0;
};

namespace detail {

constexpr std::int64_t divided_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

/// Sets splits: as many as fill the device, each of `least` keys or more.
constexpr void split_keys(AttentionPlan& plan, const AttentionSizes& sizes, std::int64_t wanted, std::int64_t least) {
  // A window shows its own keys, those of the later queries of a tile, and a tile's rest.
  const std::int64_t seen =
      sizes.window > 0 ? std::min(sizes.most_keys, sizes.window + divided_up(plan.rows, sizes.group()) + plan.key_tile) : sizes.most_keys;
  wanted = std::max<std::int64_t>(1, wanted);
  plan.keys_per_split = std::max<std::int64_t>(1, divided_up(std::max(least, divided_up(seen, wanted)), plan.key_tile)) * plan.key_tile;
  plan.splits = std::max<std::int64_t>(1, divided_up(seen, plan.keys_per_split));
  plan.most_splits = std::min(wanted, std::max<std::int64_t>(1, divided_up(sizes.most_keys, divided_up(least, plan.key_tile) * plan.key_tile)));
}

}  // namespace detail

/// Elements of a row of keys in the kernel on FMA units: whole pieces of 16 bytes, an odd number of them (see stride() above).
constexpr int attention_rows_stride(int head_dim, std::size_t element_bytes) {
  const int piece = static_cast<int>(16 / element_bytes);
  return (((head_dim + piece - 1) / piece) | 1) * piece;
}

/// Shared memory of the kernel on FMA units: tiles of keys and values (which later hold sums of the threads), scaled q, probabilities.
constexpr std::size_t attention_rows_shared(int rows, int key_tile, int head_dim, std::size_t element_bytes) {
  const std::size_t piece = 16 / element_bytes, threads = static_cast<std::size_t>(attention_rows_policy.threads);
  const std::size_t width = (static_cast<std::size_t>(head_dim) + piece - 1) / piece * piece;
  const std::size_t tiles =
      2 * static_cast<std::size_t>(key_tile) * static_cast<std::size_t>(attention_rows_stride(head_dim, element_bytes)) * element_bytes;
  const std::size_t sums = threads * static_cast<std::size_t>(rows) * piece * sizeof(float);
  return std::max(tiles, sums) + static_cast<std::size_t>(rows) * (width + static_cast<std::size_t>(key_tile)) * sizeof(float);
}

/// Chooses. requires heads a multiple of kv_heads, head_dim at most attention_rows_policy.most_head_dim.
constexpr AttentionPlan plan_attention(int multiprocessors, std::size_t shared_limit, const AttentionSizes& sizes) {
  AttentionPlan plan;
  const std::int64_t rows = sizes.rows();
  const AttentionRowsPolicy& few = attention_rows_policy;
  if (sizes.element_bytes == 2 && sizes.vectors && rows > few.most_rows)
    for (const int head_dim : attention_tiles_head_dims) {
      const AttentionTilesPolicy policy = make_attention_tiles_policy(head_dim);
      if (plan.tiles_head_dim != 0 || sizes.head_dim > head_dim || policy.shared_bytes() > shared_limit) continue;
      plan.tiles_head_dim = head_dim;
      plan.rows = policy.rows();
      plan.key_tile = policy.keys;
      plan.shared_bytes = policy.shared_bytes();
      plan.row_tiles = detail::divided_up(rows, plan.rows);
      // Only a grid that leaves multiprocessors without work is split: partial sums cost writes.
      detail::split_keys(plan, sizes, multiprocessors / (plan.row_tiles * sizes.kv_heads), policy.least_keys_per_split);
    }
  if (plan.tiles_head_dim != 0) return plan;
  while (plan.rows < few.most_rows && plan.rows < rows) plan.rows *= 2;
  const int head_dim = static_cast<int>(sizes.head_dim);
  plan.key_tile = few.most_keys;
  while (plan.key_tile > few.least_keys &&
         attention_rows_shared(plan.rows, plan.key_tile, head_dim, sizes.element_bytes) > std::min(shared_limit, few.preferred_shared))
    plan.key_tile /= 2;
  plan.shared_bytes = attention_rows_shared(plan.rows, plan.key_tile, head_dim, sizes.element_bytes);
  plan.row_tiles = detail::divided_up(rows, plan.rows);
  detail::split_keys(plan, sizes, detail::divided_up(few.blocks_per_multiprocessor * multiprocessors, plan.row_tiles * sizes.kv_heads),
                     few.least_keys_per_split);
  return plan;
}

/// The instance of the kernel on products of a warpgroup that can take over from `plan`, or 0: whole tiles of rows, keys that are not split, and a
/// device of compute capability 9.0. Whether the program has an image for that device is asked where the kernels are (has_body).
constexpr int warpgroups_head_dim(int compute_capability, std::size_t shared_limit, const AttentionSizes& sizes, const AttentionPlan& plan) {
  if (compute_capability != 90 || plan.tiles_head_dim == 0 || plan.splits != 1) return 0;
  for (const int head_dim : attention_warpgroups_head_dims) {
    const AttentionWarpgroupsPolicy policy = make_attention_warpgroups_policy(head_dim);
    if (sizes.head_dim == head_dim && sizes.rows() >= policy.rows() && policy.shared_bytes() <= shared_limit) return head_dim;
  }
  return 0;
}

/// f32 numbers that are kept between the two kernels, whatever the window and the alignment: per row and split head_dim sums, the
/// largest score and the sum of the exponentials.
constexpr std::int64_t attention_partial_floats(int multiprocessors, std::size_t shared_limit, AttentionSizes sizes) {
  std::int64_t splits = 1;
  for (const bool vectors : {false, true}) {
    sizes.vectors = vectors;
    splits = std::max(splits, plan_attention(multiprocessors, shared_limit, sizes).most_splits);
  }
  return splits == 1 ? 0 : sizes.tokens * sizes.heads * splits * (sizes.head_dim + 2);
}

}  // namespace m2lm::cuda
