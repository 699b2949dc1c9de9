// The kernel table of the CPU backend: plain functions by instruction-set level and weight format.
// Floor: backends. May include: core, ops.
#pragma once

#include <m2lm/backends/cpu/isa.hpp>
#include <m2lm/core/blocks.hpp>
#include <m2lm/ops/attention.hpp>
#include <m2lm/ops/linear.hpp>

#include <cstddef>
#include <cstdint>

namespace m2lm::inline M2LM_ABI::detail {

/// Outputs per panel of a packed matrix. A panel holds all inputs of 32 outputs: f32 [k][32], bf16 [k/2][32][2] (k even).
/// Keys are packed the same way (outputs = keys, inputs = head_dim), values too (outputs = head_dim, inputs = keys), so that
/// one tile kernel serves linear layers and both products of attention. The layout is the same at every level.
inline constexpr std::int64_t panel_width = 32;
/// Keys per segment of attention: the order of every sum over keys is fixed by it, and threads share out the keys of few rows by it.
inline constexpr std::int64_t key_segment = 512;

constexpr std::int64_t round_up(std::int64_t n, std::int64_t to) { return (n + to - 1) / to * to; }

/// q8 and q4: a panel is two strips of 16 outputs (of a gated matrix: one of each half), a strip is a tile per 32 inputs, so that a
/// thread reads one stream. A tile holds what one vector instruction takes, 4 inputs of each of 16 outputs, side by side:
///   q8 [8][16][4] bytes: input 4j + t of output r at [j][r][t], as value + 128
///   q4 [4][16][4] bytes: inputs 4j + t in the low half, 16 + 4j + t in the high half, as value + 8
/// and then 16 scales in f16. The bits per weight and the values are those of the blocks (core/blocks.hpp). Both products take the bytes
/// as unsigned: what the offset adds, offset · Σ inputs, is known from x alone and subtracted before (`QuantisedRows::starts`).
/// q4_128 and w8a8 are made of the same pieces of 32 inputs, [4] and [8][16][4] bytes as above, that share scales:
///   q4_128 a tile is four pieces behind each other and then 16 scales in f16
///   w8a8   a strip is all its pieces (an even number: two are 64 inputs, [16][16][4] bytes) and then 16 scales in f32
/// The packed forms are part of the format of caches on disk: who changes one counts up `packed_layout_version`.
inline constexpr std::int64_t strip_width = 16;
inline constexpr int packed_layout_version = 1;

/// What the layouts of weights as integers differ in.
struct QuantisedFormat {
  std::int64_t bits = 8;
  std::int64_t scale_inputs = 0;  ///< inputs of a weight, and of x, that share a scale; 0: all of a row
  std::int64_t chunk = 32;        ///< inputs of a row of x that lie side by side
  std::int64_t k_step = 32;       ///< k is padded to a multiple of this
  std::int64_t scale_bytes = 2;   ///< of a weight's scale

