// Products with weights of 8 and 4 bits, on tensor cores whatever the number of rows.
// Floor: backends. May include: core, ops.
#pragma once

#include <m2lm/backends/cuda/kernels/epilogue.cuh>
#include <m2lm/backends/cuda/quantised_layout.hpp>

namespace m2lm::inline M2LM_ABI::cuda {

// How exact this is. The integers q of a block are exact in f16 and bf16, x is as it is, products and sums are f32, and the sum of a block
// is multiplied by its scale in f32. So nothing is rounded that would not be in a product with the dequantised weights in f32: neither is x
// brought to 8 bits (as dp4a would want) nor the weight scale·q to 8 or 11 significant bits. It is also the quickest way here: making a
// pair of operands from 4 bits takes three instructions, and an mma does the work of 64 FMA per lane for up to 8 rows of x.

/// What a lane holds of a tile of 16 rows × 64 columns (see QuantisedLayout): 32 weights, of which pair<E>(b, h, p) is columns 2p and
/// 2p + 1 of its eight in block b of row g + 8h, as the two integers in E.
struct Q4Tile {
  static constexpr int words = 4, bytes = 512;
  std::uint32_t word[words];

  M2LM_DEVICE void read(const std::byte* tile, int lane) {
    const Bytes16 piece = load16_streaming(tile + lane * 16);
    M2LM_UNROLL
    for (int i = 0; i < 4; ++i) word[i] = piece.words[i];
  }
  template <class E>
  M2LM_DEVICE std::uint32_t pair(int b, int h, int p) const {
    // The bits of q under those of a power of two, 2^7 in bf16 and 2^10 in f16, make that power + q.
    const std::uint32_t q = word[2 * b + h] >> (4 * p);
    if constexpr (std::is_same_v<E, Bf16>)
      return subtract_pairs<E>(and_or(q, 0x000f000fU, 0x43004300U), 0x43084308U);  // 128 + q - 136
    else
      return subtract_pairs<E>(and_or(q, 0x000f000fU, 0x64006400U), 0x64086408U);  // 1024 + q - 1032
  }
};

struct Q8Tile {
  static constexpr int words = 8, bytes = 1024;
  std::uint32_t word[words];

  M2LM_DEVICE void read(const std::byte* tile, int lane) {
    M2LM_UNROLL
    for (int b = 0; b < 2; ++b) {
      const Bytes16 piece = load16_streaming(tile + b * 512 + lane * 16);
      M2LM_UNROLL
      for (int i = 0; i < 4; ++i) word[4 * b + i] = piece.words[i];
    }
  }
  template <class E>
  M2LM_DEVICE std::uint32_t pair(int b, int h, int p) const {
    const std::uint32_t four = word[4 * b + 2 * h + p / 2], selector = p % 2 == 0 ? 0x4140U : 0x4342U;
    if constexpr (std::is_same_v<E, Bf16>) {
      // A bf16 has room for seven of the eight bits: 128 + those, minus 128 where the eighth is set, minus 256 where it is not.
      const std::uint32_t values = permute_bytes(four, 0, selector);
      return subtract_pairs<E>(and_or(values, 0x007f007fU, 0x43004300U), and_xor(values, 0x00800080U, 0x43804380U));
    } else {
      return subtract_pairs<E>(permute_bytes(four, 0x64U, selector), 0x64806480U);  // 1024 + value - 1152
    }
  }
};

/// The tiles of a matrix, as a kernel walks over them.
struct QuantisedWeight {
  static constexpr int scale_bytes = 64;  // of a tile

  const std::byte* data;
  std::int64_t row_tile_bytes, scales_at;
  int row_tiles, column_tiles;

  /// Row tile i; the last one for those that are too many, which are computed and not stored.
  M2LM_DEVICE const std::byte* row_tile(int i) const { return data + (i < row_tiles ? i : row_tiles - 1) * row_tile_bytes; }
};

/// A tile in registers, with the scales of the lane's rows g and g + 8: of block 0 in the first word, of block 1 in the second.
template <class Tile>
struct ScaledTile {
  Tile values;
  std::uint32_t scales[2];

  M2LM_DEVICE void read(const std::byte* tile_values, const std::byte* tile_scales, int lane) {
    values.read(tile_values, lane);
    load_words(tile_scales + lane / 4 * 8, scales);
  }
};

/// What eight inputs of E become as operands: themselves; a float three bf16 whose sum it is, so that its product with an integer is
/// three products, each exact.
template <class E>
struct Operand {
  using Element = E;
  static constexpr int terms = 1, words = 4;  // words: of eight inputs as they lie in memory

