// What happens to a sum before it is stored: bias, activation, the gated product, the residual.
// Floor: backends. May include: core, ops.
#pragma once

#include <m2lm/backends/cuda/kernels/activation.cuh>

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace m2lm::inline M2LM_ABI::cuda {

/// The epilogue of y = act(x·wᵀ + bias) (· second half) + residual, for y of E, or of float where `wide`.
template <class E>
struct FusedEpilogue {
  const E* bias;         // [outputs], gated [2·outputs]; or null
  const void* residual;  // as y; or null. May be y: each element is read by the thread that writes it, before it does
  void* y;
  std::int64_t ld_residual, ldy;
  std::int64_t outputs;
  Activation activation;
  bool gated, wide;

  /// Stores y(row, output), where `first` is the sum of that output, and `second`, of a gated matrix, that of its second half.
  M2LM_DEVICE void finish(std::int64_t row, std::int64_t output, float first, float second) const {
    if (bias != nullptr) first += load(bias[output]);
    float value = apply_activation(activation, first);
    if (gated) value *= bias != nullptr ? second + load(bias[outputs + output]) : second;
    if (residual != nullptr) {
      const std::int64_t at = row * ld_residual + output;
      value += wide ? static_cast<const float*>(residual)[at] : load(static_cast<const E*>(residual)[at]);
    }
    const std::int64_t at = row * ldy + output;
    if (wide)
      static_cast<float*>(y)[at] = value;
    else
      static_cast<E*>(y)[at] = store<E>(value);
  }
};

struct EpiloguePolicy {
  int threads = 256;
  int piece = 4;  ///< elements that a thread takes in one access, where addresses allow it
};

/// N elements in one access (N = 1: of any address).
template <int N, class E>
M2LM_DEVICE void load_piece(const E* p, float (&out)[N]) {
  if constexpr (N == 1)
    out[0] = load(*p);
  else
    load_vector<N>(p, out);
}
template <int N, class E>
M2LM_DEVICE void store_piece(E* p, const float (&in)[N]) {
  if constexpr (N == 1)
    *p = store<E>(in[0]);
  else
    store_vector<N>(p, in);
}

/// The epilogue behind a product that stored z [rows, outputs], gated [rows, 2·outputs], as Z: what of it cuBLASLt could not do. y may be z
/// where it is not gated and Out = Z, and the residual may be y: a thread has read what it overwrites.
/// One thread per N elements of a row; each element is read and written once, which is what bounds it.
template <class E, class Z, class Out, int N>
M2LM_KERNEL void finish_product(const Z* z, std::int64_t ldz, std::int64_t rows, std::int64_t outputs, const E* bias, Activation activation,
                                bool gated, const Out* residual, std::int64_t ld_residual, Out* y, std::int64_t ldy) {
  const std::int64_t column = (static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * N;
  if (column >= outputs) return;
  float bias_of_first[N] = {}, bias_of_second[N] = {};
  if (bias != nullptr) {
    load_piece<N>(bias + column, bias_of_first);
    if (gated) load_piece<N>(bias + outputs + column, bias_of_second);
  }
  for (std::int64_t row = blockIdx.y; row < rows; row += gridDim.y) {
    float value[N], other[N];
    load_piece<N>(z + row * ldz + column, value);
    M2LM_UNROLL
    for (int i = 0; i < N; ++i) value[i] = apply_activation(activation, value[i] + bias_of_first[i]);
    if (gated) {
      load_piece<N>(z + row * ldz + outputs + column, other);
      M2LM_UNROLL
      for (int i = 0; i < N; ++i) value[i] *= other[i] + bias_of_second[i];
    }
    if (residual != nullptr) {
      load_piece<N>(residual + row * ld_residual + column, other);
      M2LM_UNROLL
      for (int i = 0; i < N; ++i) value[i] += other[i];
    }
    store_piece<N>(y + row * ldy + column, value);
  }
}

/// Whether elements of a matrix can be read N at a time: its address and the distance of its rows are multiples of N elements.
template <class E>
bool in_pieces(const E* p, std::int64_t ld, int n) {
  return ld % n == 0 && reinterpret_cast<std::uintptr_t>(p) % (static_cast<std::size_t>(n) * sizeof(E)) == 0;
}

template <class E, class Z, class Out>
void enqueue_finish_product(Device& device, Matrix<const Z> z, const E* bias, Activation activation, bool gated, Matrix<const Out> residual,
                            Matrix<Out> y) {
  constexpr EpiloguePolicy policy{};
  const std::int64_t rows = y.extent(0), outputs = y.extent(1);
  const bool pieces = outputs % policy.piece == 0 && in_pieces(z.data(), z.stride(0), policy.piece) && in_pieces(bias, 0, policy.piece) &&
                      in_pieces(residual.data(), residual.stride(0), policy.piece) && in_pieces(y.data(), y.stride(0), policy.piece);
  const std::int64_t columns_of_block = static_cast<std::int64_t>(policy.threads) * (pieces ? policy.piece : 1);
  const LaunchShape shape{.grid_x = static_cast<unsigned>((outputs + columns_of_block - 1) / columns_of_block),
                          .grid_y = static_cast<unsigned>(std::min<std::int64_t>(rows, 65535)),
                          .block_x = static_cast<unsigned>(policy.threads)};
  launch(device, "finish_product", pieces ? finish_product<E, Z, Out, policy.piece> : finish_product<E, Z, Out, 1>, shape, z.data(), z.stride(0),
         rows, outputs, bias, activation, gated, residual.data(), residual.stride(0), y.data(), y.stride(0));
}

}  // namespace m2lm::cuda
