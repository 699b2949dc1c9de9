// Backward passes on BasicCuda. Its kernels are in m2lm.cuh; m2lm_instantiate leaves them out.
// Floor: backends. May include: core, ops.
#pragma once

#include <m2lm/backends/cuda/cuda.hpp>
#include <m2lm/ops/activation.hpp>
#include <m2lm/ops/loss.hpp>

#include <cstddef>
#include <cstdint>
#include <span>

namespace m2lm::inline M2LM_ABI {

namespace detail {

/// Scratch memory of a context for kernels, until the scope of its arena ends.
template <class B>
std::byte* device_scratch(Context<B>& ctx, std::size_t bytes) {
  return ctx.arena.template take<std::byte>(static_cast<std::int64_t>(bytes));
}

/// Ids of the host, copied to scratch memory.
template <class B>
const std::int32_t* device_ids(Context<B>& ctx, std::span<const std::int32_t> ids) {
  auto* there = values_of(ctx.arena.template take<OnDevice<std::int32_t>>(static_cast<std::int64_t>(ids.size())));
  ctx.backend.device().copy_to_device(there, ids.data(), ids.size_bytes());
  return there;
}

}  // namespace detail

namespace ops {

template <class E>
struct Impl<LinearInputGradient, BasicCuda<E>> {
  static void run(Context<BasicCuda<E>>& ctx, Matrix<const OnDevice<E>> dy, const PackedMatrix& w, Matrix<OnDevice<E>> dx, bool accumulate) {
    const Arena::Scope scope(ctx.arena);
    std::byte* scratch = detail::device_scratch(ctx, cuda::linear_input_gradient_scratch<E>(w));
    cuda::linear_input_gradient<E>(ctx.backend.device(), detail::raw(dy), w, detail::raw(dx), accumulate, scratch);
  }
};

template <class E>
struct Impl<LinearWeightGradient, BasicCuda<E>> {
  static void run(Context<BasicCuda<E>>& ctx, Matrix<const OnDevice<E>> x, Matrix<const OnDevice<E>> dy, Matrix<OnDevice<E>> dw,
                  Vector<OnDevice<E>> db) {
    cuda::linear_weight_gradient<E>(ctx.backend.device(), detail::raw(x), detail::raw(dy), detail::raw(dw), values_of(db.data()));
  }
};

template <class E>
struct Impl<ActivationBackward, BasicCuda<E>> {
  static void run(Context<BasicCuda<E>>& ctx, Matrix<const OnDevice<E>> dy, Matrix<const OnDevice<E>> z, Activation activation,
                  Matrix<OnDevice<E>> dz) {
    cuda::activation_backward<E>(ctx.backend.device(), detail::raw(dy), detail::raw(z), activation, detail::raw(dz));
  }
};

template <class E>
struct Impl<RmsNormBackward, BasicCuda<E>> {
  static void run(Context<BasicCuda<E>>& ctx, Matrix<const OnDevice<E>> dy, Matrix<const OnDevice<E>> x, Vector<const OnDevice<E>> weight, double eps,
                  Matrix<OnDevice<E>> dx, bool accumulate, Vector<OnDevice<E>> dweight) {
    const Arena::Scope scope(ctx.arena);
    std::byte* scratch = detail::device_scratch(ctx, cuda::norm_backward_scratch(x.extent(0)));
    cuda::rms_norm_backward<E>(ctx.backend.device(), detail::raw(dy), detail::raw(x), values_of(weight.data()), static_cast<float>(eps),
                               detail::raw(dx), accumulate, values_of(dweight.data()), scratch);
  }
};

template <class E>
struct Impl<LayerNormBackward, BasicCuda<E>> {
  static void run(Context<BasicCuda<E>>& ctx, Matrix<const OnDevice<E>> dy, Matrix<const OnDevice<E>> x, Vector<const OnDevice<E>> weight, double eps,
                  Matrix<OnDevice<E>> dx, bool accumulate, Vector<OnDevice<E>> dweight, Vector<OnDevice<E>> dbias) {
    const Arena::Scope scope(ctx.arena);
    std::byte* scratch = detail::device_scratch(ctx, cuda::norm_backward_scratch(x.extent(0)));
    cuda::layer_norm_backward<E>(ctx.backend.device(), detail::raw(dy), detail::raw(x), values_of(weight.data()), static_cast<float>(eps),
                                 detail::raw(dx), accumulate, values_of(dweight.data()), values_of(dbias.data()), scratch);
  }
};

template <class E>
struct Impl<RopeBackward, BasicCuda<E>> {
  static void run(Context<BasicCuda<E>>& ctx, Matrix<OnDevice<E>> dx, std::int64_t head_dim, Matrix<const OnDevice<float>> cos,
                  Matrix<const OnDevice<float>> sin) {
    cuda::rope_backward<E>(ctx.backend.device(), detail::raw(dx), head_dim, detail::raw(cos), detail::raw(sin));
  }
};

template <class E>
struct Impl<AttentionBackward, BasicCuda<E>> {
  using Input = Matrix<const OnDevice<E>>;
  using Output = Matrix<OnDevice<E>>;
  static void run(Context<BasicCuda<E>>& ctx, Input q, Input k, Input v, Input y, Input dy, std::int64_t head_dim, AttentionMask mask, double scale,
                  Output dq, Output dk, Output dv) {
    const Arena::Scope scope(ctx.arena);
    std::byte* scratch = detail::device_scratch(ctx, cuda::attention_backward_scratch(q.extent(0), q.extent(1) / head_dim));
    cuda::attention_backward<E>(ctx.backend.device(), detail::raw(q), detail::raw(k), detail::raw(v), detail::raw(y), detail::raw(dy), head_dim, mask,
                                static_cast<float>(scale), detail::raw(dq), detail::raw(dk), detail::raw(dv), scratch);
  }
};

template <class E>
struct Impl<ScatterAddRows, BasicCuda<E>> {
  static void run(Context<BasicCuda<E>>& ctx, Matrix<const OnDevice<E>> rows, std::span<const std::int32_t> ids, Matrix<OnDevice<E>> table) {
    const Arena::Scope scope(ctx.arena);
    cuda::scatter_add_rows<E>(ctx.backend.device(), detail::raw(rows), detail::device_ids(ctx, ids), detail::raw(table));
  }
};

template <class E>
struct Impl<CrossEntropy, BasicCuda<E>> {
  static void run(Context<BasicCuda<E>>& ctx, Matrix<const OnDevice<E>> logits, std::span<const std::int32_t> targets, double scale,
                  Vector<OnDevice<float>> losses, Matrix<OnDevice<E>> dlogits) {
    const Arena::Scope scope(ctx.arena);
    cuda::cross_entropy<E>(ctx.backend.device(), detail::raw(logits), detail::device_ids(ctx, targets), static_cast<float>(scale),
                           values_of(losses.data()), detail::raw(dlogits));
  }
};

}  // namespace ops
}  // namespace m2lm
