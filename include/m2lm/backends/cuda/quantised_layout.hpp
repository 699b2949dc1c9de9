// How weights of q8 and q4 lie in the memory of a device, and how they get into that order.
// Floor: backends. May include: core, ops.
#pragma once

#include <m2lm/core/blocks.hpp>
#include <m2lm/core/tensor.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

namespace m2lm::inline M2LM_ABI::cuda {

/// A quantised matrix [rows, cols] in tiles of 16 rows × 64 columns, zero-padded to whole tiles. The tiles of 16 rows lie behind each
/// other: their values, tile after tile, then their scales. So a matrix can be made and read 16 rows at a time.
///
/// The order within a tile is that of the A operand of mma.m16n8k16 (PTX ISA, "Matrix Fragments for mma.m16n8k16"): lane 4g + t of a
/// warp holds what belongs to rows g and g + 8, so a warp reads 512 consecutive bytes, 16 per lane, and has its operands without a
/// shuffle. Which column a slot of the operand stands for is free as long as x has the same order: here lane 4g + t has columns
/// 8t … 8t + 7 of each block of 32, so that its part of x is 16 consecutive bytes (of f16 or bf16) too.
///   q4  lane l has bytes 16l … 16l + 15 of the tile: four words, (row g, block 0), (row g + 8, block 0), (row g, block 1),
///       (row g + 8, block 1). Of the eight values of a word, 2p is in bits 4p and 2p + 1 in bits 4p + 16, as q in 0 … 15.
///   q8  block b has bytes 512b … 512b + 511, of which lane l has 16l … 16l + 15: eight values of row g, then eight of row g + 8,
///       in order, each with 128 added.
///   scales, f16: 32 per tile; for each g (row g, block 0), (row g + 8, block 0), (row g, block 1), (row g + 8, block 1).
/// A gated matrix has 8 rows of its first half as rows g of a tile, and the same 8 rows of its second half as rows g + 8: the sums
/// that are multiplied with each other end up in one lane.
struct QuantisedLayout {
  static constexpr std::int64_t tile_rows = 16, tile_columns = 64, tile_scales = 32;

  DType format = DType::q8;
  bool gated = false;
  std::int64_t rows = 0, cols = 0;

  /// Rows of the matrix that a tile covers, of each half where it is gated.
  constexpr std::int64_t rows_per_tile() const { return gated ? tile_rows / 2 : tile_rows; }
  constexpr std::int64_t row_tiles() const { return ((gated ? rows / 2 : rows) + rows_per_tile() - 1) / rows_per_tile(); }
  constexpr std::int64_t column_tiles() const { return (cols + tile_columns - 1) / tile_columns; }
  constexpr std::size_t value_bytes_per_tile() const { return format == DType::q8 ? 1024 : 512; }
  /// Where the scales begin in a row of tiles.
  constexpr std::size_t scales_at() const { return static_cast<std::size_t>(column_tiles()) * value_bytes_per_tile(); }
  constexpr std::size_t row_tile_bytes() const { return scales_at() + static_cast<std::size_t>(column_tiles() * tile_scales) * sizeof(Half); }
  constexpr std::size_t bytes() const { return static_cast<std::size_t>(row_tiles()) * row_tile_bytes(); }

  /// The row of the matrix that is row r (0 … 15) of row tile i; at least `rows` where there is none.
  constexpr std::int64_t matrix_row(std::int64_t i, std::int64_t r) const {
    if (!gated) return i * tile_rows + r;
    const std::int64_t in_half = i * rows_per_tile() + r % 8;
    return in_half < rows / 2 ? in_half + r / 8 * (rows / 2) : rows;
  }
};

namespace detail {

/// Puts block `block` of a row, which is row r of its tiles, where it belongs in that row of tiles.
template <class Block>
void place_block(const Block& from, std::int64_t block, std::int64_t r, std::byte* values, std::byte* scales) {
  const std::int64_t g = r % 8, half = r / 8, tile = block / 2, b = block % 2;
  std::memcpy(scales + (tile * QuantisedLayout::tile_scales + g * 4 + b * 2 + half) * 2, &from.scale, sizeof(Half));
  for (std::int64_t t = 0; t < 4; ++t) {
    const std::int64_t lane = 4 * g + t;
    if constexpr (Block::dtype == DType::q4) {
      std::uint32_t word = 0;
      for (std::int64_t c = 0; c < 8; ++c) word |= static_cast<std::uint32_t>(from.value(8 * t + c) + 8) << (4 * (c / 2) + 16 * (c % 2));
      std::memcpy(values + tile * 512 + lane * 16 + (2 * b + half) * 4, &word, sizeof(word));
    } else {
      for (std::int64_t c = 0; c < 8; ++c)
        values[tile * 1024 + b * 512 + lane * 16 + half * 8 + c] = static_cast<std::byte>(from.value(8 * t + c) + 128);
    }
  }
}

template <class Block>
void pack_row_tile(const QuantisedLayout& layout, std::span<const AnyTensor> sources, std::int64_t i, std::span<float> row, std::byte* out) {
  const std::int64_t blocks = (layout.cols + block_values - 1) / block_values;
  std::fill_n(out, layout.row_tile_bytes(), std::byte{0});
  for (std::int64_t r = 0; r < QuantisedLayout::tile_rows; ++r) {
    std::int64_t source_row = layout.matrix_row(i, r);
    if (source_row >= layout.rows) continue;
    std::size_t s = 0;
    while (source_row >= sources[s].shape()[0]) source_row -= sources[s++].shape()[0];
    const AnyTensor& source = sources[s];
    const bool as_it_is = source.dtype() == Block::dtype;  // its rows are whole blocks
    if (!as_it_is) source.copy_to(row.data(), source_row * layout.cols, layout.cols);
    for (std::int64_t b = 0; b < blocks; ++b)
      place_block(as_it_is ? load_block<Block>(source.data(), source_row * blocks + b) : quantise<Block>(row.data() + b * block_values), b, r, out,
                  out + layout.scales_at());
  }
}

}  // namespace detail

/// Row tile i of the matrix that the rows of `sources` make, below each other. Blocks of a source in the layout's format are taken as
/// they are; anything else is quantised. requires room for row_tile_bytes() at `out`, and for a row of floats, padded to whole tiles, in
/// `row`, which is zero behind the columns.
inline void pack_row_tile(const QuantisedLayout& layout, std::span<const AnyTensor> sources, std::int64_t i, std::span<float> row, std::byte* out) {
  if (layout.format == DType::q8)
    detail::pack_row_tile<Q8Block>(layout, sources, i, row, out);
  else
    detail::pack_row_tile<Q4Block>(layout, sources, i, row, out);
}

}  // namespace m2lm::cuda
