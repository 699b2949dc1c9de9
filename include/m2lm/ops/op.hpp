// How an op finds its backend, and the context that every op runs in.
// Floor: ops. May include: core.
#pragma once

#include <m2lm/core/arena.hpp>
#include <m2lm/core/function_ref.hpp>
#include <m2lm/core/packed.hpp>
#include <m2lm/core/policy.hpp>
#include <m2lm/core/tensor.hpp>

#include <span>
#include <string_view>

namespace m2lm::inline M2LM_ABI {

/// The scalar of a backend's activations: float on Cpu, T on Reference<T>, OnDevice<E> on a device.
template <class B>
using ScalarOf = typename B::Scalar;

/// Whether a backend's activations lie in the host's memory.
template <class B>
concept HostBackend = HostElement<ScalarOf<B>>;

namespace detail {
template <class B>
struct HostScalar {
  using type = ScalarOf<B>;
};
template <class B>
  requires(!HostBackend<B>)
struct HostScalar<B> {
  using type = float;
};
}  // namespace detail

/// What the host sees of a backend's values, and what sums, logits and angles are kept in: `ScalarOf<B>` itself, or float on a device.
template <class B>
using HostScalarOf = typename detail::HostScalar<B>::type;

/// A T where the backend's kernels can reach it.
template <class B, class T>
using ElementOf = std::conditional_t<HostBackend<B>, T, OnDevice<T>>;

/// An element of logits and of rotary angles.
template <class B>
using AccumulatorOf = ElementOf<B, HostScalarOf<B>>;

/// What stands in for a block format where one cannot be used: keys and values, encoders. A device has its activations' type.
template <class B>
inline constexpr DType plain_format_on = HostBackend<B> ? DType::bf16 : dtype_of<ScalarOf<B>>;

/// The memory of a backend's device; null where it computes in the host's.
template <class B>
MemoryResource* memory_of(const B& backend) {
  if constexpr (HostBackend<B>)
    return nullptr;
  else
    return &backend.memory();
}

/// Holds other threads off a device, which does one thing at a time; the backends of the host need no such thing.
template <class B>
[[nodiscard]] auto exclusive([[maybe_unused]] const B& backend) {
  if constexpr (HostBackend<B>)
    return 0;
  else
    return backend.exclusive();
}

/// Zeros, where the backend computes.
template <class T, class B>
Tensor<T> make_tensor([[maybe_unused]] const B& backend, const Shape& shape) {
  if constexpr (HostElement<T>)
    return Tensor<T>(shape);
  else
    return Tensor<T>(shape, backend.memory());
}

/// What ops::pack asks before it packs, and tells when it has packed.
struct PackHooks {
  FunctionRef<PackedMatrix(std::span<const AnyTensor>, DType, bool gated)> find;  ///< an empty matrix: pack it
  FunctionRef<void(std::span<const AnyTensor>, const PackedMatrix&)> made;
};

/// The form that a backend packs weights in, where it may be kept in a file. A backend that has none leaves this as it is.
template <class B>
struct PackedForm {
  static constexpr std::string_view name = {};
  static constexpr int version = 0;
  /// Bytes of a matrix [rows, cols] packed in a format.
  static std::size_t bytes(const B&, DType, std::int64_t, std::int64_t, bool) { return 0; }
};

namespace ops {

struct CopyRows;

/// A backend specialises Impl<Op, Backend> with `static … run(Context<Backend>&, …)` for each op it has.
template <class Op, class B>
struct Impl {
  static constexpr bool missing = true;
  template <class... Argument>
  static void run(Argument&&...) {
    static_assert(dependent_false<B>, "m2lm: this backend has no implementation of this op (is <m2lm/backends/...> included?)");
  }
};

/// Whether the backend has the op.
template <class Op, class B>
concept Implements = !requires { Impl<Op, B>::missing; };

}  // namespace ops

/// What the rows of a forward pass are. The caller says it, and it never follows from their number: so that a result depends on neither batch
/// nor chunk, products may round in another way for each (Cpu does for q8 and q4 at level amx), but within one only by the row.
enum class Phase {
  decode,   ///< a step of generation: each weight is read for a few rows
  prefill,  ///< a prompt, or a picture's patches: for many
};

/// What a forward pass runs in: the backend, scratch memory, and the decoder's embedding table for the parts that look at it
/// (alignment attention, visual words). A session owns the arena. Training gives a tape too: what is prepared in a context with a
/// tape is packed for training, and a forward pass that is given a `Saved` keeps there what its backward pass needs.
template <class B>
struct Context {
  B& backend;
  Arena& arena;
  const AnyTensor* embedding_table = nullptr;  ///< [vocabulary, hidden], or null where there is no decoder
  Arena* tape = nullptr;                       ///< saved activations; null in inference
  const PackHooks* packing = nullptr;          ///< while a model is loaded, where its packed weights may come from
  Phase phase = Phase::decode;                 ///< of the passes that run in it

  /// Where a forward pass puts its activations: on the tape if its backward pass will want them, else into scratch memory.
  Arena& storage(bool saved) const {
    require(!saved || tape != nullptr, "m2lm: a forward pass that saves its activations needs a context with a tape");
    return saved ? *tape : arena;
  }
  /// h itself, or, if it will be wanted after the next layer has changed it in place, a copy on the tape.
  template <class T>
  Matrix<const T> keep(Matrix<T> h, bool saved) {
    if (!saved) return h;
    const Matrix<T> copy = storage(true).template matrix<T>(h.extent(0), h.extent(1));
    if constexpr (HostElement<T>)
      copy_rows(Matrix<const T>(h), copy);
    else
      ops::Impl<ops::CopyRows, B>::run(*this, Matrix<const T>(h), copy);
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

}  // namespace m2lm
