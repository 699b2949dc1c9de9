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

/// The gradient of attention over one whole sequence: query t and key t stand at position t.
struct AttentionBackwardJob {
  const float* q = nullptr;
  const float* k = nullptr;
  const float* v = nullptr;
  const float* dy = nullptr;
  std::int64_t ldq = 0, ldk = 0, ldv = 0, ld_dy = 0;
  std::int64_t queries = 0, keys = 0, heads = 0, kv_heads = 0, head_dim = 0;
  AttentionMask mask{};
  float scale = 1;
  float* dq = nullptr;
  float* dk = nullptr;
  float* dv = nullptr;
  std::int64_t ld_dq = 0, ld_dk = 0, ld_dv = 0;
};

/// Query rows of a block of attention's backward pass: the order of its sums is fixed by it.
inline constexpr std::int64_t backward_rows = 64;

/// Backward passes, in f32. `n` counts the elements of a row; a `gated` row of z has 2n.
struct TrainingKernels {
  void (*activation_forward)(Activation, const float* z, bool gated, float* y, std::int64_t n) = nullptr;
  void (*activation_backward)(Activation, const float* dy, const float* z, bool gated, float* dz, std::int64_t n) = nullptr;
  void (*norm_statistics)(const float* x, std::int64_t n, float eps, bool centred, float* mean, float* inverse) = nullptr;
  void (*norm_backward)(const float* dy, const float* x, const float* weight, float mean, float inverse, bool centred, float* dx, bool accumulate,
                        std::int64_t n) = nullptr;
  void (*norm_weight_gradient)(const float* dy, std::int64_t ld_dy, const float* x, std::int64_t ldx, const float* mean, const float* inverse,
                               std::int64_t rows, std::int64_t n, float* dweight, float* dbias) = nullptr;
  void (*rope_backward)(float* x, std::int64_t heads, std::int64_t head_dim, const float* cos, const float* sin) = nullptr;
  void (*transpose_panels)(const std::byte* w, bool bf16, std::int64_t n, std::int64_t k, std::int64_t first, std::int64_t count, float* out) = nullptr;
  void (*copy_panel)(const float* x, std::int64_t ldx, std::int64_t rows, std::int64_t columns, std::int64_t first, float* out) = nullptr;
  void (*transpose)(const float* x, std::int64_t ldx, std::int64_t rows, std::int64_t columns, float* out, std::int64_t ldo) = nullptr;
  std::int64_t (*attention_backward_floats)(std::int64_t keys, std::int64_t head_dim) = nullptr;
  void (*attention_backward)(const AttentionBackwardJob&, std::int64_t kv_head, float* scratch) = nullptr;
  void (*softmax_statistics)(const float* logits, std::int64_t n, float* largest, double* sum) = nullptr;
  void (*scaled_softmax)(const float* logits, std::int64_t n, float largest, float scale, float* d) = nullptr;
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
  TrainingKernels training{};

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