  M2LM_DEVICE static void make(const std::uint32_t (&raw)[words], std::uint32_t (&out)[terms][4]) {
    M2LM_UNROLL
    for (int i = 0; i < 4; ++i) out[0][i] = raw[i];
  }
};
template <>
struct Operand<float> {
  using Element = Bf16;
  static constexpr int terms = 3, words = 8;

  M2LM_DEVICE static void make(const std::uint32_t (&raw)[words], std::uint32_t (&out)[terms][4]) {
    float rest[8];
    M2LM_UNROLL
    for (int i = 0; i < 8; ++i) rest[i] = float_of_bits(raw[i]);
    M2LM_UNROLL
    for (int term = 0; term < terms; ++term) {
      M2LM_UNROLL
      for (int i = 0; i < 4; ++i) out[term][i] = upper_half(rest[2 * i]) >> 16 | upper_half(rest[2 * i + 1]);
    }
  }

 private:
  /// The upper 16 bits, which are a bf16; `rest` keeps what they leave: 24 significant bits are gone after three times.
  M2LM_DEVICE static std::uint32_t upper_half(float& rest) {
    const std::uint32_t bits = bits_of_float(rest) & 0xffff0000U;
    const float upper = float_of_bits(bits);
    rest = rest == upper ? 0.0F : rest - upper;  // not inf - inf
    return bits;
  }
};

/// Eight inputs from `from` on, as they lie in memory; zeros for those behind the first `left`. Pieces: they can be read 16 bytes at a
/// time (in_pieces, and `left` is a multiple of a piece).
template <bool Pieces, class E>
M2LM_DEVICE void load_inputs(const E* from, int left, std::uint32_t (&out)[Operand<E>::words]) {
  constexpr int in_16_bytes = 16 / static_cast<int>(sizeof(E));
  M2LM_UNROLL
  for (int i = 0; i < Operand<E>::words / 4; ++i) {
    Bytes16 piece{};
    if constexpr (Pieces) {
      if (i * in_16_bytes < left) piece = load16(from + i * in_16_bytes);
    } else {
      M2LM_UNROLL
      for (int j = 0; j < in_16_bytes; ++j) {
        if (i * in_16_bytes + j >= left) break;
        if constexpr (std::is_same_v<E, float>)
          piece.words[j] = bits_of_float(from[i * in_16_bytes + j]);
        else
          piece.words[j / 2] |= static_cast<std::uint32_t>(from[i * in_16_bytes + j].bits) << (j % 2 * 16);
      }
    }
    M2LM_UNROLL
    for (int j = 0; j < 4; ++j) out[4 * i + j] = piece.words[j];
  }
}

/// Operands of one block of 32 columns: of rows g and g + 8, columns 8t … 8t + 3 in [0], 8t + 4 … 8t + 7 in [1].
struct BlockOperand {
  std::uint32_t a[2][4];
  float scale, scale_of_second;

  template <class E, class Tile>
  M2LM_DEVICE void make(const ScaledTile<Tile>& tile, int b) {
    M2LM_UNROLL
    for (int step = 0; step < 2; ++step) {
      M2LM_UNROLL
      for (int i = 0; i < 4; ++i) a[step][i] = tile.values.template pair<E>(b, i % 2, 2 * step + i / 2);
    }
    unpack<Half>(tile.scales[b], scale, scale_of_second);
  }

