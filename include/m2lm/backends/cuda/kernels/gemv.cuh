// Products of a few rows of x with weights of a float format, which are read once.
// Floor: backends. May include: core, ops.
#pragma once

#include <m2lm/backends/cuda/kernels/epilogue.cuh>

namespace m2lm::inline M2LM_ABI::cuda {

/// How gemv is launched. Its time is that of reading the weights, so what counts is how many bytes are on their way at once: about
/// bandwidth × latency, on an H200 4.3 TB/s × 0.7 µs = 23 KB per multiprocessor. A warp has 2 rows × 4 pieces × 512 B = 4 KB.
struct GemvPolicy {
  int warps = 8;                      ///< of a block
  int rows = 2;                       ///< that a warp takes together: x is read once for both. Of a gated matrix a pair
  int ahead = 4;                      ///< pieces of 16 bytes of each row that a lane has asked for before it uses the first
  int most_tokens = 8;                ///< rows of x; more are a product of matrices
  int warps_per_multiprocessor = 32;  ///< that are wanted: rows are cut until there are so many
};
inline constexpr GemvPolicy gemv_policy{};

/// How many warps share a row: no more than are needed to fill the device, and none without a full batch of pieces. Does not depend on
/// the number of tokens, and so a token's result does not either.
constexpr int warps_per_row(std::int64_t rows, std::int64_t columns, std::size_t element_bytes, int multiprocessors) {
  const std::int64_t warps = (rows + gemv_policy.rows - 1) / gemv_policy.rows,
                     wanted = std::int64_t{multiprocessors} * gemv_policy.warps_per_multiprocessor;
  const std::int64_t batches = columns * static_cast<std::int64_t>(element_bytes) / (gemv_policy.ahead * 512);
  int share = 1;
  while (share < gemv_policy.warps && warps * share < wanted && batches >= std::int64_t{share} * 2) share *= 2;
  return share;
}

/// N consecutive weights of a row, as they are loaded: 16 bytes, or one element of any address.
template <class E, int N>
struct WeightPiece {
  static_assert(N * sizeof(E) == 16);
  Bytes16 raw;

  M2LM_DEVICE void read(const E* p) { raw = load16_streaming(p); }
  M2LM_DEVICE void values(float (&out)[N]) const {
    M2LM_UNROLL
    for (int i = 0; i < 4; ++i) {
      if constexpr (std::is_same_v<E, float>)
        out[i] = float_of_bits(raw.words[i]);
      else
        unpack<E>(raw.words[i], out[2 * i], out[2 * i + 1]);
    }
  }
};
template <class E>
struct WeightPiece<E, 1> {
  float raw;

