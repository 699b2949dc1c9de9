// Cpu: the backend that runs on the machine's cores, with kernels chosen from cpuid at run time.
// Floor: backends. May include: core, ops.
#pragma once

#include <m2lm/backends/cpu/kernels.hpp>
#include <m2lm/core/threads.hpp>
#include <m2lm/ops/attention.hpp>
#include <m2lm/ops/gather.hpp>
#include <m2lm/ops/linear.hpp>
#include <m2lm/ops/norm.hpp>
#include <m2lm/ops/rope.hpp>

#include <algorithm>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string_view>

namespace m2lm::inline M2LM_ABI {

/// What a Cpu is made with.
struct CpuOptions {
  int threads = 0;                         ///< 0 = one per available core
  std::optional<IsaLevel> max_isa = {};    ///< never use more than this; default: default_isa()
  /// bf16 weights: round activations to bf16 and multiply those, at levels avx512_bf16 (VDPBF16PS) and amx; default: at amx, and on AMD.
  /// At amx prefill does so with weights in q8 and q4 too, rounded to bf16: false gives a prompt the bits of its tokens one by one.
  std::optional<bool> bf16_dot = {};
  bool int8_dot = true;  ///< weights that are integers: use VPDPBUSD where level and machine have it; no bit of a result depends on it
};

namespace detail {

/// Where packed weights lie: one behind the other in large buffers, so that all of them are in huge pages. (Alone a matrix fills none, or has a
/// rest of up to 2 MB beside those that it fills.)
class WeightMemory {
  std::mutex busy_;
  std::weak_ptr<AlignedBytes> buffer_;  // the last one; it lives as long as matrices in it
  std::size_t used_ = 0;

 public:
  /// `bytes` on a 64-byte border, uninitialised. They stay as long as the pointer or a copy of it. May be called by several threads.
  std::shared_ptr<std::byte> take(std::size_t bytes);
};

}  // namespace detail

/// A pool of threads and a kernel table. Copies share both; so do models made from one backend.
class Cpu {
  struct State {
    ThreadPool pool;
    detail::WeightMemory weights{};
    const detail::KernelTable* kernels;
    State(int threads, const detail::KernelTable* table) : pool(threads), kernels(table) {}
  };
  std::shared_ptr<State> state_;

 public:
  using Scalar = float;

  Cpu() : Cpu(CpuOptions{}) {}
  /// throws OptionError for a number of threads below 0 or above 1024.
  Cpu(const CpuOptions& options);  // NOLINT: implicit, so that Cpu{{.threads = 2}} reads well

