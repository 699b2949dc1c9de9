// How an op finds its backend, and the context that every op runs in.
// Floor: ops. May include: core.
#pragma once

#include <m2lm/core/arena.hpp>
#include <m2lm/core/packed.hpp>
#include <m2lm/core/policy.hpp>
#include <m2lm/core/tensor.hpp>

namespace m2lm {

/// What a forward pass runs in: the backend, scratch memory, and the decoder's embedding table for the parts that look at it
/// (alignment attention, visual words). A session owns the arena. Training gives a tape too: what is prepared in a context with a
/// tape is packed for training, and a forward pass that is given a `Saved` keeps there what its backward pass needs.
template <class B>
struct Context {
  B& backend;
  Arena& arena;
  const AnyTensor* embedding_table = nullptr;  ///< [vocabulary, hidden], or null where there is no decoder
  Arena* tape = nullptr;                       ///< saved activations; null in inference

  /// Where a forward pass puts its activations: on the tape if its backward pass will want them, else into scratch memory.
  Arena& storage(bool saved) const {
    require(!saved || tape != nullptr, "m2lm: a forward pass that saves its activations needs a context with a tape");
    return saved ? *tape : arena;
  }
  /// h itself, or, if it will be wanted after the next layer has changed it in place, a copy on the tape.
  template <class T>
  Matrix<const T> keep(Matrix<T> h, bool saved) const {
    if (!saved) return h;
    const Matrix<T> copy = storage(true).template matrix<T>(h.extent(0), h.extent(1));
    copy_rows(Matrix<const T>(h), copy);
    return copy;
  }
};

/// Base of components without parameters.
struct NoParameters {
  template <class V, class Self>
  static void fields(V&&, Self&) {}
  template <class B>
  void prepare(Context<B>&, DType) {}
};

/// The scalar of a backend's activations: float on Cpu and Cuda, T on Reference<T>.
template <class B>
using ScalarOf = typename B::Scalar;

namespace ops {

/// A backend specialises Impl<Op, Backend> with `static … run(Context<Backend>&, …)` for each op it has.
template <class Op, class B>
struct Impl {
  static_assert(dependent_false<B>, "m2lm: this backend has no implementation of this op (is <m2lm/backends/...> included?)");
};

}  // namespace ops
}  // namespace m2lm
