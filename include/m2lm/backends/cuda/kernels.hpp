// The kernels of the CUDA backend as the host calls them. Each is defined in kernels/*.cuh over device.cuh, for E = float, Half and
// Bf16; all enqueue on the device's stream and return. Pointers are to device memory.
// Floor: backends. May include: core, ops.
#pragma once

#include <m2lm/backends/cuda/runtime.hpp>
#include <m2lm/core/dtype.hpp>
#include <m2lm/core/packed.hpp>
#include <m2lm/ops/attention.hpp>
#include <m2lm/ops/linear.hpp>
#include <m2lm/ops/sample.hpp>

#include <cstddef>
#include <cstdint>
#include <span>

namespace m2lm::inline M2LM_ABI::cuda {

/// Where the first row of a sequence stands. A step that is replayed reads it from device memory.
struct Position {
  const std::int32_t* length = nullptr;  ///< device memory, or null: then `first` counts
  std::int64_t first = 0;                ///< as the host knows it
  std::int64_t most_keys = 0;            ///< keys are never more: what a launch is shaped for
};

// ---- rows.cuh ---------------------------------------------------------------------------------------------------------------

/// y = x / sqrt(mean(x²) + eps) · weight, row by row, in f32 inside. y may be x.
template <class E>
void rms_norm(Device& device, Matrix<const E> x, const E* weight, float eps, Matrix<E> y);
template <class E>
void layer_norm(Device& device, Matrix<const E> x, const E* weight, const E* bias, float eps, Matrix<E> y);
/// cos and sin [tokens, head_dim/2] of positions first, first + 1, …; angle = float(position)·frequency, an f32 product.
void rope_angles(Device& device, const float* frequencies, Position position, Matrix<float> cos, Matrix<float> sin);
/// As ops::rope, in place.
template <class E>
void rope(Device& device, Matrix<E> x, std::int64_t head_dim, Matrix<const float> cos, Matrix<const float> sin);
/// The rows of q and k are rotated; the rotated k, and v, go to the cache at their positions. One launch. qkv [tokens, q + k + v] is
/// rotated in place (its k columns too). requires kv in format dtype_of<E>.
template <class E>
void rope_append(Device& device, Matrix<E> qkv, std::int64_t heads, Matrix<const float> cos, Matrix<const float> sin, Position position,
                 const KeyValues& kv);
/// Keys and values are [kv_heads][capacity][head_dim] of E.
template <class E>
void append_key_values(Device& device, Matrix<const E> k, Matrix<const E> v, Position position, const KeyValues& kv);
template <class E>
void copy_key_values(Device& device, const KeyValues& from, std::int64_t count, const KeyValues& to);
/// y[i] = table[ids[i]]. An id outside the table gives a row of NaN.
template <class E>
void gather_rows(Device& device, Matrix<const E> table, const std::int32_t* ids, Matrix<E> y);
template <class E>
void patchify(Device& device, View<const E, 3> pixels, std::int64_t patch, Matrix<E> y);
template <class E>
void add_rows(Device& device, Matrix<E> x, Matrix<const E> addend);
template <class E>
void copy_rows(Device& device, Matrix<const E> from, Matrix<E> to);
/// Conversion of whole buffers.
template <class From, class To>
void convert(Device& device, const From* from, To* to, std::int64_t count);
/// y = act(z), or gated: act(left half of z) · right half. y may be z when not gated.
template <class E>
void activation_forward(Device& device, Matrix<const E> z, Activation activation, Matrix<E> y);
/// *length += by, or = value.
void add_to_length(Device& device, std::int32_t* length, std::int32_t by);
void set_length(Device& device, std::int32_t* length, std::int32_t value);

// ---- linear.cuh -------------------------------------------------------------------------------------------------------------

/// Formats of weights that linear<E> has: dtype_of<E>, q8 and q4.
template <class E>
bool has_format(DType format);
/// Packs on the host and copies to the device, through pinned staging. Float formats: rows of `cols` elements, one after another
/// (gated: the rows of the first matrix, then those of the second). Quantised formats: as linear.cuh says.
template <class E>
PackedMatrix pack(Device& device, const std::shared_ptr<Device>& owner, std::span<const AnyTensor> sources, DType format, bool gated);
/// Bytes of scratch that `linear` wants for m rows.
template <class E>
std::size_t linear_scratch(std::int64_t m, const PackedMatrix& w);
/// As ops::linear, Out = E, or float for logits. GEMV for few rows, else cuBLASLt or an own kernel on quantised weights.
template <class E, class Out>
void linear(Device& device, Matrix<const E> x, const PackedMatrix& w, const E* bias, Activation activation, Matrix<const Out> residual, Matrix<Out> y,
            void* scratch);

// ---- attention_*.cuh --------------------------------------------------------------------------------------------------------

/// Bytes of scratch that `attention` wants.
template <class E>
std::size_t attention_scratch(const DeviceProperties& properties, std::int64_t tokens, std::int64_t heads, const KeyValues& kv,
                              std::int64_t most_keys);
/// The kernels of attention for many queries.
enum class PrefillKernel {
  warps,      ///< mma.sync of warps: every device has it
  warpgroups  ///< wgmma of warpgroups, tiles by TMA: sm_90 alone
};
/// No device has run the kernel of warpgroups yet (docs/cuda.md, "What has run where"): one that has, and was faster by it, changes this line.
inline constexpr PrefillKernel default_prefill_kernel = PrefillKernel::warps;

/// As ops::attention over `keys` = position + tokens keys (causal or windowed), or over position.most_keys keys where the mask is not
/// ordered. Few queries: keys are split over blocks, the heads of a group share a pass. Many: tensor cores (E = float: FMA), by
/// warpgroups where `prefill` says so and device, program and sizes allow it (warpgroups_head_dim).
template <class E>
void attention(Device& device, Matrix<const E> q, const KeyValues& kv, Position position, AttentionMask mask, float scale, Matrix<E> y, Sinks sinks,
               void* scratch, PrefillKernel prefill = default_prefill_kernel);

// ---- sampling.cuh -----------------------------------------------------------------------------------------------------------

std::size_t sample_scratch(std::int64_t rows, std::int64_t vocab);
/// Chooses ids[r] from logits [rows, vocab] as Sampler does (order and ties as there), marks it in `seen` (one bit per token and row,
/// [rows, ⌈vocab/32⌉] words; null when no row has a repetition penalty). A row that has failed gives -1. Logits are overwritten.
/// `greedy`: every row has the temperature 0; two launches instead of four.
void sample(Device& device, Matrix<float> logits, SamplerRow* rows, std::uint32_t* seen, std::int32_t* ids, void* scratch, bool greedy = false);

// ---- backward.cuh -----------------------------------------------------------------------------------------------------------

// The gradients of ops/*.hpp, which say what each computes and what may alias what. Empty views and null pointers are left out as there.
// Sums are in f32 and in an order that depends on sizes alone.

/// Bytes of scratch that linear_input_gradient wants: a quantised w as E.
template <class E>
std::size_t linear_input_gradient_scratch(const PackedMatrix& w);
/// dx (+)= dy·w. The values of a quantised w are rounded to E.
template <class E>
void linear_input_gradient(Device& device, Matrix<const E> dy, const PackedMatrix& w, Matrix<E> dx, bool accumulate, void* scratch);
/// dw += dyᵀ·x, db += Σ rows of dy.
template <class E>
void linear_weight_gradient(Device& device, Matrix<const E> x, Matrix<const E> dy, Matrix<E> dw, E* db);
template <class E>
void activation_backward(Device& device, Matrix<const E> dy, Matrix<const E> z, Activation activation, Matrix<E> dz);
/// Bytes of scratch that the gradients of norms want where they have dweight or dbias.
std::size_t norm_backward_scratch(std::int64_t rows);
template <class E>
void rms_norm_backward(Device& device, Matrix<const E> dy, Matrix<const E> x, const E* weight, float eps, Matrix<E> dx, bool accumulate, E* dweight,
                       void* scratch);
template <class E>
void layer_norm_backward(Device& device, Matrix<const E> dy, Matrix<const E> x, const E* weight, float eps, Matrix<E> dx, bool accumulate, E* dweight,
                         E* dbias, void* scratch);
template <class E>
void rope_backward(Device& device, Matrix<E> dx, std::int64_t head_dim, Matrix<const float> cos, Matrix<const float> sin);
/// Bytes of scratch that attention_backward wants.
std::size_t attention_backward_scratch(std::int64_t queries, std::int64_t heads);
/// throws OptionError for a head_dim whose tiles a block of this device cannot hold.
template <class E>
void attention_backward(Device& device, Matrix<const E> q, Matrix<const E> k, Matrix<const E> v, Matrix<const E> y, Matrix<const E> dy,
                        std::int64_t head_dim, AttentionMask mask, float scale, Matrix<E> dq, Matrix<E> dk, Matrix<E> dv, void* scratch);
/// table[ids[i]] += rows[i]; an id outside the table adds nothing.
template <class E>
void scatter_add_rows(Device& device, Matrix<const E> rows, const std::int32_t* ids, Matrix<E> table);
/// Losses are f32.
template <class E>
void cross_entropy(Device& device, Matrix<const E> logits, const std::int32_t* targets, float scale, float* losses, Matrix<E> dlogits);

}  // namespace m2lm::cuda
