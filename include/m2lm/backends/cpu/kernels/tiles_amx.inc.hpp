// Registers of AMX's tiles: sixteen rows of 64 bytes each. Included inside a namespace of level amx and its target region.
// Assembly instead of intrinsics: those of g++ 12 and clang++ 14 differ, and g++ 12's do not tell the compiler what they read.

inline constexpr std::int64_t tile_height = 16, tile_row_bytes = 64;

/// What LDTILECFG reads: palette 1, and rows and bytes per row of each register. source: Intel's manual, volume 1, chapter 18.
struct alignas(64) TileShapes {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t row_bytes[16] = {};
  std::uint8_t rows[16] = {};

  void set(int tile, std::int64_t height, std::int64_t bytes) {
    rows[tile] = static_cast<std::uint8_t>(height);
    row_bytes[tile] = static_cast<std::uint16_t>(bytes);
  }
};
/// Takes the tile unit for this thread, every register zero; the destructor gives it back, and the thread's state is small again.
struct TileUnit {
  explicit TileUnit(const TileShapes& shapes) { asm volatile("ldtilecfg %0" : : "m"(shapes)); }
  ~TileUnit() { asm volatile("tilerelease"); }
  TileUnit(const TileUnit&) = delete;
  TileUnit& operator=(const TileUnit&) = delete;
};

template <int tile>
[[gnu::always_inline]] inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(tile));
}
template <int tile>
[[gnu::always_inline]] inline void tile_load(const void* from, std::int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(tile) : "memory");
}
/// The same for what is read once: L1 keeps the rest.
template <int tile>
[[gnu::always_inline]] inline void tile_load_once(const void* from, std::int64_t stride) {
  asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(tile) : "memory");
}
template <int tile>
[[gnu::always_inline]] inline void tile_store(void* to, std::int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(tile) : "memory");
}
/// sum[r][c] += Σ x[r][2i + t] · w[i][2c + t], bf16 to f32.
template <int sum, int x, int w>
[[gnu::always_inline]] inline void tile_dot_bf16() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sum), "i"(x), "i"(w));
}
/// sum[r][c] += Σ x[r][4i + t] · w[i][4c + t], x of signed bytes and w of unsigned ones, to 32 bits that wrap.
template <int sum, int x, int w>
[[gnu::always_inline]] inline void tile_dot_bytes() {
  asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sum), "i"(x), "i"(w));
}
/// The same with signed bytes on both sides.
template <int sum, int x, int w>
[[gnu::always_inline]] inline void tile_dot_signed_bytes() {
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sum), "i"(x), "i"(w));
}
