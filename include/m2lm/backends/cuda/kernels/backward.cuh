// Gradients: of linear layers (by products of transposed matrices), activations, norms, RoPE, attention, gathered rows and the
// cross-entropy. No sum is cut between blocks and none is atomic, so results do not change from run to run.
// Floor: backends. May include: core, ops.
#pragma once

#include <m2lm/backends/cuda/device.cuh>
#include <m2lm/backends/cuda/kernels.hpp>
#include <m2lm/backends/cuda/kernels/activation.cuh>
#include <m2lm/backends/cuda/kernels/rows.cuh>
#include <m2lm/backends/cuda/quantised_layout.hpp>
#include <m2lm/ops/loss.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>

namespace m2lm::inline M2LM_ABI::cuda {

// ---- policies and selectors ---------------------------------------------------------------------------------------------------

/// A block of `threads` goes along a row; a block of warp_size × row_lanes goes down 32 columns.
struct BackwardPolicy {
  unsigned threads = 256;
  unsigned row_lanes = 8;
};
inline constexpr BackwardPolicy backward_policy{};

/// Tiles of attention's gradient: `keys` keys, one per lane, by warps·rows_per_warp queries. Rows of a tile are padded to an odd number
/// of floats, so that lanes that go down a column of it meet different banks.
struct AttentionBackwardTiles {
  static constexpr int warps = 8;
  static constexpr int keys = static_cast<int>(warp_size);
  static constexpr int most_rows_per_warp = 4;  ///< the kernels are compiled for this number and 1
  int rows_per_warp = most_rows_per_warp;

  M2LM_HOST_DEVICE constexpr int queries() const { return warps * rows_per_warp; }
  M2LM_HOST_DEVICE static constexpr int stride(std::int64_t head_dim) { return static_cast<int>(head_dim) | 1; }
  static constexpr int square_stride = keys + 1;
  /// Rows of q, dy and dq, of k and v, and ds.
  constexpr std::size_t query_bytes(std::int64_t head_dim) const { return floats(head_dim, 3 * queries() + 2 * keys, 1); }
  /// Rows of q and dy, of k, v, dk and dv, and p and ds.
  constexpr std::size_t key_bytes(std::int64_t head_dim) const { return floats(head_dim, 2 * queries() + 4 * keys, 2); }

