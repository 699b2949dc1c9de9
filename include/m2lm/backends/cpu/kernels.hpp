// The kernel table of the CPU backend: plain functions by instruction-set level and weight format.
// Floor: backends. May include: core, ops.
#pragma once

#include <m2lm/backends/cpu/isa.hpp>
#include <m2lm/ops/attention.hpp>
#include <m2lm/ops/linear.hpp>

#include <cstddef>
#include <cstdint>

namespace m2lm::detail {

/// Outputs per panel of a packed matrix. A panel holds all inputs of 32 outputs: f32 [k][32], bf16 [k/2][32][2] (k even).
/// Keys are packed the same way (outputs = keys, inputs = head_dim), values too (outputs = head_dim, inputs = keys), so that
/// one tile kernel serves linear layers and both products of attention. The layout is the same at every level.
inline constexpr std::int64_t panel_width = 32;
/// Keys per block of attention: the order of every sum over keys is fixed by it.
inline constexpr std::int64_t key_block = 128;

constexpr std::int64_t round_up(std::int64_t n, std::int64_t to) { return (n + to - 1) / to * to; }

struct GemmJob {
  const float* x = nullptr;
  std::int64_t ldx = 0;
  const std::byte* w = nullptr;
  std::int64_t m = 0, n = 0, k = 0;  ///< n counts rows of w; k is padded to the format's step
  std::int64_t cols = 0;             ///< k without padding
  bool gated = false;
  const float* bias = nullptr;
  Activation activation = Activation::none;
  const float* residual = nullptr;
  std::int64_t ld_residual = 0;
  float* y = nullptr;
  std::int64_t ldy = 0;
};

struct AttentionJob {
  const float* q = nullptr;
  std::int64_t ldq = 0;
  const std::byte* keys_data = nullptr;
  const std::byte* values_data = nullptr;
  std::int64_t tokens = 0, heads = 0, kv_heads = 0, head_dim = 0, capacity = 0, keys = 0, first = 0;
  AttentionMask mask{};
  Sinks sinks{};
  float scale = 1;
  float* y = nullptr;
  std::int64_t ldy = 0;
};

/// What a level does with one weight format.
struct FormatKernels {
  bool bf16_activations = false;  ///< x is rounded to bf16, and so are q and the probabilities of attention
  std::int64_t k_step = 1;        ///< inputs are padded to a multiple of this
  void (*gemm)(const GemmJob&, int part, int parts, std::byte* scratch) = nullptr;
  std::size_t (*gemm_scratch)(std::int64_t m) = nullptr;
  void (*attention)(const AttentionJob&, int part, int parts, std::byte* scratch) = nullptr;
  std::size_t (*attention_scratch)(std::int64_t head_dim) = nullptr;
};

struct KernelTable {
  IsaLevel level = IsaLevel::baseline;
  FormatKernels f32{}, bf16{};
  void (*rms_norm)(const float* x, const float* weight, float eps, float* y, std::int64_t n) = nullptr;
  void (*layer_norm)(const float* x, const float* weight, const float* bias, float eps, float* y, std::int64_t n) = nullptr;
  void (*rope)(float* x, std::int64_t heads, std::int64_t head_dim, const float* cos, const float* sin) = nullptr;
  void (*add)(float* x, const float* addend, std::int64_t n) = nullptr;

  /// The kernels of a format, or null where the CPU backend has none.
  const FormatKernels* format(DType dtype) const {
    if (dtype == DType::f32) return &f32;
    if (dtype == DType::bf16) return &bf16;
    return nullptr;
  }
};

/// The table of a level. requires a level that this machine has. `bf16_dot`: multiply bf16 by VDPBF16PS where the level has it.
const KernelTable& kernel_table(IsaLevel level, bool bf16_dot);

/// Whether to multiply bf16 by VDPBF16PS when nobody says: on AMD, where it is expected to do twice the products of f32 FMA (not
/// measured yet), and not elsewhere: on an Intel Xeon with AMX it did half (118 against 236 GFLOP/s of one core, bench/compare).
bool fast_bf16_dot();

}  // namespace m2lm::detail
