// Products of blocks without VNNI: VPMADDUBSW multiplies unsigned by signed bytes and adds pairs in 16 bits, saturating. Weights of 4
// bits cannot saturate, even summed over a block: 16 · 15 · 127 < 2^15; weights of 8 bits are taken as two of 4.
// Included inside a namespace of a level and its target region.

inline Ints broadcast_four(const std::int8_t* x) {
  std::int32_t four;
  __builtin_memcpy(&four, x, sizeof(four));
  return set_ints(four);
}

// 32 inputs of `width` outputs.
template <std::int64_t bits>
struct BlockWeights {
  static constexpr int groups = bits == 8 ? 8 : 4;
  Ints w[groups];

  [[gnu::always_inline]] explicit BlockWeights(const std::byte* p) {
    M2LM_UNROLL
    for (int j = 0; j < groups; ++j) w[j] = load_ints(p + j * 64);
  }
  // sum[r] += Σ w · (32 inputs of row r of x).
  template <std::int64_t stride, int rows>
  [[gnu::always_inline]] void add(const std::int8_t* x, Ints (&sum)[rows]) const {
    M2LM_UNROLL
    for (int r = 0; r < rows; ++r) sum[r] = added(sum[r], x + r * stride);
  }

 private:
  [[gnu::always_inline]] Ints added(Ints sum, const std::int8_t* x) const {
    // q8: the two halves of each weight take the same inputs; q4: those of a byte are 16 inputs apart.
    constexpr int apart = bits == 8 ? 0 : 16;
    Ints low = multiply_bytes(low_nibbles(w[0]), broadcast_four(x));
    Ints high = multiply_bytes(high_nibbles(w[0]), broadcast_four(x + apart));
    M2LM_UNROLL
    for (int j = 1; j < groups; ++j) {
      low = add_shorts(low, multiply_bytes(low_nibbles(w[j]), broadcast_four(x + 4 * j)));
      high = add_shorts(high, multiply_bytes(high_nibbles(w[j]), broadcast_four(x + 4 * j + apart)));
    }
    if constexpr (bits == 8)
      return add_ints(sum, add_ints(add_pairs(low, 1), add_pairs(high, 16)));
    else
      return add_ints(sum, add_pairs(add_shorts(low, high), 1));
  }
};