 private:
  constexpr std::size_t floats(std::int64_t head_dim, int rows, int squares) const {
    return (static_cast<std::size_t>(rows) * static_cast<std::size_t>(stride(head_dim)) +
            static_cast<std::size_t>(squares * queries() * square_stride)) *
           sizeof(float);
  }
};

/// The larger tiles if a block of the device can hold them. rows_per_warp = 0: it can hold neither.
constexpr AttentionBackwardTiles attention_backward_tiles(std::size_t shared_bytes_per_block, std::int64_t head_dim) {
  for (const int rows : {AttentionBackwardTiles::most_rows_per_warp, 1}) {
    const AttentionBackwardTiles tiles{rows};
    if (tiles.query_bytes(head_dim) <= shared_bytes_per_block && tiles.key_bytes(head_dim) <= shared_bytes_per_block) return tiles;
  }
  return {0};
}

namespace detail {

// ---- element by element -------------------------------------------------------------------------------------------------------

/// d act(x) / dx; that of relu at 0 is 0.
M2LM_DEVICE float activation_slope(Activation activation, float x) {
  switch (activation) {
    case Activation::none: return 1.0F;
    case Activation::relu: return x > 0.0F ? 1.0F : 0.0F;
    case Activation::quick_gelu: x *= 1.702F; [[fallthrough]];
    case Activation::silu: {  // of z·sigmoid(z); quick_gelu is that of z = 1.702·x, divided by 1.702
      const float s = 1.0F / (1.0F + expf(-x));
      return s * (1.0F + x * (1.0F - s));
    }
    case Activation::gelu: return 0.5F * (1.0F + erff(x * 0.70710678F)) + x * expf(-0.5F * x * x) * 0.39894228F;
    case Activation::gelu_tanh: {
      const float t = tanhf(0.7978845608F * (x + 0.044715F * x * x * x));
      return 0.5F * (1.0F + t) + 0.5F * x * (1.0F - t * t) * 0.7978845608F * (1.0F + 3 * 0.044715F * x * x);
    }
  }
  return 1.0F;
}

template <class E>
struct ActivateRowBackward {
  Rows<const E> dy, z;
  std::int64_t gate = 0;  ///< columns of dy when gated, else 0
  Activation activation = Activation::none;
  Rows<E> dz;
  template <int N>
  M2LM_DEVICE void at(std::int64_t row, std::int64_t vector) const {
    float g[N], a[N], slope[N];
    load_elements<N>(dy.at(row, vector * N), g);
    load_elements<N>(z.at(row, vector * N), a);
    M2LM_UNROLL
    for (int i = 0; i < N; ++i) slope[i] = g[i] * activation_slope(activation, a[i]);
    if (gate != 0) {
      float up[N];
      load_elements<N>(z.at(row, gate + vector * N), up);
      M2LM_UNROLL
      for (int i = 0; i < N; ++i) {
        slope[i] *= up[i];
        up[i] = g[i] * apply_activation(activation, a[i]);
      }
      store_elements<N>(dz.at(row, gate + vector * N), up);
    }
    store_elements<N>(dz.at(row, vector * N), slope);
  }
};

/// The rotation by the negative angles.
template <class E>
struct RotateRowBackward {
  Rows<E> dx;
  Rows<const float> cos, sin;
  std::uint32_t half = 0;  ///< pairs of a head
  template <int N>
  M2LM_DEVICE void at(std::int64_t row, std::int64_t vector) const {
    const auto pair = static_cast<std::uint32_t>(vector) * N, head = pair / half, i = pair % half;
    E* p = dx.at(row, std::int64_t{head} * half * 2 + i);
    float a[N], b[N], c[N], s[N];
    load_elements<N>(p, a);
    load_elements<N>(p + half, b);
    load_elements<N>(cos.at(row, i), c);
    load_elements<N>(sin.at(row, i), s);
    M2LM_UNROLL
    for (int j = 0; j < N; ++j) {
      const float x = a[j];
      a[j] = x * c[j] + b[j] * s[j];
      b[j] = b[j] * c[j] - x * s[j];
    }
    store_elements<N>(p, a);
    store_elements<N>(p + half, b);
  }
};

// ---- quantised weights --------------------------------------------------------------------------------------------------------------

/// What QuantisedLayout says of a matrix, for kernels.
struct QuantisedRows {
  const std::byte* data;
  std::int64_t row_tile_bytes, scales_at, rows, columns;
};

/// A block per tile: thread 8r + 4b + t writes columns 8t … 8t + 7 of block b of row r, so that 8 threads write 64 neighbours.
template <DType Format, class E>
M2LM_KERNEL void unpack_quantised_tiles(QuantisedRows matrix, E* to) {
  constexpr int tile_rows = static_cast<int>(QuantisedLayout::tile_rows), tile_columns = static_cast<int>(QuantisedLayout::tile_columns),
                tile_scales = static_cast<int>(QuantisedLayout::tile_scales);
  const int t = static_cast<int>(threadIdx.x) % 4, b = static_cast<int>(threadIdx.x) / 4 % 2, r = static_cast<int>(threadIdx.x) / 8;
  const int g = r % 8, half = r / 8, lane = 4 * g + t;
  const std::int64_t row = std::int64_t{blockIdx.x} * tile_rows + r, column = std::int64_t{blockIdx.y} * tile_columns + 32 * b + 8 * t;
  if (row >= matrix.rows) return;
  const std::byte* row_of_tiles = matrix.data + blockIdx.x * matrix.row_tile_bytes;
  const auto* scales = reinterpret_cast<const Half*>(row_of_tiles + matrix.scales_at) + std::int64_t{blockIdx.y} * tile_scales;
  const float scale = load(scales[4 * g + 2 * b + half]);
  int values[8];
  if constexpr (Format == DType::q8) {
    std::uint32_t words[2];
    load_words(row_of_tiles + std::int64_t{blockIdx.y} * 1024 + 512 * b + 16 * lane + 8 * half, words);
    M2LM_UNROLL
    for (int c = 0; c < 8; ++c) values[c] = static_cast<int>(words[c / 4] >> (8 * (c % 4)) & 0xffU) - 128;
  } else {
    static_assert(Format == DType::q4, "m2lm: quantised weights are q8 or q4");
    std::uint32_t word[1];
    load_words(row_of_tiles + std::int64_t{blockIdx.y} * 512 + 16 * lane + 4 * (2 * b + half), word);
    M2LM_UNROLL
    for (int c = 0; c < 8; ++c) values[c] = static_cast<int>(word[0] >> (4 * (c / 2) + 16 * (c % 2)) & 0xfU) - 8;
  }
  M2LM_UNROLL
  for (int c = 0; c < 8; ++c)
    if (column + c < matrix.columns) to[row * matrix.columns + column + c] = store<E>(scale * static_cast<float>(values[c]));
}

/// The rows of a matrix that is not gated, one after another. Returns `to`.
template <DType Format, class E>
const E* unpack_quantised(Device& device, const PackedMatrix& w, E* to) {
  const QuantisedLayout layout{Format, false, w.rows, w.cols};
  const QuantisedRows rows{w.data.get(), static_cast<std::int64_t>(layout.row_tile_bytes()), static_cast<std::int64_t>(layout.scales_at()), w.rows,
                           w.cols};
  launch(device, "unpack_quantised_tiles", unpack_quantised_tiles<Format, E>,
         {.grid_x = static_cast<unsigned>(layout.row_tiles()), .grid_y = static_cast<unsigned>(layout.column_tiles()), .block_x = 128}, rows, to);
  return to;
}

// ---- norms: a block per row, then a block per 32 columns --------------------------------------------------------------------------

/// What a row of a norm is scaled and shifted by.
struct RowStatistics {
  float mean;   ///< 0 of an RMSNorm
  float scale;  ///< 1/sqrt(variance + eps)
};

/// The gradient of a row's input, where dx is given, and its statistics, where they are wanted. A row is read once per sum: from memory
/// the first time, then from the caches.
template <int N, bool Centred, class E>
M2LM_KERNEL M2LM_LAUNCH_BOUNDS(backward_policy.threads) void norm_backward_rows(Rows<const E> dy, Rows<const E> x, const E* weight, float eps,
                                                                                Rows<E> dx, bool accumulate, RowStatistics* statistics,
                                                                                unsigned vectors) {
  const std::int64_t row = blockIdx.x;
  const auto n = static_cast<float>(vectors * N);
  float mean = 0;
  if constexpr (Centred) {
    float sum = 0;
    for (unsigned v = threadIdx.x; v < vectors; v += blockDim.x) {
      float a[N];
      load_elements<N>(x.at(row, std::int64_t{v} * N), a);
      M2LM_UNROLL
      for (int i = 0; i < N; ++i) sum += a[i];
    }
    mean = block_sum(sum) / n;
  }
  // Along x − mean, a gradient only changes the length of the row, which the norm takes out again.
  float squares = 0, gradients = 0, along = 0;
  for (unsigned v = threadIdx.x; v < vectors; v += blockDim.x) {
    float a[N], g[N], w[N];
    load_elements<N>(x.at(row, std::int64_t{v} * N), a);
    load_elements<N>(dy.at(row, std::int64_t{v} * N), g);
    load_elements<N>(weight + std::size_t{v} * N, w);
    M2LM_UNROLL
    for (int i = 0; i < N; ++i) {
      squares += (a[i] - mean) * (a[i] - mean);
      gradients += g[i] * w[i];
      along += g[i] * w[i] * (a[i] - mean);
    }
  }
  const float scale = 1.0F / sqrtf(block_sum(squares) / n + eps);
  if (statistics != nullptr && threadIdx.x == 0) statistics[row] = {mean, scale};
  if (dx.data == nullptr) return;
  const float mean_gradient = Centred ? block_sum(gradients) / n : 0.0F;
  const float mean_along = block_sum(along) * scale / n;
  for (unsigned v = threadIdx.x; v < vectors; v += blockDim.x) {
    float a[N], g[N], w[N], before[N] = {};
    load_elements<N>(x.at(row, std::int64_t{v} * N), a);
    load_elements<N>(dy.at(row, std::int64_t{v} * N), g);
    load_elements<N>(weight + std::size_t{v} * N, w);
    if (accumulate) load_elements<N>(dx.at(row, std::int64_t{v} * N), before);
    M2LM_UNROLL
    for (int i = 0; i < N; ++i) before[i] += scale * (g[i] * w[i] - mean_gradient - (a[i] - mean) * scale * mean_along);
    store_elements<N>(dx.at(row, std::int64_t{v} * N), before);
  }
}

/// Where they are given: dbias += Σ rows of dy, dweight += Σ rows of dy·(x − mean)·scale. Lane l of a column adds rows l, l + row_lanes, …;
/// then the lanes' sums are added in their order.
template <class E>
M2LM_KERNEL M2LM_LAUNCH_BOUNDS(warp_size* backward_policy.row_lanes) void add_column_sums(Rows<const E> dy, Rows<const E> x,
                                                                                          const RowStatistics* statistics, std::int64_t rows,
                                                                                          std::int64_t columns, E* dweight, E* dbias) {
  M2LM_SHARED float of_lane[2][backward_policy.row_lanes][warp_size];
  const std::int64_t column = std::int64_t{blockIdx.x} * warp_size + threadIdx.x;
  float sums[2] = {0, 0};
  if (column < columns)
    for (std::int64_t row = threadIdx.y; row < rows; row += backward_policy.row_lanes) {
      const float g = load(*dy.at(row, column));
      sums[0] += g;
      if (dweight != nullptr) sums[1] += g * (load(*x.at(row, column)) - statistics[row].mean) * statistics[row].scale;
    }
  of_lane[0][threadIdx.y][threadIdx.x] = sums[0];
  of_lane[1][threadIdx.y][threadIdx.x] = sums[1];
  __syncthreads();
  if (threadIdx.y != 0 || column >= columns) return;
  for (unsigned lane = 1; lane < backward_policy.row_lanes; ++lane) {
    sums[0] += of_lane[0][lane][threadIdx.x];
    sums[1] += of_lane[1][lane][threadIdx.x];
  }
  if (dbias != nullptr) dbias[column] = store<E>(load(dbias[column]) + sums[0]);
  if (dweight != nullptr) dweight[column] = store<E>(load(dweight[column]) + sums[1]);
}

template <class E>
void launch_column_sums(Device& device, Matrix<const E> dy, Matrix<const E> x, const RowStatistics* statistics, E* dweight, E* dbias) {
  if (dweight == nullptr && dbias == nullptr) return;
  const auto blocks = static_cast<unsigned>((dy.extent(1) + warp_size - 1) / warp_size);
  launch(device, "add_column_sums", add_column_sums<E>, {.grid_x = blocks, .block_x = warp_size, .block_y = backward_policy.row_lanes}, rows_of(dy),
         rows_of(x), statistics, dy.extent(0), dy.extent(1), dweight, dbias);
}

template <bool Centred, class E>
void norm_backward(Device& device, Matrix<const E> dy, Matrix<const E> x, const E* weight, float eps, Matrix<E> dx, bool accumulate, E* dweight,
                   E* dbias, void* scratch) {
  if (x.elements() == 0) return;
  constexpr int N = vector_elements<E>;
  const bool whole_vectors = rows_aligned(dy) && rows_aligned(x) && rows_aligned(dx) && aligned16(weight) && x.extent(1) % N == 0;
  auto* statistics = dweight != nullptr ? static_cast<RowStatistics*>(scratch) : nullptr;
  if (dx.data() != nullptr || statistics != nullptr) {
    const LaunchShape shape{.grid_x = static_cast<unsigned>(x.extent(0)), .block_x = backward_policy.threads};
    launch(device, "norm_backward_rows", whole_vectors ? norm_backward_rows<N, Centred, E> : norm_backward_rows<1, Centred, E>, shape, rows_of(dy),
           rows_of(x), weight, eps, rows_of(dx), accumulate, statistics, static_cast<unsigned>(x.extent(1) / (whole_vectors ? N : 1)));
  }
  launch_column_sums(device, dy, x, statistics, dweight, dbias);
}

// ---- attention ------------------------------------------------------------------------------------------------------------------

/// The softmax of a query in a head: exp(score − log_sum) is a probability.
struct SoftmaxStatistics {
  float log_sum;  ///< log Σ exp(score)
  float mean;     ///< dy·y = Σ p·dp, what every dp is compared with
};

template <class E>
struct AttentionBackwardJob {
  Rows<const E> q, k, v, y, dy;
  Rows<E> dq, dk, dv;
  SoftmaxStatistics* statistics;  ///< [heads, queries]
  std::int64_t queries, keys, window;
  bool causal;  ///< also where there is a window
  int head_dim, group;
  float scale;