  constexpr std::int32_t offset() const { return bits == 8 ? 128 : 8; }
  /// Bytes of 32 inputs of 16 outputs, without scales.
  constexpr std::int64_t piece_bytes() const { return strip_width * 32 * bits / 8; }
  constexpr std::int64_t inputs_of_tile(std::int64_t k) const { return scale_inputs == 0 ? k : scale_inputs; }
  /// Bytes of the inputs that share scales, and of those scales, of 16 outputs. requires k padded.
  constexpr std::int64_t values_bytes(std::int64_t k) const { return inputs_of_tile(k) / 32 * piece_bytes(); }
  constexpr std::int64_t tile_bytes(std::int64_t k) const { return values_bytes(k) + strip_width * scale_bytes; }
  /// Scales of an output. A row without inputs has one all the same where it has one of its own.
  constexpr std::int64_t tiles(std::int64_t k) const { return scale_inputs == 0 ? 1 : k / scale_inputs; }
  constexpr std::int64_t strip_bytes(std::int64_t k) const { return tiles(k) * tile_bytes(k); }
};
constexpr QuantisedFormat quantised_format(DType format) {
  switch (format) {
    case DType::q4: return {.bits = 4, .scale_inputs = 32, .chunk = 32, .k_step = 32, .scale_bytes = 2};
    case DType::q4_128: return {.bits = 4, .scale_inputs = group_values, .chunk = 64, .k_step = group_values, .scale_bytes = 2};
    case DType::w8a8: return {.bits = 8, .scale_inputs = 0, .chunk = 64, .k_step = 64, .scale_bytes = 4};
    default: return {.bits = 8, .scale_inputs = 32, .chunk = 32, .k_step = 32, .scale_bytes = 2};
  }
}
/// Inputs of w8a8 at most: |Σ| <= k · 127 · 127 < 2^31 keeps its sums exact, and k · 127 < 2^24 those of a row of x in f32.
inline constexpr std::int64_t most_row_inputs = std::int64_t{1} << 17;

/// Of the formats whose tiles do not depend on k.
constexpr std::int64_t tile_values_bytes(DType format) { return quantised_format(format).values_bytes(0); }
constexpr std::int64_t tile_bytes(DType format) { return quantised_format(format).tile_bytes(0); }

/// Where byte `i` of output `lane` lies among the values of a tile: of 8 bits input i; of 4 bits inputs 32p + j and 32p + 16 + j for
/// i = 16p + j.
constexpr std::int64_t at_in_tile(std::int64_t lane, std::int64_t i) { return i / 4 * strip_width * 4 + lane * 4 + i % 4; }

/// Writes a block as output `lane` of a tile.
template <class Block>
void store_in_tile(const Block& block, std::int64_t lane, std::byte* tile) {
  if constexpr (Block::dtype == DType::q8) {
    for (std::size_t i = 0; i < block.values.size(); ++i) tile[at_in_tile(lane, static_cast<std::int64_t>(i))] = static_cast<std::byte>(block.values[i] + 128);
  } else {
    for (std::size_t i = 0; i < block.pairs.size(); ++i) tile[at_in_tile(lane, static_cast<std::int64_t>(i))] = static_cast<std::byte>(block.pairs[i]);
  }
  std::memcpy(tile + tile_values_bytes(Block::dtype) + lane * 2, &block.scale, sizeof(Half));
}

/// Output `lane` of a tile, as the block that it was.
template <class Block>
Block load_from_tile(const std::byte* tile, std::int64_t lane) {
  Block block;
  if constexpr (Block::dtype == DType::q8) {
    for (std::size_t i = 0; i < block.values.size(); ++i)
      block.values[i] = static_cast<std::int8_t>(static_cast<int>(tile[at_in_tile(lane, static_cast<std::int64_t>(i))]) - 128);
  } else {
    for (std::size_t i = 0; i < block.pairs.size(); ++i) block.pairs[i] = static_cast<std::uint8_t>(tile[at_in_tile(lane, static_cast<std::int64_t>(i))]);
  }
  std::memcpy(&block.scale, tile + tile_values_bytes(Block::dtype) + lane * 2, sizeof(Half));
  return block;
}

/// Weights [32 · piece, 32 · piece + 32) of output `lane` of a strip of any format of integers. requires k padded.
inline void dequantise_piece(DType format, const std::byte* strip, std::int64_t k, std::int64_t piece, std::int64_t lane, float* out) {
  const QuantisedFormat layout = quantised_format(format);
  const std::int64_t pieces = layout.inputs_of_tile(k) / block_values;
  const std::byte* tile = strip + piece / pieces * layout.tile_bytes(k);
  const std::byte* scale_at = tile + layout.values_bytes(k) + lane * layout.scale_bytes;
  float scale = 0;
  Half half;
  if (layout.scale_bytes == 4) {
    std::memcpy(&scale, scale_at, sizeof(scale));
  } else {
    std::memcpy(&half.bits, scale_at, sizeof(half));
    scale = to_float(half);
  }
  const std::byte* values = tile + piece % pieces * layout.piece_bytes();
  for (std::int64_t i = 0; i < block_values; ++i) {
    const auto byte = static_cast<unsigned>(values[at_in_tile(lane, layout.bits == 8 ? i : i % 16)]);
    const unsigned value = layout.bits == 8 ? byte : i < 16 ? byte & 15U : byte >> 4U;
    out[i] = scale * static_cast<float>(static_cast<int>(value) - layout.offset());
  }
}

/// Rows of x in 8 bits, in groups of `group` rows that pass by the weights together: chunk c (32 or 64 inputs) of the rows of a group lie
/// side by side, then chunk c + 1. So a tile of rows is read from one place on, at fixed distances. A block is what shares a scale: 32 or
/// 128 inputs, or the row. x[i] is about scale · value, |error| <= scale/2; start = -offset · Σ values of the block. A block with NaN or
/// infinity has scale NaN.
/// At level amx, for weights in bf16: the same places, chunks of 32, of two bytes per value: x rounded to bf16, without scales and starts.
struct QuantisedRows {
  std::int8_t* values = nullptr;   ///< [groups][chunks][group][chunk]
  float* scales = nullptr;         ///< [groups][blocks][group]
  std::int32_t* starts = nullptr;  ///< [groups][blocks][group]
  std::int64_t group = 1, blocks = 0, chunks = 0;
  std::int64_t chunk = block_values, block = block_values;  ///< inputs of each
  std::int32_t offset = 0;

