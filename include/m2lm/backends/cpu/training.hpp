// Backward passes on Cpu.
// Floor: backends. May include: core, ops.
#pragma once

#include <m2lm/backends/cpu/cpu.hpp>
#include <m2lm/ops/activation.hpp>
#include <m2lm/ops/loss.hpp>

#include <span>

namespace m2lm::inline M2LM_ABI {

namespace detail {

// Non-template halves of the ops below. Threads share out rows or columns of what is written; no sum is cut between them.
void cpu_linear_input_gradient(const Cpu& cpu, Arena& arena, Matrix<const float> dy, const PackedMatrix& w, Matrix<float> dx, bool accumulate);
void cpu_linear_weight_gradient(const Cpu& cpu, Arena& arena, Matrix<const float> x, Matrix<const float> dy, Matrix<float> dw, Vector<float> db);
void cpu_norm_backward(const Cpu& cpu, Arena& arena, Matrix<const float> dy, Matrix<const float> x, Vector<const float> weight, double eps, bool centred,
                       Matrix<float> dx, bool accumulate, Vector<float> dweight, Vector<float> dbias);
void cpu_attention_backward(const Cpu& cpu, Arena& arena, const AttentionBackwardJob& job);
void cpu_cross_entropy(const Cpu& cpu, Matrix<const float> logits, std::span<const std::int32_t> targets, double scale, Vector<float> losses,
                       Matrix<float> dlogits);

}  // namespace detail

namespace ops {

template <>
struct Impl<LinearInputGradient, Cpu> {
  static void run(Context<Cpu>& ctx, Matrix<const float> dy, const PackedMatrix& w, Matrix<float> dx, bool accumulate) {
    detail::cpu_linear_input_gradient(ctx.backend, ctx.arena, dy, w, dx, accumulate);
  }
};

template <>
struct Impl<LinearWeightGradient, Cpu> {
  static void run(Context<Cpu>& ctx, Matrix<const float> x, Matrix<const float> dy, Matrix<float> dw, Vector<float> db) {
    detail::cpu_linear_weight_gradient(ctx.backend, ctx.arena, x, dy, dw, db);
  }
};

template <>
struct Impl<ActivationForward, Cpu> {
  static void run(Context<Cpu>& ctx, Matrix<const float> z, Activation activation, Matrix<float> y) {
    detail::cpu_for_rows(ctx.backend, y.extent(0), z.elements(), [&](std::int64_t i) {
      ctx.backend.kernels().training.activation_forward(activation, z.row(i), z.extent(1) != y.extent(1), y.row(i), y.extent(1));
    });
  }
};

template <>
struct Impl<ActivationBackward, Cpu> {
  static void run(Context<Cpu>& ctx, Matrix<const float> dy, Matrix<const float> z, Activation activation, Matrix<float> dz) {
    detail::cpu_for_rows(ctx.backend, dy.extent(0), z.elements(), [&](std::int64_t i) {
      ctx.backend.kernels().training.activation_backward(activation, dy.row(i), z.row(i), z.extent(1) != dy.extent(1), dz.row(i), dy.extent(1));
    });
  }
};

template <>
struct Impl<RmsNormBackward, Cpu> {
  static void run(Context<Cpu>& ctx, Matrix<const float> dy, Matrix<const float> x, Vector<const float> weight, double eps, Matrix<float> dx,
                  bool accumulate, Vector<float> dweight) {
    detail::cpu_norm_backward(ctx.backend, ctx.arena, dy, x, weight, eps, false, dx, accumulate, dweight, {});
  }
};

template <>
struct Impl<LayerNormBackward, Cpu> {
  static void run(Context<Cpu>& ctx, Matrix<const float> dy, Matrix<const float> x, Vector<const float> weight, double eps, Matrix<float> dx,
                  bool accumulate, Vector<float> dweight, Vector<float> dbias) {
    detail::cpu_norm_backward(ctx.backend, ctx.arena, dy, x, weight, eps, true, dx, accumulate, dweight, dbias);
  }
};

template <>
struct Impl<RopeBackward, Cpu> {
  static void run(Context<Cpu>& ctx, Matrix<float> dx, std::int64_t head_dim, Matrix<const float> cos, Matrix<const float> sin) {
    detail::cpu_for_rows(ctx.backend, dx.extent(0), dx.elements(), [&](std::int64_t i) {
      ctx.backend.kernels().training.rope_backward(dx.row(i), dx.extent(1) / head_dim, head_dim, cos.row(i), sin.row(i));
    });
  }
};

template <>
struct Impl<AttentionBackward, Cpu> {
  static void run(Context<Cpu>& ctx, Matrix<const float> q, Matrix<const float> k, Matrix<const float> v, Matrix<const float> /*y*/, Matrix<const float> dy,
                  std::int64_t head_dim, AttentionMask mask, double scale, Matrix<float> dq, Matrix<float> dk, Matrix<float> dv) {
    detail::cpu_attention_backward(
        ctx.backend, ctx.arena,
        {.q = q.data(), .k = k.data(), .v = v.data(), .dy = dy.data(), .ldq = q.stride(0), .ldk = k.stride(0), .ldv = v.stride(0), .ld_dy = dy.stride(0),
         .queries = q.extent(0), .keys = k.extent(0), .heads = q.extent(1) / head_dim, .kv_heads = k.extent(1) / head_dim, .head_dim = head_dim,
         .mask = mask, .scale = static_cast<float>(scale), .dq = dq.data(), .dk = dk.data(), .dv = dv.data(), .ld_dq = dq.stride(0),
         .ld_dk = dk.stride(0), .ld_dv = dv.stride(0)});
  }
};

template <>
struct Impl<ScatterAddRows, Cpu> {
  static void run(Context<Cpu>& ctx, Matrix<const float> rows, std::span<const std::int32_t> ids, Matrix<float> table) {
    for (std::size_t i = 0; i < ids.size(); ++i)
      ctx.backend.kernels().add(table.row(ids[i]), rows.row(static_cast<std::int64_t>(i)), rows.extent(1));
  }
};

template <>
struct Impl<CrossEntropy, Cpu> {
  static void run(Context<Cpu>& ctx, Matrix<const float> logits, std::span<const std::int32_t> targets, double scale, Vector<float> losses,
                  Matrix<float> dlogits) {
    detail::cpu_cross_entropy(ctx.backend, logits, targets, scale, losses, dlogits);
  }
};

}  // namespace ops
}  // namespace m2lm