  M2LM_DEVICE bool sees(std::int64_t query, std::int64_t key) const {
    return query < queries && key < keys && (!causal || (key <= query && (window == 0 || key > query - window)));
  }
};

/// `rows` rows of head_dim floats, each warp every eighth; zeros where the matrix has ended.
template <class E>
M2LM_DEVICE void load_tile(Rows<E> from, std::int64_t first, std::int64_t end, std::int64_t column, int rows, int head_dim, float* to) {
  const int stride = AttentionBackwardTiles::stride(head_dim);
  for (int row = static_cast<int>(warp_index()); row < rows; row += AttentionBackwardTiles::warps)
    for (int c = static_cast<int>(lane_index()); c < head_dim; c += static_cast<int>(warp_size))
      to[row * stride + c] = first + row < end ? load(*from.at(first + row, column + c)) : 0.0F;
}
template <class E>
M2LM_DEVICE void store_tile(const float* from, Rows<E> to, std::int64_t first, std::int64_t end, std::int64_t column, int rows, int head_dim) {
  const int stride = AttentionBackwardTiles::stride(head_dim);
  for (int row = static_cast<int>(warp_index()); row < rows; row += AttentionBackwardTiles::warps)
    for (int c = static_cast<int>(lane_index()); c < head_dim; c += static_cast<int>(warp_size))
      if (first + row < end) *to.at(first + row, column + c) = store<E>(from[row * stride + c]);
}
M2LM_DEVICE void clear_tile(float* tile, int rows, int head_dim) {
  for (int i = static_cast<int>(thread_index()); i < rows * AttentionBackwardTiles::stride(head_dim); i += static_cast<int>(blockDim.x)) tile[i] = 0;
}

/// out[r] = row r of `rows` times `other`.
template <int R>
M2LM_DEVICE void dot_rows(const float* rows, const float* other, int head_dim, float (&out)[R]) {
  const int stride = AttentionBackwardTiles::stride(head_dim);
  M2LM_UNROLL
  for (int r = 0; r < R; ++r) out[r] = 0;
  for (int c = 0; c < head_dim; ++c) {
    M2LM_UNROLL
    for (int r = 0; r < R; ++r) out[r] += rows[r * stride + c] * other[c];
  }
}

/// Probabilities and their gradients of R queries, from `query` on, and one key: p and ds, 0 where it is not seen.
template <int R, class E>
M2LM_DEVICE void score_gradients(const AttentionBackwardJob<E>& job, const float* q, const float* dy, const float* k, const float* v,
                                 std::int64_t query, std::int64_t key, const SoftmaxStatistics (&of)[R], float (&p)[R], float (&ds)[R]) {
  dot_rows(q, k, job.head_dim, p);
  dot_rows(dy, v, job.head_dim, ds);
  M2LM_UNROLL
  for (int r = 0; r < R; ++r) {
    p[r] = job.sees(query + r, key) ? expf(p[r] * job.scale - of[r].log_sum) : 0.0F;
    ds[r] = job.sees(query + r, key) ? p[r] * (ds[r] - of[r].mean) * job.scale : 0.0F;
  }
}

/// A block has the queries of a tile in one head, a warp R of them. It goes over the keys that they see twice: for the softmax's
/// statistics, which it leaves to attention_key_gradients, and for dq = Σ ds·k.
template <int R, class E>
M2LM_KERNEL M2LM_LAUNCH_BOUNDS(warp_size* AttentionBackwardTiles::warps) void attention_query_gradients(AttentionBackwardJob<E> job) {
  constexpr AttentionBackwardTiles tiles{R};
  const int stride = AttentionBackwardTiles::stride(job.head_dim), d = job.head_dim, lane = static_cast<int>(lane_index());
  float* q = dynamic_shared<float>();
  float* dy = q + tiles.queries() * stride;
  float* dq = dy + tiles.queries() * stride;
  float* k = dq + tiles.queries() * stride;
  float* v = k + tiles.keys * stride;
  const int mine = static_cast<int>(warp_index()) * R;  // the first of the warp's rows
  float* square = v + tiles.keys * stride + mine * tiles.square_stride;

  const std::int64_t first = std::int64_t{blockIdx.x} * tiles.queries(), head = blockIdx.y;
  const std::int64_t column = head * d, kv_column = head / job.group * d;
  load_tile(job.q, first, job.queries, column, tiles.queries(), d, q);
  load_tile(job.dy, first, job.queries, column, tiles.queries(), d, dy);
  clear_tile(dq, tiles.queries(), d);
  __syncthreads();

  SoftmaxStatistics of[R];
  M2LM_UNROLL
  for (int r = 0; r < R; ++r) {
    float sum = 0;
    if (first + mine + r < job.queries)
      for (int c = lane; c < d; c += static_cast<int>(warp_size)) sum += dy[(mine + r) * stride + c] * load(*job.y.at(first + mine + r, column + c));
    of[r].mean = warp_sum(sum);
  }

  const std::int64_t last = first + tiles.queries() < job.queries ? first + tiles.queries() : job.queries;
  const std::int64_t end = job.causal && last < job.keys ? last : job.keys;
  const std::int64_t seen = job.window > 0 && first >= job.window ? first - job.window + 1 : 0, begin = seen / tiles.keys * tiles.keys;

  float largest[R], sums[R];
  M2LM_UNROLL
  for (int r = 0; r < R; ++r) {
    largest[r] = -INFINITY;
    sums[r] = 0;
  }
  for (std::int64_t key = begin; key < end; key += tiles.keys) {
    __syncthreads();  // k may be written again
    load_tile(job.k, key, job.keys, kv_column, tiles.keys, d, k);
    __syncthreads();
    float scores[R];
    dot_rows(q + mine * stride, k + lane * stride, d, scores);
    M2LM_UNROLL
    for (int r = 0; r < R; ++r) {
      const bool sees = job.sees(first + mine + r, key + lane);
      const float score = scores[r] * job.scale, top = fmaxf(largest[r], warp_max(sees ? score : -INFINITY));
      // Until the first key is seen there is nothing to add, and no finite number to subtract.
      const float sum = warp_sum(sees ? expf(score - top) : 0.0F);
      sums[r] = (largest[r] == -INFINITY ? 0.0F : sums[r] * expf(largest[r] - top)) + sum;
      largest[r] = top;
    }
  }
  M2LM_UNROLL
  for (int r = 0; r < R; ++r) {
    of[r].log_sum = largest[r] + logf(sums[r]);
    if (lane == 0 && first + mine + r < job.queries) job.statistics[head * job.queries + first + mine + r] = of[r];
  }

  for (std::int64_t key = begin; key < end; key += tiles.keys) {
    __syncthreads();  // k and v may be written again
    load_tile(job.k, key, job.keys, kv_column, tiles.keys, d, k);
    load_tile(job.v, key, job.keys, kv_column, tiles.keys, d, v);
    __syncthreads();
    float p[R], ds[R];
    score_gradients(job, q + mine * stride, dy + mine * stride, k + lane * stride, v + lane * stride, first + mine, key + lane, of, p, ds);
    M2LM_UNROLL
    for (int r = 0; r < R; ++r) square[r * tiles.square_stride + lane] = ds[r];
    __syncwarp();
    // Lanes change from keys to columns.
    for (int c = lane; c < d; c += static_cast<int>(warp_size)) {
      float sum[R];
      M2LM_UNROLL
      for (int r = 0; r < R; ++r) sum[r] = dq[(mine + r) * stride + c];
      for (int j = 0; j < tiles.keys; ++j) {
        M2LM_UNROLL
        for (int r = 0; r < R; ++r) sum[r] += square[r * tiles.square_stride + j] * k[j * stride + c];
      }
      M2LM_UNROLL
      for (int r = 0; r < R; ++r) dq[(mine + r) * stride + c] = sum[r];
    }
  }
  __syncthreads();
  store_tile(dq, job.dq, first, job.queries, column, tiles.queries(), d);
}

/// A block has the keys of a tile in one kv head. It goes over the heads of the group and, in each, over the queries that see the keys,
/// in ascending order: dv = Σ p·dy, dk = Σ ds·q. A warp computes the scores of R queries, then adds to its share of the keys.
template <int R, class E>
M2LM_KERNEL M2LM_LAUNCH_BOUNDS(warp_size* AttentionBackwardTiles::warps) void attention_key_gradients(AttentionBackwardJob<E> job) {
  constexpr AttentionBackwardTiles tiles{R};
  constexpr int shared_keys = tiles.keys / tiles.warps;
  const int stride = AttentionBackwardTiles::stride(job.head_dim), d = job.head_dim, lane = static_cast<int>(lane_index());
  float* q = dynamic_shared<float>();
  float* dy = q + tiles.queries() * stride;
  float* k = dy + tiles.queries() * stride;
  float* v = k + tiles.keys * stride;
  float* dk = v + tiles.keys * stride;
  float* dv = dk + tiles.keys * stride;
  float* p_square = dv + tiles.keys * stride;
  float* ds_square = p_square + tiles.queries() * tiles.square_stride;
  const int warp = static_cast<int>(warp_index()), mine = warp * R, my_keys = warp * shared_keys;

  const std::int64_t first = std::int64_t{blockIdx.x} * tiles.keys, kv_head = blockIdx.y, kv_column = kv_head * d;
  load_tile(job.k, first, job.keys, kv_column, tiles.keys, d, k);
  load_tile(job.v, first, job.keys, kv_column, tiles.keys, d, v);
  clear_tile(dk, tiles.keys, d);
  clear_tile(dv, tiles.keys, d);

  const std::int64_t last = first + tiles.keys - 1;
  const std::int64_t begin = job.causal ? first / tiles.queries() * tiles.queries() : 0;
  const std::int64_t end = job.window > 0 && last + job.window < job.queries ? last + job.window : job.queries;
  for (std::int64_t head = kv_head * job.group; head < (kv_head + 1) * job.group; ++head)
    for (std::int64_t query = begin; query < end; query += tiles.queries()) {
      __syncthreads();  // q, dy and the squares may be written again
      load_tile(job.q, query, job.queries, head * d, tiles.queries(), d, q);
      load_tile(job.dy, query, job.queries, head * d, tiles.queries(), d, dy);
      __syncthreads();
      SoftmaxStatistics of[R];
      M2LM_UNROLL
      for (int r = 0; r < R; ++r) {
        const std::int64_t row = query + mine + r;
        of[r] = row < job.queries ? job.statistics[head * job.queries + row] : SoftmaxStatistics{0, 0};
      }
      float p[R], ds[R];
      score_gradients(job, q + mine * stride, dy + mine * stride, k + lane * stride, v + lane * stride, query + mine, first + lane, of, p, ds);
      M2LM_UNROLL
      for (int r = 0; r < R; ++r) {
        p_square[(mine + r) * tiles.square_stride + lane] = p[r];
        ds_square[(mine + r) * tiles.square_stride + lane] = ds[r];
      }
      __syncthreads();
      for (int c = lane; c < d; c += static_cast<int>(warp_size)) {
        float of_k[shared_keys], of_v[shared_keys];
        M2LM_UNROLL
        for (int j = 0; j < shared_keys; ++j) {
          of_k[j] = dk[(my_keys + j) * stride + c];
          of_v[j] = dv[(my_keys + j) * stride + c];
        }
        for (int i = 0; i < tiles.queries(); ++i) {
          M2LM_UNROLL
          for (int j = 0; j < shared_keys; ++j) {
            of_k[j] += ds_square[i * tiles.square_stride + my_keys + j] * q[i * stride + c];
            of_v[j] += p_square[i * tiles.square_stride + my_keys + j] * dy[i * stride + c];
          }
        }
        M2LM_UNROLL
        for (int j = 0; j < shared_keys; ++j) {
          dk[(my_keys + j) * stride + c] = of_k[j];
          dv[(my_keys + j) * stride + c] = of_v[j];
        }
      }
    }
  __syncthreads();
  store_tile(dk, job.dk, first, job.keys, kv_column, tiles.keys, d);
  store_tile(dv, job.dv, first, job.keys, kv_column, tiles.keys, d);
}

template <int R, class E>
void launch_attention_backward(Device& device, const AttentionBackwardJob<E>& job, std::int64_t heads) {
  constexpr AttentionBackwardTiles tiles{R};
  const auto blocks = [](std::int64_t rows, int tile) { return static_cast<unsigned>((rows + tile - 1) / tile); };
  LaunchShape shape{.block_x = warp_size * tiles.warps};
  if (job.queries != 0) {
    shape.grid_x = blocks(job.queries, tiles.queries());
    shape.grid_y = static_cast<unsigned>(heads);
    shape.shared_bytes = tiles.query_bytes(job.head_dim);
    launch(device, "attention_query_gradients", attention_query_gradients<R, E>, shape, job);
  }
  shape.grid_x = blocks(job.keys, tiles.keys);
  shape.grid_y = static_cast<unsigned>(heads / job.group);
  shape.shared_bytes = tiles.key_bytes(job.head_dim);
  launch(device, "attention_key_gradients", attention_key_gradients<R, E>, shape, job);
}

// ---- rows of a table, and the loss ------------------------------------------------------------------------------------------------

/// Block i adds all rows of its id, in their order, if i is the first of them.
template <class E>
M2LM_KERNEL M2LM_LAUNCH_BOUNDS(backward_policy.threads) void add_rows_of_id(Rows<const E> rows, const std::int32_t* ids, unsigned count,
                                                                            Rows<E> table, std::int64_t table_rows, std::int64_t columns) {
  const unsigned mine = blockIdx.x;
  const std::int32_t id = ids[mine];
  float repeated = 0;
  for (unsigned i = threadIdx.x; i < mine; i += blockDim.x)
    if (ids[i] == id) repeated = 1;
  if (block_max(repeated) != 0 || id < 0 || id >= table_rows) return;
  for (std::int64_t column = threadIdx.x; column < columns; column += blockDim.x) {
    float sum = load(*table.at(id, column));
    for (unsigned i = mine; i < count; ++i)
      if (ids[i] == id) sum += load(*rows.at(i, column));
    *table.at(id, column) = store<E>(sum);
  }
}

/// A block per row, which is read three times: for its largest logit, for Σ exp, for the gradient. Where dlogits is logits, a thread
/// overwrites what it alone reads; the target's logit is read before.
template <int N, class E>
M2LM_KERNEL M2LM_LAUNCH_BOUNDS(backward_policy.threads) void cross_entropy_rows(Rows<const E> logits, const std::int32_t* targets, float scale,
                                                                                float* losses, Rows<E> dlogits, unsigned vectors) {
  const std::int64_t row = blockIdx.x;
  const std::int32_t target = targets[row];
  const bool ignored = target == ignored_target;
  const float of_target = ignored ? 0.0F : load(*logits.at(row, target));
  const auto visit = [&](const auto& f) {
    for (unsigned v = threadIdx.x; v < vectors; v += blockDim.x) {
      float values[N];
      load_elements<N>(logits.at(row, std::int64_t{v} * N), values);
      f(std::int64_t{v} * N, values);
    }
  };
  float largest = -INFINITY, sum = 0;
  visit([&](std::int64_t, const float(&x)[N]) {
    M2LM_UNROLL
    for (int i = 0; i < N; ++i) largest = fmaxf(largest, x[i]);
  });
  largest = block_max(largest);
  visit([&](std::int64_t, const float(&x)[N]) {
    M2LM_UNROLL
    for (int i = 0; i < N; ++i) sum += expf(x[i] - largest);
  });
  sum = block_sum(sum);
  if (threadIdx.x == 0) losses[row] = ignored ? 0.0F : logf(sum) + (largest - of_target);
  if (dlogits.data == nullptr) return;
  visit([&](std::int64_t column, float(&x)[N]) {
    M2LM_UNROLL
    for (int i = 0; i < N; ++i) x[i] = ignored ? 0.0F : scale * (expf(x[i] - largest) / sum - (column + i == target ? 1.0F : 0.0F));
    store_elements<N>(dlogits.at(row, column), x);
  });
}

}  // namespace detail

// ---- what the host calls ------------------------------------------------------------------------------------------------------------

template <class E>
std::size_t linear_input_gradient_scratch(const PackedMatrix& w) {
  return is_block_format(w.format) ? static_cast<std::size_t>(w.rows * w.cols) * sizeof(E) : 0;
}

template <class E>
void linear_input_gradient(Device& device, Matrix<const E> dy, const PackedMatrix& w, Matrix<E> dx, bool accumulate, void* scratch) {
  if (dx.elements() == 0) return;
  const void* rows = w.data.get();
  if (w.format == DType::q8) rows = detail::unpack_quantised<DType::q8>(device, w, static_cast<E*>(scratch));
  if (w.format == DType::q4) rows = detail::unpack_quantised<DType::q4>(device, w, static_cast<E*>(scratch));
  device.multiply({.dtype = dtype_of<E>,
                   .x = dy.data(),
                   .ldx = dy.stride(0),
                   .w = rows,
                   .transpose_w = true,
                   .m = dx.extent(0),
                   .n = w.cols,
                   .k = w.rows,
                   .residual = accumulate ? dx.data() : nullptr,
                   .ld_residual = dx.stride(0),
                   .y = dx.data(),
                   .ldy = dx.stride(0)});
}

template <class E>
void linear_weight_gradient(Device& device, Matrix<const E> x, Matrix<const E> dy, Matrix<E> dw, E* db) {
  if (dy.elements() == 0) return;
  if (dw.data() != nullptr)
    device.multiply({.dtype = dtype_of<E>,
                     .x = dy.data(),
                     .ldx = dy.stride(0),
                     .transpose_x = true,
                     .w = x.data(),
                     .ldw = x.stride(0),
                     .transpose_w = true,
                     .m = dw.extent(0),
                     .n = dw.extent(1),
                     .k = x.extent(0),
                     .residual = dw.data(),
                     .ld_residual = dw.stride(0),
                     .y = dw.data(),
                     .ldy = dw.stride(0)});
  detail::launch_column_sums<E>(device, dy, {}, nullptr, nullptr, db);
}

template <class E>
void activation_backward(Device& device, Matrix<const E> dy, Matrix<const E> z, Activation activation, Matrix<E> dz) {
  const std::int64_t n = dy.extent(1);
  const bool whole_vectors = detail::rows_aligned(dy) && detail::rows_aligned(z) && detail::rows_aligned(dz) && n % detail::vector_elements<E> == 0;
  const detail::ActivateRowBackward<E> body{detail::rows_of(dy), detail::rows_of(z), z.extent(1) == n ? 0 : n, activation, detail::rows_of(dz)};
  detail::launch_rows<E>(device, "activation_backward", body, dy.extent(0), n, whole_vectors);
}

inline std::size_t norm_backward_scratch(std::int64_t rows) { return static_cast<std::size_t>(rows) * sizeof(detail::RowStatistics); }

template <class E>
void rms_norm_backward(Device& device, Matrix<const E> dy, Matrix<const E> x, const E* weight, float eps, Matrix<E> dx, bool accumulate, E* dweight,
                       void* scratch) {
  detail::norm_backward<false, E>(device, dy, x, weight, eps, dx, accumulate, dweight, nullptr, scratch);
}

template <class E>
void layer_norm_backward(Device& device, Matrix<const E> dy, Matrix<const E> x, const E* weight, float eps, Matrix<E> dx, bool accumulate, E* dweight,
                         E* dbias, void* scratch) {
  detail::norm_backward<true, E>(device, dy, x, weight, eps, dx, accumulate, dweight, dbias, scratch);
}

template <class E>
void rope_backward(Device& device, Matrix<E> dx, std::int64_t head_dim, Matrix<const float> cos, Matrix<const float> sin) {
  const std::int64_t half = head_dim / 2;
  const bool whole_vectors =
      detail::rows_aligned(dx) && detail::rows_aligned(cos) && detail::rows_aligned(sin) && half % detail::vector_elements<E> == 0;
  const detail::RotateRowBackward<E> body{detail::rows_of(dx), detail::rows_of(cos), detail::rows_of(sin), static_cast<std::uint32_t>(half)};
  detail::launch_rows<E>(device, "rope_backward", body, dx.extent(0), dx.extent(1) / 2, whole_vectors);
}

inline std::size_t attention_backward_scratch(std::int64_t queries, std::int64_t heads) {
  return static_cast<std::size_t>(queries * heads) * sizeof(detail::SoftmaxStatistics);
}

template <class E>
void attention_backward(Device& device, Matrix<const E> q, Matrix<const E> k, Matrix<const E> v, Matrix<const E> y, Matrix<const E> dy,
                        std::int64_t head_dim, AttentionMask mask, float scale, Matrix<E> dq, Matrix<E> dk, Matrix<E> dv, void* scratch) {
  const AttentionBackwardTiles tiles = attention_backward_tiles(device.properties().shared_bytes_per_block, head_dim);
  require<OptionError>(tiles.rows_per_warp != 0, "m2lm::cuda::attention_backward: heads of ", head_dim, " do not fit in the ",
                       device.properties().shared_bytes_per_block, " bytes of shared memory that a block of this device has");
  const std::int64_t heads = q.extent(1) / head_dim;
  const detail::AttentionBackwardJob<E> job{.q = detail::rows_of(q),
                                            .k = detail::rows_of(k),
                                            .v = detail::rows_of(v),
                                            .y = detail::rows_of(y),
                                            .dy = detail::rows_of(dy),
                                            .dq = detail::rows_of(dq),
                                            .dk = detail::rows_of(dk),
                                            .dv = detail::rows_of(dv),
                                            .statistics = static_cast<detail::SoftmaxStatistics*>(scratch),
                                            .queries = q.extent(0),
                                            .keys = k.extent(0),
                                            .window = mask.window,
                                            .causal = mask.causal || mask.window > 0,
                                            .head_dim = static_cast<int>(head_dim),
                                            .group = static_cast<int>(q.extent(1) / k.extent(1)),
                                            .scale = scale};
  if (tiles.rows_per_warp == tiles.most_rows_per_warp)
    detail::launch_attention_backward<AttentionBackwardTiles::most_rows_per_warp>(device, job, heads);
  else
    detail::launch_attention_backward<1>(device, job, heads);
}

template <class E>
void scatter_add_rows(Device& device, Matrix<const E> rows, const std::int32_t* ids, Matrix<E> table) {
  if (rows.elements() == 0) return;
  const auto count = static_cast<unsigned>(rows.extent(0));
  launch(device, "add_rows_of_id", detail::add_rows_of_id<E>, {.grid_x = count, .block_x = backward_policy.threads}, detail::rows_of(rows), ids,
         count, detail::rows_of(table), table.extent(0), table.extent(1));
}

template <class E>
void cross_entropy(Device& device, Matrix<const E> logits, const std::int32_t* targets, float scale, float* losses, Matrix<E> dlogits) {
  if (logits.elements() == 0) return;
  constexpr int N = detail::vector_elements<E>;
  const bool whole_vectors = detail::rows_aligned(logits) && detail::rows_aligned(dlogits) && logits.extent(1) % N == 0;
  const LaunchShape shape{.grid_x = static_cast<unsigned>(logits.extent(0)), .block_x = backward_policy.threads};
  launch(device, "cross_entropy_rows", whole_vectors ? detail::cross_entropy_rows<N, E> : detail::cross_entropy_rows<1, E>, shape,
         detail::rows_of(logits), targets, scale, losses, detail::rows_of(dlogits),
         static_cast<unsigned>(logits.extent(1) / (whole_vectors ? N : 1)));
}

}  // namespace m2lm::cuda
