// Products of blocks by the compiler's vector extension: in f32, where all sums of a block are exact (|sum| < 2^24). Included inside a
// namespace of the level.

inline constexpr int block_rows = 4;    // of a tile
inline constexpr int rows_in_turn = 4;  // whose products are interleaved

using Words [[gnu::vector_size(16)]] = unsigned;

inline Vec load_halves(const std::byte* p) {
  std::uint16_t bits[4];
  __builtin_memcpy(bits, p, sizeof(bits));
  return Vec{to_float(Half{bits[0]}), to_float(Half{bits[1]}), to_float(Half{bits[2]}), to_float(Half{bits[3]})};
}
inline void store_bytes(std::int8_t* to, Vec v) {
  using Bytes [[gnu::vector_size(4)]] = signed char;
  const auto bytes = __builtin_convertvector(__builtin_convertvector(v, Mask), Bytes);
  __builtin_memcpy(to, &bytes, sizeof(bytes));
}

// 32 inputs of 4 outputs.
template <DType format>
struct BlockWeights {
  Vec w[block_values];

  explicit BlockWeights(const std::byte* p) {
    constexpr int groups = format == DType::q8 ? 8 : 4;
    for (int j = 0; j < groups; ++j) {
      Words bytes;
      __builtin_memcpy(&bytes, p + j * 64, sizeof(bytes));
      for (int t = 0; t < 4; ++t, bytes >>= 8) {
        if constexpr (format == DType::q8) {
          w[4 * j + t] = __builtin_convertvector((Mask)(bytes & 255U), Vec);
        } else {
          w[4 * j + t] = __builtin_convertvector((Mask)(bytes & 15U), Vec);
          w[16 + 4 * j + t] = __builtin_convertvector((Mask)((bytes >> 4) & 15U), Vec);
        }
      }
    }
  }
  // out[r] = starts[r] + Σ w · (block r of x).
  template <int rows>
  void dot(const std::int8_t* x, const std::int32_t* starts, Vec (&out)[rows]) const {
    for (int r = 0; r < rows; ++r) {
      Vec sum = set(static_cast<float>(starts[r]));
      for (int i = 0; i < static_cast<int>(block_values); ++i) sum = fma(w[i], set(static_cast<float>(x[r * block_values + i])), sum);
      out[r] = sum;
    }
  }
};