  M2LM_DEVICE void read(const E* p) { raw = load(*p); }
  M2LM_DEVICE void values(float (&out)[1]) const { out[0] = raw; }
};

/// y = epilogue(x·wᵀ) for up to Tokens rows of x. w [rows, columns] in rows, read in pieces of N elements.
///
/// `share` warps take two rows of w together: the pieces of the rows go to the lanes of the first warp, of the second, … and round
/// again, so a warp reads 512 consecutive bytes at a time. Each lane sums its pieces in ascending order; then the lanes are summed,
/// then the warps. x comes from the L1 cache, 16 bytes per lane for both rows.
template <class E, int Tokens, int N>
M2LM_KERNEL void M2LM_LAUNCH_BOUNDS(gemv_policy.warps * 32, 2)
    gemv(const E* __restrict__ w, int columns, const E* __restrict__ x, std::int64_t ldx, int tokens, int share, FusedEpilogue<E> epilogue) {
  constexpr int rows = gemv_policy.rows, ahead = gemv_policy.ahead;
  M2LM_SHARED float partial[gemv_policy.warps][rows * Tokens];
  const int warp = static_cast<int>(warp_index()), lane = static_cast<int>(lane_index());
  const int groups = gemv_policy.warps / share, outputs_of_group = epilogue.gated ? 1 : rows;
  const std::int64_t first_output = static_cast<std::int64_t>(blockIdx.x) * groups * outputs_of_group;

  const E* row[rows];
  M2LM_UNROLL
  for (int r = 0; r < rows; ++r) {
    const std::int64_t output = first_output + warp / share * outputs_of_group + (epilogue.gated ? 0 : r);
    const std::int64_t there = output < epilogue.outputs ? output : epilogue.outputs - 1;  // a row too many is computed, not stored
    row[r] = w + (there + (epilogue.gated ? r * epilogue.outputs : 0)) * columns;
  }

  float sum[rows][Tokens] = {};
  const int stride = share * 32 * N;
  // One batch from column `begin` on; `whole`: no piece of it lies behind the row, so that nothing has to be asked between the loads.
  const auto batch = [&](int begin, auto whole) {
    WeightPiece<E, N> piece[ahead][rows];
    M2LM_UNROLL
    for (int a = 0; a < ahead; ++a) {
      M2LM_UNROLL
      for (int r = 0; r < rows; ++r)
        if (whole.value || begin + a * stride < columns) piece[a][r].read(row[r] + begin + a * stride);
    }
    M2LM_UNROLL
    for (int a = 0; a < ahead; ++a) {
      const int column = begin + a * stride;
      if (!whole.value && column >= columns) break;
      float weight[rows][N];
      M2LM_UNROLL
      for (int r = 0; r < rows; ++r) piece[a][r].values(weight[r]);
      M2LM_UNROLL
      for (int t = 0; t < Tokens; ++t) {
        if (Tokens > 2 && t >= tokens) break;  // 1 and 2 are met exactly
        float input[N];
        load_piece<N>(x + t * ldx + column, input);
        M2LM_UNROLL
        for (int i = 0; i < N; ++i) {
          M2LM_UNROLL
          for (int r = 0; r < rows; ++r) sum[r][t] += weight[r][i] * input[i];
        }
      }
    }
  };
  const int of_warp = warp % share * 32 * N, whole_steps = (columns - of_warp - 32 * N + stride) / stride;  // in which all lanes have a piece
  int begin = of_warp + lane * N;
  for (int i = 0; i < whole_steps / ahead; ++i, begin += stride * ahead) batch(begin, std::true_type{});
  for (; begin < columns; begin += stride * ahead) batch(begin, std::false_type{});

  M2LM_UNROLL
  for (int r = 0; r < rows; ++r) {
    M2LM_UNROLL
    for (int t = 0; t < Tokens; ++t) {
      const float total = warp_sum(sum[r][t]);
      if (lane == 0) partial[warp][r * Tokens + t] = total;
    }
  }
  __syncthreads();
  const int outputs = groups * outputs_of_group, token = static_cast<int>(thread_index()) / outputs,
            local = static_cast<int>(thread_index()) % outputs;
  if (token >= tokens || first_output + local >= epilogue.outputs) return;
  const int first_warp = local / outputs_of_group * share, first_sum = local % outputs_of_group * Tokens + token;
  float first = 0, second = 0;
  for (int s = 0; s < share; ++s) {
    first += partial[first_warp + s][first_sum];
    if (epilogue.gated) second += partial[first_warp + s][Tokens + token];
  }
  epilogue.finish(token, first_output + local, first, second);
}

/// As gemv says, for at most gemv_policy.most_tokens rows of x.
template <class E>
void enqueue_gemv(Device& device, Matrix<const E> x, const E* w, std::int64_t rows, const FusedEpilogue<E>& epilogue) {
  constexpr int piece = 16 / static_cast<int>(sizeof(E));
  const std::int64_t columns = x.extent(1), tokens = x.extent(0);
  const bool pieces = columns % piece == 0 && in_pieces(x.data(), x.stride(0), piece);
  const int share = warps_per_row(rows, columns, sizeof(E), device.properties().multiprocessors);
  const std::int64_t outputs_of_block = static_cast<std::int64_t>(gemv_policy.warps / share) * (epilogue.gated ? 1 : gemv_policy.rows);
  const LaunchShape shape{.grid_x = static_cast<unsigned>((epilogue.outputs + outputs_of_block - 1) / outputs_of_block),
                          .block_x = static_cast<unsigned>(gemv_policy.warps * 32)};
  const auto kernel = !pieces       ? gemv<E, 8, 1>
                      : tokens == 1 ? gemv<E, 1, piece>
                      : tokens == 2 ? gemv<E, 2, piece>
                      : tokens <= 4 ? gemv<E, 4, piece>
                                    : gemv<E, 8, piece>;
  launch(device, "gemv", kernel, shape, w, static_cast<int>(columns), x.data(), x.stride(0), static_cast<int>(tokens), share, epilogue);
}

}  // namespace m2lm::cuda
