// Products of blocks by the compiler's vector extension: in f32, where sums of 32 products are exact (|sum| < 2^24). Included inside a
// namespace of the level.

inline constexpr int block_rows = 4;    // of a tile
inline constexpr int rows_in_turn = 4;  // whose products are interleaved

using Words [[gnu::vector_size(16)]] = unsigned;
using Ints = Mask;

inline Ints set_ints(std::int32_t x) { return Ints{x, x, x, x}; }
inline Vec to_vec(Ints x) { return __builtin_convertvector(x, Vec); }

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
template <std::int64_t bits>
struct BlockWeights {
  Vec w[block_values];

  explicit BlockWeights(const std::byte* p) {
    constexpr int groups = bits == 8 ? 8 : 4;
    for (int j = 0; j < groups; ++j) {
      Words bytes;
      __builtin_memcpy(&bytes, p + j * 64, sizeof(bytes));
      for (int t = 0; t < 4; ++t, bytes >>= 8) {
        if constexpr (bits == 8) {
          w[4 * j + t] = __builtin_convertvector((Mask)(bytes & 255U), Vec);
        } else {
          w[4 * j + t] = __builtin_convertvector((Mask)(bytes & 15U), Vec);
          w[16 + 4 * j + t] = __builtin_convertvector((Mask)((bytes >> 4) & 15U), Vec);
        }
      }
    }
  }
  // sum[r] += Σ w · (32 inputs of row r of x).
  template <std::int64_t stride, int rows>
  void add(const std::int8_t* x, Ints (&sum)[rows]) const {
    for (int r = 0; r < rows; ++r) {
      Vec products = set(0.0F);
      for (int i = 0; i < static_cast<int>(block_values); ++i) products = fma(w[i], set(static_cast<float>(x[r * stride + i])), products);
      sum[r] += __builtin_convertvector(products, Mask);
    }
  }
};
