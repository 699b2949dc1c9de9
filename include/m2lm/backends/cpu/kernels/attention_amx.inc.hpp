// Attention's two products on AMX's tiles: bf16 times bf16, sums in f32. Included inside a level's namespace, in a target region of its
// own, after attention.inc.hpp: no includes, no static locals here.

// A panel of keys [dk/2][32][2] is two tiles of 16 rows side by side per 32 inputs, and so is one of values [keys/2][32][2]; q and the
// probabilities are tiles as they lie. An element's sum is one chain over steps of 32 inputs, whatever rows share the tile.
struct AmxProducts {
  using X = std::uint16_t;
  using W = std::uint16_t;
  static constexpr bool rounds = true;
  static constexpr std::int64_t k_step = 2;
  static constexpr std::int64_t tile_side = 16, step = 32;     // rows or outputs, and inputs, of a tile
  static constexpr std::int64_t panel_stride = panel_width * 4;  // bytes from a pair of inputs of a panel to the next
  static constexpr std::int64_t rows = 2 * tile_side;
  static constexpr std::int64_t wide_floats(std::int64_t) { return tile_side * panel_width; }
  static void convert(const float* x, std::int64_t n, X* out) { Bf16DotTile::convert(x, n, out); }

  // g++ 12 does not know that its tile instructions read and write what a pointer leads to, and drops stores that nothing else reads.
  [[gnu::always_inline]] static void memory_is_used(const void* p) { asm volatile("" : : "r"(p) : "memory"); }

  [[gnu::noinline]] AmxProducts() {
    struct alignas(64) {
      std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
      std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    memory_is_used(&config);
    _tile_loadconfig(&config);
  }
  [[gnu::noinline]] ~AmxProducts() { _tile_release(); }
  AmxProducts(const AmxProducts&) = delete;
  AmxProducts& operator=(const AmxProducts&) = delete;

  // Tiles 0 to 3 (+)= 32 rows of a · 32 outputs of a panel, over 32 inputs; 0 and 1 alone for 16 rows.
  template <bool both>
  [[gnu::always_inline]] static void multiply(const X* a, std::int64_t row_bytes, const W* panel) {
    memory_is_used(a);
    _tile_loadd(4, a, row_bytes);
    _tile_loadd(6, panel, panel_stride);
    _tile_loadd(7, panel + panel_width, panel_stride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (both) {
      _tile_loadd(5, a + tile_side * row_bytes / 2, row_bytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  template <bool both>
  [[gnu::always_inline]] static void clear() {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (both) {
      _tile_zero(2);
      _tile_zero(3);
    }
  }
  template <bool both>
  [[gnu::always_inline]] static void store_to(float* y, std::int64_t stride) {
    _tile_stored(0, y, stride * 4);
    _tile_stored(1, y + tile_side, stride * 4);
    if constexpr (both) {
      _tile_stored(2, y + tile_side * stride, stride * 4);
      _tile_stored(3, y + tile_side * stride + tile_side, stride * 4);
    }
    memory_is_used(y);
  }

  template <bool both>
  [[gnu::noinline]] static void scores_of(const X* q, std::int64_t ldq, const W* keys, std::int64_t dk, std::int64_t n, float* s, W* padded,
                                           const KeysAhead& ahead) {
    const std::int64_t whole = dk / step * step, rest = dk - whole;
    if (rest > 0) __builtin_memset(padded, 0, tile_side * panel_stride);
    for (std::int64_t j = 0; j < n; j += panel_width) {
      const W* panel = keys + j * dk;
      ahead.before_scores(j / panel_width);
      clear<both>();
      for (std::int64_t c = 0; c < whole; c += step) multiply<both>(q + c, ldq * 2, panel + c * panel_width);
      if (rest > 0) {  // what lies behind the panel is another's
        __builtin_memcpy(padded, panel + whole * panel_width, static_cast<std::size_t>(rest * panel_width) * sizeof(W));
        multiply<both>(q + whole, ldq * 2, padded);
      }
      store_to<both>(s + j, score_stride);
    }
  }
  template <bool both>
  [[gnu::noinline]] static void weigh_with(const float* s, const W* values, std::int64_t stride, std::int64_t n, float* y, std::int64_t dv) {
    const X* p = reinterpret_cast<const X*>(s);
    for (std::int64_t c = 0; c < dv; c += panel_width) {
      const W* panel = values + c / panel_width * stride;
      clear<both>();
      for (std::int64_t j = 0; j < n; j += step) multiply<both>(p + j, score_stride * 4, panel + j * panel_width);
      store_to<both>(y + c, dv);
    }
  }

  void scores(std::int64_t count, const X* q, std::int64_t ldq, const W* keys, std::int64_t dk, std::int64_t n, float* s, float* wide,
              const KeysAhead& ahead) const {
    (count > tile_side ? scores_of<true> : scores_of<false>)(q, ldq, keys, dk, n, s, reinterpret_cast<W*>(wide), ahead);
  }
  void weigh(std::int64_t count, const float* s, const W* values, std::int64_t stride, std::int64_t n, float* y, std::int64_t dv, float*,
             const KeysAhead&) const {
    (count > tile_side ? weigh_with<true> : weigh_with<false>)(s, values, stride, n, y, dv);
  }
};