  /// sum [16 rows of w, 8 rows of x] += scale · Σ over the block.
  template <class E>
  M2LM_DEVICE void multiply_add(const std::uint32_t (&x)[Operand<E>::terms][4], float (&sum)[4]) const {
    float of_block[4] = {};
    M2LM_UNROLL
    for (int term = 0; term < Operand<E>::terms; ++term) {
      M2LM_UNROLL
      for (int step = 0; step < 2; ++step) mma_16x8x16<typename Operand<E>::Element>(of_block, a[step], {x[term][2 * step], x[term][2 * step + 1]});
    }
    sum[0] += scale * of_block[0];
    sum[1] += scale * of_block[1];
    sum[2] += scale_of_second * of_block[2];
    sum[3] += scale_of_second * of_block[3];
  }
};

/// Stores one column of a lane's part of sums [16, 8]: the sums of rows g and g + 8 of a row tile for one row of x.
template <class E>
M2LM_DEVICE void finish_pair(const FusedEpilogue<E>& epilogue, std::int64_t row_tile, int g, std::int64_t token, float of_g, float of_g_8) {
  if (epilogue.gated) {
    if (row_tile * 8 + g < epilogue.outputs) epilogue.finish(token, row_tile * 8 + g, of_g, of_g_8);
  } else {
    if (row_tile * 16 + g < epilogue.outputs) epilogue.finish(token, row_tile * 16 + g, of_g, 0.0F);
    if (row_tile * 16 + g + 8 < epilogue.outputs) epilogue.finish(token, row_tile * 16 + g + 8, of_g_8, 0.0F);
  }
}

// ---- few rows: bound by reading the weights ----------------------------------------------------------------------------------

struct FewRowsPolicy {
  int warps = 8;         ///< of a block; they share the columns, tile by tile in turn
  int words_ahead = 16;  ///< of weights that a lane has asked for before it uses the first: 2 KB per warp
  int most_tokens = 32;
};
inline constexpr FewRowsPolicy few_rows_policy{};

/// Blocks that a multiprocessor is to have at once. Left to itself, ptxas 13.0 saves registers for more by moving the loads of a batch
/// behind its first products.
template <class E, int RowTiles, int TokenTiles>
inline constexpr int few_rows_blocks = RowTiles* TokenTiles* Operand<E>::terms <= 4 ? 2 : 1;

/// y = epilogue(x·wᵀ) for up to 8·TokenTiles rows of x. A block has RowTiles row tiles, and its warps the column tiles in turn: warp i has
/// tiles i, i + 8, …. Weights go from global memory to the operands of mma without a stop in shared memory; x comes from the L1 cache.
/// At the end the warps' sums are added in their order.
template <class E, class Tile, int RowTiles, int TokenTiles, bool Pieces>
M2LM_KERNEL void M2LM_LAUNCH_BOUNDS(few_rows_policy.warps * 32, few_rows_blocks<E, RowTiles, TokenTiles>)
    linear_quantised_few_rows(QuantisedWeight w, const E* __restrict__ x, std::int64_t ldx, int tokens, int columns, FusedEpilogue<E> epilogue) {
  constexpr int warps = few_rows_policy.warps, ahead = few_rows_policy.words_ahead / (Tile::words * RowTiles), fragments = RowTiles * TokenTiles;
  static_assert(ahead >= 1);
  M2LM_SHARED float partial[warps][fragments * 4][32];
  const int warp = static_cast<int>(warp_index()), lane = static_cast<int>(lane_index()), g = lane / 4, t = lane % 4;
  const int first_row_tile = static_cast<int>(blockIdx.x) * RowTiles;

  // Where the warp's next tile begins; the tiles of a batch are at constant distances from it.
  const std::byte* values[RowTiles];
  const std::byte* scales[RowTiles];
  const E* inputs[TokenTiles];
  M2LM_UNROLL
  for (int r = 0; r < RowTiles; ++r) {
    values[r] = w.row_tile(first_row_tile + r) + warp * Tile::bytes;
    scales[r] = w.row_tile(first_row_tile + r) + w.scales_at + warp * QuantisedWeight::scale_bytes;
  }
  M2LM_UNROLL
  for (int i = 0; i < TokenTiles; ++i)
    inputs[i] = x + (8 * i + g < tokens ? 8 * i + g : tokens - 1) * ldx + warp * 64 + t * 8;  // columns of mma are apart

  float sum[RowTiles][TokenTiles][4] = {};
  // Column tiles begin, begin + 8, …; `whole`: all of their columns are there, so that nothing has to be asked between the loads.
  const auto batch = [&](int begin, auto whole) {
    ScaledTile<Tile> tile[ahead][RowTiles];
    M2LM_UNROLL
    for (int a = 0; a < ahead; ++a) {
      M2LM_UNROLL
      for (int r = 0; r < RowTiles; ++r)
        if (whole.value || begin + a * warps < w.column_tiles)
          tile[a][r].read(values[r] + a * (warps * Tile::bytes), scales[r] + a * (warps * QuantisedWeight::scale_bytes), lane);
    }
    M2LM_UNROLL
    for (int a = 0; a < ahead; ++a) {
      const int column_tile = begin + a * warps;
      if (!whole.value && column_tile >= w.column_tiles) break;
      M2LM_UNROLL
      for (int b = 0; b < 2; ++b) {
        BlockOperand weight[RowTiles];
        M2LM_UNROLL
        for (int r = 0; r < RowTiles; ++r) weight[r].template make<typename Operand<E>::Element>(tile[a][r], b);
        M2LM_UNROLL
        for (int i = 0; i < TokenTiles; ++i) {
          std::uint32_t raw[Operand<E>::words], input[Operand<E>::terms][4];
          load_inputs<Pieces>(inputs[i] + a * (warps * 64) + b * 32, whole.value ? 8 : columns - (column_tile * 64 + b * 32 + t * 8), raw);
          Operand<E>::make(raw, input);
          M2LM_UNROLL
          for (int r = 0; r < RowTiles; ++r) weight[r].template multiply_add<E>(input, sum[r][i]);
        }
      }
    }
    M2LM_UNROLL
    for (int r = 0; r < RowTiles; ++r) {
      values[r] += ahead * warps * Tile::bytes;
      scales[r] += ahead * warps * QuantisedWeight::scale_bytes;
    }
    M2LM_UNROLL
    for (int i = 0; i < TokenTiles; ++i) inputs[i] += ahead * warps * 64;
  };
  int begin = warp;
  for (; begin + (ahead - 1) * warps < columns / 64; begin += warps * ahead) batch(begin, std::true_type{});
  for (; begin < w.column_tiles; begin += warps * ahead) batch(begin, std::false_type{});

  M2LM_UNROLL
  for (int f = 0; f < fragments; ++f) {
    M2LM_UNROLL
    for (int i = 0; i < 4; ++i) partial[warp][f * 4 + i][lane] = sum[f / TokenTiles][f % TokenTiles][i];
  }
  __syncthreads();
  // A thread takes rows g and g + 8 of one column of one fragment.
  for (int item = static_cast<int>(thread_index()); item < fragments * 64; item += warps * 32) {
    const int of_lane = item % 32, column = item / 32 % 2, fragment = item / 64, token = fragment % TokenTiles * 8 + of_lane % 4 * 2 + column;
    if (token >= tokens) continue;
    float first = 0, second = 0;
    for (int from = 0; from < warps; ++from) {
      first += partial[from][fragment * 4 + column][of_lane];
      second += partial[from][fragment * 4 + 2 + column][of_lane];
    }
    finish_pair(epilogue, first_row_tile + fragment / TokenTiles, of_lane / 4, token, first, second);
  }
}

// ---- many rows: bound by the tensor cores ------------------------------------------------------------------------------------

/// How the block of a product is made up: row_warps × token_warps warps, each with row_tiles of 16 rows of w and token_tiles of 8 rows of
/// x; `stages` tiles of x are in shared memory, all but one of them on their way.
struct ProductBlock {
  int row_warps, token_warps, row_tiles, token_tiles, stages;