  /// Index of block 0 of a row; the next one is `group` further.
  std::int64_t first_block(std::int64_t row) const { return row / group * group * blocks + row % group; }
  /// The same of chunks.
  std::int64_t first_chunk(std::int64_t row) const { return row / group * group * chunks + row % group; }
};

struct GemmJob {
  const float* x = nullptr;
  std::int64_t ldx = 0;
  /// With weights that are integers, what is read instead of x.
  QuantisedRows rows{};
  const std::byte* w = nullptr;
  std::int64_t m = 0, n = 0, k = 0;  ///< n counts rows of w; k is padded to the format's step
  std::int64_t cols = 0;             ///< k without padding
  bool gated = false;
  const float* bias = nullptr;
  Activation activation = Activation::none;
  const float* residual = nullptr;
  std::int64_t ld_residual = 0;
  float* y = nullptr;
  std::int64_t ldy = 0;
};

struct AttentionJob {
  const float* q = nullptr;
  std::int64_t ldq = 0;
  const std::byte* keys_data = nullptr;
  const std::byte* values_data = nullptr;
  std::int64_t tokens = 0, heads = 0, kv_heads = 0, head_dim = 0, capacity = 0, keys = 0, first = 0;
  AttentionMask mask{};
  Sinks sinks{};
  double scale = 1;
  float* y = nullptr;
  std::int64_t ldy = 0;
  /// Shared by the threads, zero at the start: per thread, next_stride apart, how many of its tasks are taken.
  std::int32_t* next = nullptr;
  /// Where there are too few tiles of rows for the threads, they share the keys too, in `segments`: what each made of a tile, [kv_heads ·
  /// tiles][segments], and how many of a tile are done, zero at the start. Else null.
  float* partials = nullptr;
  std::int32_t* segments_done = nullptr;
  std::int64_t segments = 0;
};
/// A cache line.
inline constexpr std::int64_t next_stride = 16;

/// The gradient of attention over one whole sequence: query t and key t stand at position t.
struct AttentionBackwardJob {
  const float* q = nullptr;
  const float* k = nullptr;
  const float* v = nullptr;
  const float* dy = nullptr;
  std::int64_t ldq = 0, ldk = 0, ldv = 0, ld_dy = 0;
  std::int64_t queries = 0, keys = 0, heads = 0, kv_heads = 0, head_dim = 0;
  AttentionMask mask{};
  float scale = 1;
  float* dq = nullptr;
  float* dk = nullptr;
  float* dv = nullptr;
  std::int64_t ld_dq = 0, ld_dk = 0, ld_dv = 0;
};

/// Query rows of a block of attention's backward pass: the order of its sums is fixed by it.
inline constexpr std::int64_t backward_rows = 64;

/// Backward passes, in f32. `n` counts the elements of a row; a `gated` row of z has 2n.
struct TrainingKernels {
  void (*activation_forward)(Activation, const float* z, bool gated, float* y, std::int64_t n) = nullptr;
  void (*activation_backward)(Activation, const float* dy, const float* z, bool gated, float* dz, std::int64_t n) = nullptr;
  void (*norm_statistics)(const float* x, std::int64_t n, float eps, bool centred, float* mean, float* inverse) = nullptr;
  void (*norm_backward)(const float* dy, const float* x, const float* weight, float mean, float inverse, bool centred, float* dx, bool accumulate,
                        std::int64_t n) = nullptr;
  void (*norm_weight_gradient)(const float* dy, std::int64_t ld_dy, const float* x, std::int64_t ldx, const float* mean, const float* inverse,
                               std::int64_t rows, std::int64_t n, float* dweight, float* dbias) = nullptr;
  void (*rope_backward)(float* x, std::int64_t heads, std::int64_t head_dim, const float* cos, const float* sin) = nullptr;
  void (*transpose_panels)(const std::byte* w, DType format, std::int64_t n, std::int64_t k, std::int64_t first, std::int64_t count, float* out) = nullptr;
  void (*copy_panel)(const float* x, std::int64_t ldx, std::int64_t rows, std::int64_t columns, std::int64_t first, float* out) = nullptr;
  void (*transpose)(const float* x, std::int64_t ldx, std::int64_t rows, std::int64_t columns, float* out, std::int64_t ldo) = nullptr;
  std::int64_t (*attention_backward_floats)(std::int64_t keys, std::int64_t head_dim) = nullptr;
  void (*attention_backward)(const AttentionBackwardJob&, std::int64_t kv_head, float* scratch) = nullptr;
  void (*softmax_statistics)(const float* logits, std::int64_t n, float* largest, double* sum) = nullptr;
  void (*scaled_softmax)(const float* logits, std::int64_t n, float largest, float scale, float* d) = nullptr;
};

struct AttentionKernels {
  std::int64_t rows = 0;  ///< (token, head of a group) pairs per tile
  void (*run)(const AttentionJob&, int part, int parts, std::byte* scratch) = nullptr;
  /// Stores one head's keys and values, rows of k and v, at positions [first, first + tokens).
  void (*append)(const float* k, std::int64_t ld_k, const float* v, std::int64_t ld_v, std::int64_t tokens, std::int64_t first, const KeyValues& kv,
                 std::int64_t head) = nullptr;
  std::size_t (*scratch)(std::int64_t head_dim) = nullptr;
  std::int64_t (*partial_floats)(std::int64_t head_dim) = nullptr;  ///< of one segment and tile
};

/// What a level does with one weight format.
struct FormatKernels {
  bool bf16_activations = false;  ///< x is rounded to bf16, and so are q and the probabilities of attention
  std::int64_t k_step = 1;        ///< inputs are padded to a multiple of this
  /// Weights that are integers, and bf16 at level amx: rounds row `row` of x, `cols` values and zeros behind them, for all threads and
  /// panels. Null where the kernels read x itself.
  void (*quantise)(const float* x, std::int64_t cols, const QuantisedRows& rows, std::int64_t row) = nullptr;
  std::int64_t row_group = 0;  ///< of QuantisedRows, where there are so many rows
  std::int64_t value_bytes = 1;  ///< of QuantisedRows; with 2 it has no scales
  void (*gemm)(const GemmJob&, int part, int parts, std::byte* scratch) = nullptr;
  std::size_t (*gemm_scratch)(std::int64_t m) = nullptr;
  AttentionKernels attention{};
};

struct KernelTable {
  IsaLevel level = IsaLevel::baseline;
  FormatKernels f32{}, bf16{}, q8{}, q4{}, q4_128{}, w8a8{};
  FormatKernels prefill_q8{}, prefill_q4{};  ///< what prefill multiplies by instead, at level amx; else empty
  bool int8_dot = false;  ///< weights that are integers are multiplied by VPDPBUSD
  void (*rms_norm)(const float* x, const float* weight, float eps, float* y, std::int64_t n) = nullptr;
  void (*layer_norm)(const float* x, const float* weight, const float* bias, float eps, float* y, std::int64_t n) = nullptr;
  void (*rope)(float* x, std::int64_t heads, std::int64_t head_dim, const float* cos, const float* sin) = nullptr;
  void (*add)(float* x, const float* addend, std::int64_t n) = nullptr;
  TrainingKernels training{};

