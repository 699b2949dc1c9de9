// Kernels that work row by row: norms, rotary embedding, the KV cache, gathering, copies and activations. All are bound by memory:
// 16 bytes per access where addresses and widths allow it, and each element is read once.
// Floor: backends. May include: core, ops.
#pragma once

#include <m2lm/backends/cuda/device.cuh>
#include <m2lm/backends/cuda/kernels.hpp>
#include <m2lm/backends/cuda/kernels/activation.cuh>

#include <cmath>
#include <cstddef>
#include <cstdint>

namespace m2lm::inline M2LM_ABI::cuda {

// ---- policies and selectors ---------------------------------------------------------------------------------------------------

/// How kernels without a reduction cut a matrix into blocks.
struct RowTilePolicy {
  unsigned threads = 128;  ///< of a block; small, so that the single row of a decode step spreads over multiprocessors
};

/// A block is block_x vectors wide and block_y rows high; tiles_per_row blocks lie side by side.
struct RowTiles {
  unsigned block_x = 1, block_y = 1, tiles_per_row = 1, blocks = 0;
  constexpr LaunchShape shape() const { return {.grid_x = blocks, .block_x = block_x, .block_y = block_y}; }
};

/// requires rows, vectors > 0.
constexpr RowTiles row_tiles(std::int64_t rows, std::int64_t vectors, RowTilePolicy policy = {}) {
  RowTiles tiles;
  while (tiles.block_x < policy.threads && tiles.block_x < vectors) tiles.block_x *= 2;
  tiles.block_y = policy.threads / tiles.block_x;
  tiles.tiles_per_row = static_cast<unsigned>((vectors + tiles.block_x - 1) / tiles.block_x);
  tiles.blocks = tiles.tiles_per_row * static_cast<unsigned>((rows + tiles.block_y - 1) / tiles.block_y);
  return tiles;
}

/// How a norm spreads a row over the threads of its block. What the registers do not hold is read again.
struct NormPolicy {
  int rows_per_multiprocessor = 2;  ///< up to here the device is not full: one vector per thread, the shortest way through a row
  int held_when_few = 1;            ///< vectors that a thread keeps in registers; the kernels are compiled for these two numbers
  int held_when_many = 4;
  unsigned most_threads_when_few = 1024;
  unsigned most_threads_when_many = 512;  ///< of 128 registers each
};
struct NormShape {
  int held = 1;
  unsigned threads = 32;
};

/// requires vectors > 0.
constexpr NormShape norm_shape(int multiprocessors, std::int64_t rows, std::int64_t vectors, NormPolicy policy = {}) {
  const bool few = rows <= std::int64_t{policy.rows_per_multiprocessor} * multiprocessors &&
                   vectors <= std::int64_t{policy.held_when_few} * policy.most_threads_when_few;
  NormShape shape{.held = few ? policy.held_when_few : policy.held_when_many};
  const std::int64_t wanted = (vectors + shape.held - 1) / shape.held, most = few ? policy.most_threads_when_few : policy.most_threads_when_many;
  shape.threads = static_cast<unsigned>(((wanted < most ? wanted : most) + 31) / 32 * 32);
  return shape;
}

namespace detail {

// ---- vectors of elements --------------------------------------------------------------------------------------------------------

/// Elements in 16 bytes.
template <class E>
inline constexpr int vector_elements = static_cast<int>(16 / sizeof(E));

inline bool aligned16(const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; }

/// Whether every row begins at a multiple of 16 bytes.
template <class T>
bool rows_aligned(Matrix<T> m) {
  return aligned16(m.data()) && (m.extent(0) <= 1 || m.stride(0) % vector_elements<T> == 0);
}

/// N elements as f32: N = 1, or as many as make accesses of 16 bytes.
template <int N, class E>
M2LM_DEVICE void load_elements(const E* p, float (&out)[N]) {
  if constexpr (N == 1) {
    out[0] = load(*p);
  } else if constexpr (N <= vector_elements<E>) {
    load_vector<N>(p, out);
  } else {
    constexpr int step = vector_elements<E>;
    M2LM_UNROLL
    for (int i = 0; i < N; i += step) {
      float part[step];
      load_vector<step>(p + i, part);
      M2LM_UNROLL
      for (int j = 0; j < step; ++j) out[i + j] = part[j];
    }
  }
}

template <int N, class E>
M2LM_DEVICE void store_elements(E* p, const float (&in)[N]) {
  if constexpr (N == 1) {
    *p = store<E>(in[0]);
  } else if constexpr (N <= vector_elements<E>) {
    store_vector<N>(p, in);
  } else {
    constexpr int step = vector_elements<E>;
    M2LM_UNROLL
    for (int i = 0; i < N; i += step) {
      float part[step];
      M2LM_UNROLL
      for (int j = 0; j < step; ++j) part[j] = in[i + j];
      store_vector<step>(p + i, part);
    }
  }
}

/// N elements, bit for bit.
template <int N, class E>
M2LM_DEVICE void copy_elements(const E* from, E* to) {
  if constexpr (N == 1) {
    *to = *from;
  } else {
    static_assert(N == vector_elements<E>);
    store16(to, load16(from));
  }
}

/// What a kernel gets of a Matrix with unit column stride.
template <class T>
struct Rows {
  T* data = nullptr;
  std::int64_t stride = 0;
  M2LM_DEVICE T* at(std::int64_t row, std::int64_t column) const { return data + row * stride + column; }
};
template <class T>
Rows<T> rows_of(Matrix<T> m) {
  return {m.data(), m.stride(0)};
}

M2LM_DEVICE std::int64_t first_position(const Position& position) { return position.length ? *position.length : position.first; }

// ---- kernels without a reduction: a body at each vector of each row ----------------------------------------------------------------

template <int N, class Body>
M2LM_KERNEL void for_each_vector(Body body, std::int64_t rows, std::int64_t vectors, unsigned tiles_per_row) {
  const std::int64_t row = std::int64_t{blockIdx.x / tiles_per_row} * blockDim.y + threadIdx.y;
  const std::int64_t vector = std::int64_t{blockIdx.x % tiles_per_row} * blockDim.x + threadIdx.x;
  if (row < rows && vector < vectors) body.template at<N>(row, vector);
}

/// Runs body.at<N>(row, i) for 0 <= i < vectors of each row.
template <int N, class Body>
void launch_vectors(Device& device, const char* name, const Body& body, std::int64_t rows, std::int64_t vectors) {
  if (rows == 0 || vectors == 0) return;
  const RowTiles tiles = row_tiles(rows, vectors);
  launch(device, name, for_each_vector<N, Body>, tiles.shape(), body, rows, vectors, tiles.tiles_per_row);
}

/// The same for rows of `width` elements of E, N = 16 bytes of them if `whole_vectors`, else 1.
template <class E, class Body>
void launch_rows(Device& device, const char* name, const Body& body, std::int64_t rows, std::int64_t width, bool whole_vectors) {
  if (whole_vectors)
    launch_vectors<vector_elements<E>>(device, name, body, rows, width / vector_elements<E>);
  else
    launch_vectors<1>(device, name, body, rows, width);
}

template <class E>
struct CopyRow {
  Rows<const E> from;
  Rows<E> to;
  template <int N>
  M2LM_DEVICE void at(std::int64_t row, std::int64_t vector) const {
    copy_elements<N>(from.at(row, vector * N), to.at(row, vector * N));
  }
};

template <class E>
struct AddRow {
  Rows<E> x;
  Rows<const E> addend;
  template <int N>
  M2LM_DEVICE void at(std::int64_t row, std::int64_t vector) const {
    float a[N], b[N];
    load_elements<N>(x.at(row, vector * N), a);
    load_elements<N>(addend.at(row, vector * N), b);
    M2LM_UNROLL
    for (int i = 0; i < N; ++i) a[i] += b[i];
    store_elements<N>(x.at(row, vector * N), a);
  }
};

template <class E>
struct GatherRow {
  Rows<const E> table;
  std::int64_t table_rows = 0;
  const std::int32_t* ids = nullptr;
  Rows<E> y;
  template <int N>
  M2LM_DEVICE void at(std::int64_t row, std::int64_t vector) const {
    const std::int32_t id = ids[row];
    if (id >= 0 && id < table_rows) {
      copy_elements<N>(table.at(id, vector * N), y.at(row, vector * N));
      return;
    }
    float none[N];
    M2LM_UNROLL
    for (int i = 0; i < N; ++i) none[i] = NAN;
    store_elements<N>(y.at(row, vector * N), none);
  }
};

template <class E>
struct ActivateRow {
  Rows<const E> z;
  std::int64_t gate = 0;  ///< columns of y when gated, else 0
  Activation activation = Activation::none;
  Rows<E> y;
  template <int N>
  M2LM_DEVICE void at(std::int64_t row, std::int64_t vector) const {
    float a[N];
    load_elements<N>(z.at(row, vector * N), a);
    M2LM_UNROLL
    for (int i = 0; i < N; ++i) a[i] = apply_activation(activation, a[i]);
    if (gate != 0) {
      float b[N];
      load_elements<N>(z.at(row, gate + vector * N), b);
      M2LM_UNROLL
      for (int i = 0; i < N; ++i) a[i] *= b[i];
    }
    store_elements<N>(y.at(row, vector * N), a);
  }
};

/// A buffer of `count` elements, which need not be a whole number of vectors.
template <class From, class To>
struct ConvertElements {
  const From* from = nullptr;
  To* to = nullptr;
  std::int64_t count = 0;
  template <int N>
  M2LM_DEVICE void at(std::int64_t, std::int64_t vector) const {
    const std::int64_t begin = vector * N;
    if (begin + N <= count) {
      float x[N];
      load_elements<N>(from + begin, x);
      store_elements<N>(to + begin, x);
    } else {
      for (std::int64_t i = begin; i < count; ++i) to[i] = store<To>(load(from[i]));
    }
  }
};

/// One element of a patch: neighbouring threads read neighbouring pixels of a patch row.
template <class E>
struct CutPatch {
  const E* pixels = nullptr;
  std::int64_t channel_stride = 0, row_stride = 0, column_stride = 0;
  std::uint32_t patch = 0, patches_per_row = 0;
  Rows<E> y;
  template <int N>
  M2LM_DEVICE void at(std::int64_t row, std::int64_t column) const {
    static_assert(N == 1);
    const auto place = static_cast<std::uint32_t>(row), j = static_cast<std::uint32_t>(column);
    const std::int64_t channel = j / (patch * patch), r = j / patch % patch, s = j % patch;
    const std::int64_t top = std::int64_t{place / patches_per_row} * patch, left = std::int64_t{place % patches_per_row} * patch;
    *y.at(row, column) = pixels[channel * channel_stride + (top + r) * row_stride + (left + s) * column_stride];
  }
};

/// One pair per element of cos and sin: the angle is an f32 product, as in layers/rope.hpp.
struct RopeAngle {
  const float* frequencies = nullptr;
  Position position;
  Rows<float> cos, sin;
  template <int N>
  M2LM_DEVICE void at(std::int64_t row, std::int64_t i) const {
    static_assert(N == 1);
    const float angle = static_cast<float>(first_position(position) + row) * frequencies[i];
    *cos.at(row, i) = cosf(angle);
    *sin.at(row, i) = sinf(angle);
  }
};

/// Rotates N pairs of a head, p[0 …] with p[half …], in place. What was stored is also left in a and b.
template <int N, class E>
M2LM_DEVICE void rotate_pairs(E* p, std::int64_t half, const float* cos, const float* sin, float (&a)[N], float (&b)[N]) {
  float c[N], s[N];
  load_elements<N>(p, a);
  load_elements<N>(p + half, b);
  load_elements<N>(cos, c);
  load_elements<N>(sin, s);
  M2LM_UNROLL
  for (int i = 0; i < N; ++i) {
    const float x = a[i];
    a[i] = x * c[i] - b[i] * s[i];
    b[i] = b[i] * c[i] + x * s[i];
  }
  store_elements<N>(p, a);
  store_elements<N>(p + half, b);
}

template <class E>
struct RotateRow {
  Rows<E> x;
  Rows<const float> cos, sin;
  std::uint32_t half = 0;  ///< pairs of a head
  template <int N>
  M2LM_DEVICE void at(std::int64_t row, std::int64_t vector) const {
    const auto pair = static_cast<std::uint32_t>(vector) * N, head = pair / half, i = pair % half;
    float a[N], b[N];
    rotate_pairs<N>(x.at(row, std::int64_t{head} * half * 2 + i), half, cos.at(row, i), sin.at(row, i), a, b);
  }
};

/// Keys and values [kv_heads][capacity][head_dim].
template <class E>
struct CacheRows {
  E* keys = nullptr;
  E* values = nullptr;
  std::int64_t capacity = 0;
  std::uint32_t head_dim = 0;
  explicit CacheRows(const KeyValues& kv)
      : keys(reinterpret_cast<E*>(kv.keys)),
        values(reinterpret_cast<E*>(kv.values)),
        capacity(kv.capacity),
        head_dim(static_cast<std::uint32_t>(kv.head_dim)) {}
  M2LM_DEVICE std::int64_t offset(std::uint32_t head, std::int64_t position, std::uint32_t column) const {
    return (head * capacity + position) * head_dim + column;
  }
  bool whole_vectors() const { return aligned16(keys) && aligned16(values) && head_dim % vector_elements<E> == 0; }
};

/// The vectors of a row, in this order: pairs of q, pairs of k, elements of v.
template <class E>
struct RotateAndAppend {
  Rows<E> qkv;
  Rows<const float> cos, sin;
  Position position;
  CacheRows<E> cache;
  std::uint32_t heads = 0, kv_heads = 0;
  template <int N>
  M2LM_DEVICE void at(std::int64_t row, std::int64_t vector) const {
    const std::uint32_t d = cache.head_dim, half = d / 2, element = static_cast<std::uint32_t>(vector) * N;
    const std::uint32_t pairs = (heads + kv_heads) * half;
    const std::int64_t place = first_position(position) + row;
    if (element < pairs) {
      const std::uint32_t head = element / half, i = element % half;
      float a[N], b[N];
      rotate_pairs<N>(qkv.at(row, std::int64_t{head} * d + i), half, cos.at(row, i), sin.at(row, i), a, b);
      if (head < heads) return;
      E* key = cache.keys + cache.offset(head - heads, place, i);
      store_elements<N>(key, a);
      store_elements<N>(key + half, b);
    } else {
      const std::uint32_t c = element - pairs;
      copy_elements<N>(qkv.at(row, 2 * std::int64_t{pairs} + c), cache.values + cache.offset(c / d, place, c % d));
    }
  }
};

/// The elements of k, then those of v.
template <class E>
struct AppendRow {
  Rows<const E> k, v;
  Position position;
  CacheRows<E> cache;
  std::uint32_t width = 0;  ///< of k, and of v
  template <int N>
  M2LM_DEVICE void at(std::int64_t row, std::int64_t vector) const {
    const auto element = static_cast<std::uint32_t>(vector) * N;
    const bool is_key = element < width;
    const std::uint32_t c = is_key ? element : element - width;
    const std::int64_t to = cache.offset(c / cache.head_dim, first_position(position) + row, c % cache.head_dim);
    copy_elements<N>((is_key ? k : v).at(row, c), (is_key ? cache.keys : cache.values) + to);
  }
};

/// Row h < kv_heads: the keys of head h; then the values.
template <class E>
struct CopyCache {
  CacheRows<E> from, to;
  std::int64_t kv_heads = 0;
  template <int N>
  M2LM_DEVICE void at(std::int64_t row, std::int64_t vector) const {
    const bool is_key = row < kv_heads;
    const auto head = static_cast<std::uint32_t>(is_key ? row : row - kv_heads);
    copy_elements<N>((is_key ? from.keys : from.values) + from.offset(head, 0, 0) + vector * N,
                     (is_key ? to.keys : to.values) + to.offset(head, 0, 0) + vector * N);
  }
};

// ---- norms: a block per row ---------------------------------------------------------------------------------------------------------

/// The elements that one thread has of a row: `Held` vectors in registers and, in a row that is too long for that, further ones that
/// are read again each time they are wanted. (In place, a thread writes only elements that no other thread reads.)
template <int N, int Held, class E>
struct RowPart {
  const E* row;
  unsigned vectors;
  float held[Held][N] = {};  // what is not there counts as zero