  /// Threads that share an op, the calling one among them.
  int threads() const { return state_->pool.size(); }
  /// The level whose kernels are used: the processor's, capped by CpuOptions::max_isa and M2LM_MAX_ISA.
  IsaLevel isa() const { return state_->kernels->level; }
  /// Shared by all copies of this backend.
  ThreadPool& pool() const { return state_->pool; }
  /// Where weights that it packs lie.
  detail::WeightMemory& weights() const { return state_->weights; }
  /// The functions of that level.
  const detail::KernelTable& kernels() const { return *state_->kernels; }
};

namespace detail {

// Non-template halves of the ops below.
PackedMatrix cpu_pack(const Cpu& cpu, std::span<const AnyTensor> sources, DType format, bool gated);
std::size_t cpu_packed_bytes(const Cpu& cpu, DType format, std::int64_t rows, std::int64_t cols, bool gated);
void cpu_linear(const Cpu& cpu, Arena& arena, Phase phase, Matrix<const float> x, const PackedMatrix& w, const Epilogue<float>& epilogue,
                Matrix<float> y);
void cpu_append_key_values(const Cpu& cpu, Matrix<const float> k, Matrix<const float> v, std::int64_t first, const KeyValues& kv);
void cpu_copy_key_values(const KeyValues& from, std::int64_t count, const KeyValues& to);
void cpu_attention(const Cpu& cpu, Arena& arena, Matrix<const float> q, const KeyValues& kv, std::int64_t keys, std::int64_t first,
                   AttentionMask mask, double scale, Matrix<float> y, Sinks sinks);
KeyValuesPlan cpu_plan_key_values(DType format, std::int64_t kv_heads, std::int64_t head_dim, std::int64_t capacity);
void cpu_patchify(View<const float, 3> pixels, std::int64_t patch, Matrix<float> y);
/// Calls f(row) for every row, on all threads where there is enough to do.
void cpu_for_rows(const Cpu& cpu, std::int64_t rows, std::int64_t elements, FunctionRef<void(std::int64_t)> f);

}  // namespace detail

template <>
struct PackedForm<Cpu> {
  static constexpr std::string_view name = "cpu";
  static constexpr int version = detail::packed_layout_version;
  /// Bytes of a matrix [rows, cols] packed in `format`.
  static std::size_t bytes(const Cpu& cpu, DType format, std::int64_t rows, std::int64_t cols, bool gated) {
    return detail::cpu_packed_bytes(cpu, format, rows, cols, gated);
  }
};

namespace ops {

template <>
struct Impl<Pack, Cpu> {
  static PackedMatrix run(Context<Cpu>& ctx, std::span<const AnyTensor> sources, DType format, bool gated) {
    return detail::cpu_pack(ctx.backend, sources, format, gated);
  }
};

template <>
struct Impl<Linear, Cpu> {
  static void run(Context<Cpu>& ctx, Matrix<const float> x, const PackedMatrix& w, const Epilogue<float>& epilogue, Matrix<float> y) {
    detail::cpu_linear(ctx.backend, ctx.arena, ctx.phase, x, w, epilogue, y);
  }
};

template <>
struct Impl<RmsNorm, Cpu> {
  static void run(Context<Cpu>& ctx, Matrix<const float> x, Vector<const float> weight, double eps, Matrix<float> y) {
    detail::cpu_for_rows(ctx.backend, x.extent(0), x.elements(), [&](std::int64_t i) {
      ctx.backend.kernels().rms_norm(x.row(i), weight.data(), static_cast<float>(eps), y.row(i), x.extent(1));
    });
  }
};

template <>
struct Impl<LayerNorm, Cpu> {
  static void run(Context<Cpu>& ctx, Matrix<const float> x, Vector<const float> weight, Vector<const float> bias, double eps, Matrix<float> y) {
    detail::cpu_for_rows(ctx.backend, x.extent(0), x.elements(), [&](std::int64_t i) {
      ctx.backend.kernels().layer_norm(x.row(i), weight.data(), bias.data(), static_cast<float>(eps), y.row(i), x.extent(1));
    });
  }
};

template <>
struct Impl<Rope, Cpu> {
  static void run(Context<Cpu>& ctx, Matrix<float> x, std::int64_t head_dim, Matrix<const float> cos, Matrix<const float> sin) {
    detail::cpu_for_rows(ctx.backend, x.extent(0), x.elements(), [&](std::int64_t i) {
      const std::int64_t angle = M2LM_FAULT(20) ? 0 : i;
      ctx.backend.kernels().rope(x.row(i), x.extent(1) / head_dim, head_dim, cos.row(angle), sin.row(angle));
    });
  }
};

template <>
struct Impl<PlanKeyValues, Cpu> {
  static KeyValuesPlan run(Context<Cpu>&, DType format, std::int64_t kv_heads, std::int64_t head_dim, std::int64_t capacity) {
    return detail::cpu_plan_key_values(format, kv_heads, head_dim, capacity);
  }
};

template <>
struct Impl<AppendKeyValues, Cpu> {
  static void run(Context<Cpu>& ctx, Matrix<const float> k, Matrix<const float> v, std::int64_t first, const KeyValues& kv) {
    detail::cpu_append_key_values(ctx.backend, k, v, first, kv);
  }
};

template <>
struct Impl<CopyKeyValues, Cpu> {
  static void run(Context<Cpu>&, const KeyValues& from, std::int64_t count, const KeyValues& to) { detail::cpu_copy_key_values(from, count, to); }
};

template <>
struct Impl<Attention, Cpu> {
  static void run(Context<Cpu>& ctx, Matrix<const float> q, const KeyValues& kv, std::int64_t keys, std::int64_t first, AttentionMask mask,
                  double scale, Matrix<float> y, Sinks sinks) {
    detail::cpu_attention(ctx.backend, ctx.arena, q, kv, keys, first, mask, scale, y, sinks);
  }
};

template <>
struct Impl<GatherRows, Cpu> {
  static void run(Context<Cpu>&, const AnyTensor& table, std::span<const std::int32_t> ids, Matrix<float> y) {
    for (std::size_t i = 0; i < ids.size(); ++i)
      table.copy_to(y.row(static_cast<std::int64_t>(i)), ids[i] * table.shape()[1], table.shape()[1]);
  }
};

template <>
struct Impl<Patchify, Cpu> {
  static void run(Context<Cpu>&, View<const float, 3> pixels, std::int64_t patch, Matrix<float> y) { detail::cpu_patchify(pixels, patch, y); }
};

template <>
struct Impl<AddRows, Cpu> {
  static void run(Context<Cpu>& ctx, Matrix<float> x, Matrix<const float> addend) {
    detail::cpu_for_rows(ctx.backend, x.extent(0), x.elements(),
                         [&](std::int64_t i) { ctx.backend.kernels().add(x.row(i), addend.row(i), x.extent(1)); });
  }
};

}  // namespace ops
}  // namespace m2lm