  /// The kernels of a format of weights, or null where the CPU backend has none. Those of integers have no attention.
  const FormatKernels* format(DType dtype) const {
    if (dtype == DType::f32) return &f32;
    if (dtype == DType::bf16) return &bf16;
    if (dtype == DType::q8) return &q8;
    if (dtype == DType::q4) return &q4;
    if (dtype == DType::q4_128) return &q4_128;
    if (dtype == DType::w8a8) return &w8a8;
    return nullptr;
  }
  /// The same for products in a phase.
  const FormatKernels* format(DType dtype, Phase phase) const {
    if (phase == Phase::prefill && dtype == DType::q8 && prefill_q8.gemm) return &prefill_q8;
    if (phase == Phase::prefill && dtype == DType::q4 && prefill_q4.gemm) return &prefill_q4;
    return format(dtype);
  }
};

/// The table of a level. requires a level that this machine has. `bf16_dot`: multiply bf16 by bf16 (VDPBF16PS) where the level does;
/// `int8_dot`: multiply bytes by VPDPBUSD where level and machine have it.
const KernelTable& kernel_table(IsaLevel level, bool bf16_dot, bool int8_dot);

/// Whether a level has VPDPBUSD on this machine: avx512_bf16 and amx always, avx512 with AVX-512 VNNI, avx2 with AVX-VNNI.
bool has_int8_dot(IsaLevel level);

/// Whether to multiply bf16 by bf16 when nobody says: at level amx, whose tiles do 14 times the products of f32 FMA on one core of the Xeon
/// below; at avx512_bf16, by VDPBF16PS, on AMD, where it is expected to do twice the products of f32 FMA (not
/// measured yet), and not elsewhere: on an Intel Xeon with AMX it did half (118 against 236 GFLOP/s of one core, bench/compare).
bool fast_bf16_dot(IsaLevel level);

}  // namespace m2lm::detail