  M2LM_DEVICE RowPart(const E* row_, unsigned vectors_) : row(row_), vectors(vectors_) {
    M2LM_UNROLL
    for (int v = 0; v < Held; ++v) {
      const unsigned i = threadIdx.x + static_cast<unsigned>(v) * blockDim.x;
      if (i < vectors) load_elements<N>(row + std::size_t{i} * N, held[v]);
    }
  }

  /// f(vector, its elements) for each vector of the thread.
  template <class F>
  M2LM_DEVICE void visit(const F& f) const {
    M2LM_UNROLL
    for (int v = 0; v < Held; ++v) {
      const unsigned i = threadIdx.x + static_cast<unsigned>(v) * blockDim.x;
      if (i < vectors) f(i, held[v]);
    }
    for (unsigned i = threadIdx.x + static_cast<unsigned>(Held) * blockDim.x; i < vectors; i += blockDim.x) {
      float again[N];
      load_elements<N>(row + std::size_t{i} * N, again);
      f(i, again);
    }
  }
};

/// weight and, for layer_norm, bias of a thread's first vector. Asked for before the sums are known, so that the way to memory is
/// gone once; further vectors come when they are used.
template <int N, class E>
struct NormVector {
  float value[N] = {};
  M2LM_DEVICE NormVector(const E* p, unsigned vectors) {
    if (threadIdx.x < vectors) load_elements<N>(p + std::size_t{threadIdx.x} * N, value);
  }
  M2LM_DEVICE void advance(const E* p, unsigned vector) {
    if (vector != threadIdx.x) load_elements<N>(p + std::size_t{vector} * N, value);
  }
};

/// The registers that a thread may have follow from this.
template <int Held>
inline constexpr unsigned most_norm_threads =
    Held == NormPolicy{}.held_when_few ? NormPolicy{}.most_threads_when_few : NormPolicy{}.most_threads_when_many;

template <int N, int Held, class E>
M2LM_KERNEL M2LM_LAUNCH_BOUNDS(most_norm_threads<Held>, 1) void rms_norm_rows(Rows<const E> x, const E* weight, float eps, Rows<E> y,
                                                                              unsigned vectors) {
  const RowPart<N, Held, E> part(x.at(blockIdx.x, 0), vectors);
  NormVector<N, E> w(weight, vectors);
  float squares = 0;
  part.visit([&](unsigned, const float(&e)[N]) {
    M2LM_UNROLL
    for (int i = 0; i < N; ++i) squares += e[i] * e[i];
  });
  const float scale = 1.0F / sqrtf(block_sum(squares) / static_cast<float>(vectors * N) + eps);
  part.visit([&](unsigned v, const float(&e)[N]) {
    w.advance(weight, v);
    float out[N];
    M2LM_UNROLL
    for (int i = 0; i < N; ++i) out[i] = e[i] * scale * w.value[i];
    store_elements<N>(y.at(blockIdx.x, std::int64_t{v} * N), out);
  });
}

template <int N, int Held, class E>
M2LM_KERNEL M2LM_LAUNCH_BOUNDS(most_norm_threads<Held>, 1) void layer_norm_rows(Rows<const E> x, const E* weight, const E* bias, float eps, Rows<E> y,
                                                                                unsigned vectors) {
  const RowPart<N, Held, E> part(x.at(blockIdx.x, 0), vectors);
  NormVector<N, E> w(weight, vectors), b(bias, vectors);
  const auto n = static_cast<float>(vectors * N);
  float sum = 0, squares = 0;
  part.visit([&](unsigned, const float(&e)[N]) {
    M2LM_UNROLL
    for (int i = 0; i < N; ++i) sum += e[i];
  });
  const float mean = block_sum(sum) / n;
  part.visit([&](unsigned, const float(&e)[N]) {
    M2LM_UNROLL
    for (int i = 0; i < N; ++i) squares += (e[i] - mean) * (e[i] - mean);
  });
  const float scale = 1.0F / sqrtf(block_sum(squares) / n + eps);
  part.visit([&](unsigned v, const float(&e)[N]) {
    w.advance(weight, v);
    b.advance(bias, v);
    float out[N];
    M2LM_UNROLL
    for (int i = 0; i < N; ++i) out[i] = (e[i] - mean) * scale * w.value[i] + b.value[i];
    store_elements<N>(y.at(blockIdx.x, std::int64_t{v} * N), out);
  });
}

/// Calls choose(N, held) with the constants of the kernel to launch.
template <int Value>
struct Constant {
  static constexpr int value = Value;
};
template <class E, class Launch>
void launch_norm(Device& device, Matrix<const E> x, Matrix<E> y, bool parameters_aligned, const Launch& run) {
  if (x.elements() == 0) return;
  constexpr int N = vector_elements<E>;
  constexpr NormPolicy policy;
  const std::int64_t n = x.extent(1);
  const bool whole_vectors = parameters_aligned && rows_aligned(x) && rows_aligned(y) && n % N == 0;
  const std::int64_t vectors = whole_vectors ? n / N : n;
  const NormShape chosen = norm_shape(device.properties().multiprocessors, x.extent(0), vectors, policy);
  const LaunchShape shape{.grid_x = static_cast<unsigned>(x.extent(0)), .block_x = chosen.threads};
  const auto count = static_cast<unsigned>(vectors);
  const bool few = chosen.held == policy.held_when_few;
  if (whole_vectors && few) run(Constant<N>{}, Constant<policy.held_when_few>{}, shape, count);
  if (whole_vectors && !few) run(Constant<N>{}, Constant<policy.held_when_many>{}, shape, count);
  if (!whole_vectors && few) run(Constant<1>{}, Constant<policy.held_when_few>{}, shape, count);
  if (!whole_vectors && !few) run(Constant<1>{}, Constant<policy.held_when_many>{}, shape, count);
}

// ---- lengths in device memory -----------------------------------------------------------------------------------------------------

template <class T>
M2LM_KERNEL void add_to_value(T* value, T by) {
  *value += by;
}
template <class T>
M2LM_KERNEL void set_value(T* value, T to) {
  *value = to;
}

}  // namespace detail

// ---- what the host calls ------------------------------------------------------------------------------------------------------------

template <class E>
void rms_norm(Device& device, Matrix<const E> x, const E* weight, float eps, Matrix<E> y) {
  detail::launch_norm<E>(device, x, y, detail::aligned16(weight), [&](auto n, auto held, const LaunchShape& shape, unsigned vectors) {
    launch(device, "rms_norm_rows", detail::rms_norm_rows<decltype(n)::value, decltype(held)::value, E>, shape, detail::rows_of(x), weight, eps,
           detail::rows_of(y), vectors);
  });
}

template <class E>
void layer_norm(Device& device, Matrix<const E> x, const E* weight, const E* bias, float eps, Matrix<E> y) {
  const bool aligned = detail::aligned16(weight) && detail::aligned16(bias);
  detail::launch_norm<E>(device, x, y, aligned, [&](auto n, auto held, const LaunchShape& shape, unsigned vectors) {
    launch(device, "layer_norm_rows", detail::layer_norm_rows<decltype(n)::value, decltype(held)::value, E>, shape, detail::rows_of(x), weight, bias,
           eps, detail::rows_of(y), vectors);
  });
}

inline void rope_angles(Device& device, const float* frequencies, Position position, Matrix<float> cos, Matrix<float> sin) {
  detail::launch_vectors<1>(device, "rope_angles", detail::RopeAngle{frequencies, position, detail::rows_of(cos), detail::rows_of(sin)},
                            cos.extent(0), cos.extent(1));
}

template <class E>
void rope(Device& device, Matrix<E> x, std::int64_t head_dim, Matrix<const float> cos, Matrix<const float> sin) {
  const std::int64_t half = head_dim / 2;
  const bool whole_vectors =
      detail::rows_aligned(x) && detail::rows_aligned(cos) && detail::rows_aligned(sin) && half % detail::vector_elements<E> == 0;
  detail::launch_rows<E>(device, "rope",
                         detail::RotateRow<E>{detail::rows_of(x), detail::rows_of(cos), detail::rows_of(sin), static_cast<std::uint32_t>(half)},
                         x.extent(0), x.extent(1) / 2, whole_vectors);
}

template <class E>
void rope_append(Device& device, Matrix<E> qkv, std::int64_t heads, Matrix<const float> cos, Matrix<const float> sin, Position position,
                 const KeyValues& kv) {
  const detail::CacheRows<E> cache(kv);
  const std::int64_t half = kv.head_dim / 2;
  const bool whole_vectors = detail::rows_aligned(qkv) && detail::rows_aligned(cos) && detail::rows_aligned(sin) && cache.whole_vectors() &&
                             half % detail::vector_elements<E> == 0;
  const detail::RotateAndAppend<E> body{detail::rows_of(qkv),
                                        detail::rows_of(cos),
                                        detail::rows_of(sin),
                                        position,
                                        cache,
                                        static_cast<std::uint32_t>(heads),
                                        static_cast<std::uint32_t>(kv.kv_heads)};
  detail::launch_rows<E>(device, "rope_append", body, qkv.extent(0), (heads + kv.kv_heads) * half + kv.kv_heads * kv.head_dim, whole_vectors);
}

template <class E>
void append_key_values(Device& device, Matrix<const E> k, Matrix<const E> v, Position position, const KeyValues& kv) {
  const detail::CacheRows<E> cache(kv);
  const bool whole_vectors = detail::rows_aligned(k) && detail::rows_aligned(v) && cache.whole_vectors();
  const detail::AppendRow<E> body{detail::rows_of(k), detail::rows_of(v), position, cache, static_cast<std::uint32_t>(k.extent(1))};
  detail::launch_rows<E>(device, "append_key_values", body, k.extent(0), 2 * k.extent(1), whole_vectors);
}

template <class E>
void copy_key_values(Device& device, const KeyValues& from, std::int64_t count, const KeyValues& to) {
  const detail::CopyCache<E> body{detail::CacheRows<E>(from), detail::CacheRows<E>(to), from.kv_heads};
  detail::launch_rows<E>(device, "copy_key_values", body, 2 * from.kv_heads, count * from.head_dim,
                         body.from.whole_vectors() && body.to.whole_vectors());
}

template <class E>
void gather_rows(Device& device, Matrix<const E> table, const std::int32_t* ids, Matrix<E> y) {
  const bool whole_vectors = detail::rows_aligned(table) && detail::rows_aligned(y) && y.extent(1) % detail::vector_elements<E> == 0;
  detail::launch_rows<E>(device, "gather_rows", detail::GatherRow<E>{detail::rows_of(table), table.extent(0), ids, detail::rows_of(y)}, y.extent(0),
                         y.extent(1), whole_vectors);
}

template <class E>
void patchify(Device& device, View<const E, 3> pixels, std::int64_t patch, Matrix<E> y) {
  const detail::CutPatch<E> body{pixels.data(),
                                 pixels.stride(0),
                                 pixels.stride(1),
                                 pixels.stride(2),
                                 static_cast<std::uint32_t>(patch),
                                 static_cast<std::uint32_t>(pixels.extent(2) / patch),
                                 detail::rows_of(y)};
  detail::launch_vectors<1>(device, "patchify", body, y.extent(0), y.extent(1));
}

template <class E>
void add_rows(Device& device, Matrix<E> x, Matrix<const E> addend) {
  const bool whole_vectors = detail::rows_aligned(x) && detail::rows_aligned(addend) && x.extent(1) % detail::vector_elements<E> == 0;
  detail::launch_rows<E>(device, "add_rows", detail::AddRow<E>{detail::rows_of(x), detail::rows_of(addend)}, x.extent(0), x.extent(1), whole_vectors);
}

template <class E>
void copy_rows(Device& device, Matrix<const E> from, Matrix<E> to) {
  const bool whole_vectors = detail::rows_aligned(from) && detail::rows_aligned(to) && to.extent(1) % detail::vector_elements<E> == 0;
  detail::launch_rows<E>(device, "copy_rows", detail::CopyRow<E>{detail::rows_of(from), detail::rows_of(to)}, to.extent(0), to.extent(1),
                         whole_vectors);
}

template <class From, class To>
void convert(Device& device, const From* from, To* to, std::int64_t count) {
  constexpr int N = static_cast<int>(16 / (sizeof(From) < sizeof(To) ? sizeof(From) : sizeof(To)));
  const detail::ConvertElements<From, To> body{from, to, count};
  if (detail::aligned16(from) && detail::aligned16(to))
    detail::launch_vectors<N>(device, "convert", body, 1, (count + N - 1) / N);
  else
    detail::launch_vectors<1>(device, "convert", body, 1, count);
}

template <class E>
void activation_forward(Device& device, Matrix<const E> z, Activation activation, Matrix<E> y) {
  const std::int64_t n = y.extent(1);
  const bool whole_vectors = detail::rows_aligned(z) && detail::rows_aligned(y) && n % detail::vector_elements<E> == 0;
  const detail::ActivateRow<E> body{detail::rows_of(z), z.extent(1) == n ? 0 : n, activation, detail::rows_of(y)};
  detail::launch_rows<E>(device, "activation_forward", body, y.extent(0), n, whole_vectors);
}

inline void add_to_length(Device& device, std::int32_t* length, std::int32_t by) {
  launch(device, "add_to_length", detail::add_to_value<std::int32_t>, LaunchShape{}, length, by);
}

inline void set_length(Device& device, std::int32_t* length, std::int32_t value) {
  launch(device, "set_length", detail::set_value<std::int32_t>, LaunchShape{}, length, value);
}

}  // namespace m2lm::cuda