  constexpr int threads() const { return row_warps * token_warps * 32; }
  constexpr int block_row_tiles() const { return row_warps * row_tiles; }
  constexpr int tokens() const { return token_warps * token_tiles * 8; }
  constexpr std::size_t stage_bytes(std::size_t element_bytes) const {
    return static_cast<std::size_t>(tokens()) * QuantisedLayout::tile_columns * element_bytes;
  }
  constexpr std::size_t shared_bytes(std::size_t element_bytes) const { return stage_bytes(element_bytes) * static_cast<std::size_t>(stages); }
};
/// A ProductBlock as a type, for a kernel: with what its functions say as constants, since device code cannot call them.
template <ProductBlock Shape>
struct ProductBlockOf {
  static constexpr ProductBlock shape = Shape;
  static constexpr int tokens = Shape.tokens(), threads = Shape.threads(), row_tiles = Shape.block_row_tiles();
};
/// 128 outputs × 128 rows of x; each warp 32 × 64, so that per k = 16 it reads 2 KB of x from shared memory for 16 mma.
using LargeBlock = ProductBlockOf<ProductBlock{.row_warps = 4, .token_warps = 2, .row_tiles = 2, .token_tiles = 8, .stages = 3}>;
/// 64 × 64, where large blocks would leave multiprocessors without work.
using SmallBlock = ProductBlockOf<ProductBlock{.row_warps = 2, .token_warps = 2, .row_tiles = 2, .token_tiles = 4, .stages = 4}>;

constexpr std::int64_t product_blocks(const ProductBlock& shape, std::int64_t tokens, std::int64_t row_tiles) {
  return ((tokens + shape.tokens() - 1) / shape.tokens()) * ((row_tiles + shape.block_row_tiles() - 1) / shape.block_row_tiles());
}
constexpr bool wants_large_blocks(std::int64_t tokens, std::int64_t row_tiles, int multiprocessors) {
  return product_blocks(LargeBlock::shape, tokens, row_tiles) >= multiprocessors;
}

/// Where 16 bytes of a row of x lie in its tile: moved so that the 8 lanes which are served together (two rows, four pieces each) meet
/// all 32 banks. Of 16-bit elements a lane reads one piece of 8 in a row, of float two of 16.
template <class E>
M2LM_HOST_DEVICE constexpr int piece_at(int row, int piece) {
  return piece ^ (sizeof(E) == 4 ? row & 1 : (row & 1) << 2);
}

/// y = epilogue(x·wᵀ). Tiles of x, [tokens, 64], come into shared memory `stages - 1` ahead of their use (cp.async); every warp has its
/// own rows of w, whose tiles go from global memory to registers one ahead, and become operands there: no weight is stored again.
/// Consecutive blocks have the same rows of w.
template <class E, class Tile, class Block>
M2LM_KERNEL void M2LM_LAUNCH_BOUNDS(Block::threads) linear_quantised_many_rows(QuantisedWeight w, const E* __restrict__ x, std::int64_t ldx,
                                                                               int tokens, int columns, bool pieces, FusedEpilogue<E> epilogue) {
  constexpr int row_warps = Block::shape.row_warps, row_tiles = Block::shape.row_tiles, token_tiles = Block::shape.token_tiles,
                stages = Block::shape.stages;
  constexpr int in_16_bytes = 16 / static_cast<int>(sizeof(E)), pieces_of_row = 64 / in_16_bytes;
  constexpr int operand_pieces = Operand<E>::words / 4;
  E* const staged = dynamic_shared<E>();
  const int warp = static_cast<int>(warp_index()), lane = static_cast<int>(lane_index()), g = lane / 4, t = lane % 4;
  const int first_token = static_cast<int>(blockIdx.x) * Block::tokens, warp_token = warp / row_warps * token_tiles * 8;
  const int first_row_tile = static_cast<int>(blockIdx.y) * Block::row_tiles + warp % row_warps * row_tiles;

  const auto stage = [&](int column_tile) {
    E* const to = staged + column_tile % stages * (Block::tokens * 64);
    for (int i = static_cast<int>(thread_index()); i < Block::tokens * pieces_of_row; i += Block::threads) {
      const int row = i / pieces_of_row, piece = i % pieces_of_row, column = column_tile * 64 + piece * in_16_bytes;
      E* const at = to + row * 64 + piece_at<E>(row, piece) * in_16_bytes;
      const bool there = first_token + row < tokens && column < columns;
      const E* const from = there ? x + (first_token + row) * ldx + column : x;
      if (pieces) {
        copy_async16(at, from, there);
      } else {
        M2LM_UNROLL
        for (int j = 0; j < in_16_bytes; ++j) at[j] = there && column + j < columns ? from[j] : store<E>(0.0F);
      }
    }
  };
  ScaledTile<Tile> tile[row_tiles], next[row_tiles];
  const auto read = [&](int column_tile, ScaledTile<Tile>(&to)[row_tiles]) {
    M2LM_UNROLL
    for (int r = 0; r < row_tiles; ++r) {
      const std::byte* const row = w.row_tile(first_row_tile + r);
      to[r].read(row + static_cast<std::int64_t>(column_tile) * Tile::bytes, row + w.scales_at + column_tile * QuantisedWeight::scale_bytes, lane);
    }
  };

  for (int i = 0; i < stages - 1; ++i) {
    if (i < w.column_tiles) stage(i);
    copy_async_commit();
  }
  read(0, next);
  float sum[row_tiles][token_tiles][4] = {};
  for (int column_tile = 0; column_tile < w.column_tiles; ++column_tile) {
    copy_async_wait<stages - 2>();
    __syncthreads();  // this tile has arrived for all, and all are done with the one before, which is overwritten now
    if (column_tile + stages - 1 < w.column_tiles) stage(column_tile + stages - 1);
    copy_async_commit();
    M2LM_UNROLL
    for (int r = 0; r < row_tiles; ++r) tile[r] = next[r];
    if (column_tile + 1 < w.column_tiles) read(column_tile + 1, next);

    const E* const here = staged + column_tile % stages * (Block::tokens * 64);
    M2LM_UNROLL
    for (int b = 0; b < 2; ++b) {
      BlockOperand weight[row_tiles];
      M2LM_UNROLL
      for (int r = 0; r < row_tiles; ++r) weight[r].template make<typename Operand<E>::Element>(tile[r], b);
      M2LM_UNROLL
      for (int i = 0; i < token_tiles; ++i) {
        const int row = warp_token + 8 * i + g;
        std::uint32_t raw[Operand<E>::words], input[Operand<E>::terms][4];
        M2LM_UNROLL
        for (int j = 0; j < operand_pieces; ++j) {
          const Bytes16 piece = load16(here + row * 64 + piece_at<E>(row, (b * 4 + t) * operand_pieces + j) * in_16_bytes);
          M2LM_UNROLL
          for (int k = 0; k < 4; ++k) raw[4 * j + k] = piece.words[k];
        }
        Operand<E>::make(raw, input);
        M2LM_UNROLL
        for (int r = 0; r < row_tiles; ++r) weight[r].template multiply_add<E>(input, sum[r][i]);
      }
    }
  }

  M2LM_UNROLL
  for (int r = 0; r < row_tiles; ++r) {
    M2LM_UNROLL
    for (int i = 0; i < token_tiles; ++i) {
      M2LM_UNROLL
      for (int column = 0; column < 2; ++column) {
        const int token = first_token + warp_token + 8 * i + 2 * t + column;
        if (token < tokens) finish_pair(epilogue, first_row_tile + r, g, token, sum[r][i][column], sum[r][i][2 + column]);
      }
    }
  }
}

// ---- launching ---------------------------------------------------------------------------------------------------------------

template <class E, class Tile>
void enqueue_linear_quantised(Device& device, Matrix<const E> x, const QuantisedLayout& layout, const std::byte* data,
                              const FusedEpilogue<E>& epilogue) {
  const QuantisedWeight w{data, static_cast<std::int64_t>(layout.row_tile_bytes()), static_cast<std::int64_t>(layout.scales_at()),
                          static_cast<int>(layout.row_tiles()), static_cast<int>(layout.column_tiles())};
  const bool pieces =
      x.extent(1) * static_cast<std::int64_t>(sizeof(E)) % 16 == 0 && in_pieces(x.data(), x.stride(0), 16 / static_cast<int>(sizeof(E)));
  const int tokens = static_cast<int>(x.extent(0)), columns = static_cast<int>(x.extent(1));
  if (tokens <= few_rows_policy.most_tokens) {
    // With more rows of x, two row tiles share what is read of it.
    const unsigned row_tiles = pieces && tokens <= 8 ? 1 : 2;
    const auto kernel = !pieces        ? linear_quantised_few_rows<E, Tile, 2, 4, false>
                        : tokens <= 8  ? linear_quantised_few_rows<E, Tile, 1, 1, true>
                        : tokens <= 16 ? linear_quantised_few_rows<E, Tile, 2, 2, true>
                                       : linear_quantised_few_rows<E, Tile, 2, 4, true>;
    launch(device, "linear_quantised_few_rows", kernel,
           {.grid_x = (static_cast<unsigned>(w.row_tiles) + row_tiles - 1) / row_tiles, .block_x = static_cast<unsigned>(few_rows_policy.warps * 32)},
           w, x.data(), x.stride(0), tokens, columns, epilogue);
    return;
  }
  const bool large = wants_large_blocks(tokens, w.row_tiles, device.properties().multiprocessors);
  const ProductBlock& shape = large ? LargeBlock::shape : SmallBlock::shape;
  launch(device, "linear_quantised_many_rows",
         large ? linear_quantised_many_rows<E, Tile, LargeBlock> : linear_quantised_many_rows<E, Tile, SmallBlock>,
         {.grid_x = static_cast<unsigned>((tokens + shape.tokens() - 1) / shape.tokens()),
          .grid_y = static_cast<unsigned>((w.row_tiles + shape.block_row_tiles() - 1) / shape.block_row_tiles()),
          .block_x = static_cast<unsigned>(shape.threads()),
          .shared_bytes = shape.shared_bytes(sizeof(E))},
         w, x.data(), x.stride(0), tokens, columns, pieces, epilogue);
}

}  // namespace m2lm::cuda
