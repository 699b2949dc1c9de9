// Moving values: rows to rows, from the host to where a backend computes, and back. On Cpu and Reference these are plain copies.
// Floor: ops. May include: core, ops.
#pragma once

#include <m2lm/ops/op.hpp>

#include <cstring>
#include <span>

namespace m2lm::inline M2LM_ABI::ops {

struct Upload;
struct UploadValues;
struct UploadTensor;
struct Download;
struct Replay;

/// to = from, element by element. requires equal shapes; no overlap; rows may be strided.
template <class B>
void copy_rows(Context<B>& ctx, Matrix<const ScalarOf<B>> from, Matrix<ScalarOf<B>> to) {
  if constexpr (HostBackend<B>) {
    m2lm::copy_rows(from, to);
  } else {
    require(from.shape() == to.shape(), "m2lm::ops::copy_rows: from ", from.shape(), " to ", to.shape());
    if (to.elements() != 0) Impl<CopyRows, B>::run(ctx, from, to);
  }
}

/// Sets `count` elements to zero.
template <class T, class B>
void zero([[maybe_unused]] Context<B>& ctx, T* p, std::int64_t count) {
  if constexpr (HostElement<T>) {
    for (std::int64_t i = 0; i < count; ++i) p[i] = T(0);
  } else {
    ctx.backend.memory().zero(p, static_cast<std::size_t>(count) * sizeof(T));
  }
}

/// to[i] = from[i], converted. `from` may be reused at once.
template <class B>
void upload(Context<B>& ctx, std::span<const float> from, ScalarOf<B>* to) {
  if constexpr (HostBackend<B>) {
    for (std::size_t i = 0; i < from.size(); ++i) to[i] = static_cast<ScalarOf<B>>(from[i]);
  } else {
    Impl<Upload, B>::run(ctx, from, to);
  }
}

/// The same bytes on a device. `from` may be reused at once.
template <class T, class B>
  requires(!HostBackend<B>)
void upload_values(Context<B>& ctx, std::span<const T> from, OnDevice<T>* to) {
  Impl<UploadValues, B>::run(ctx, from.data(), to, from.size_bytes());
}

/// Ids where a device's kernels can read them, until the end of the arena's scope.
template <class B>
  requires(!HostBackend<B>)
Vector<const OnDevice<std::int32_t>> upload_ids(Context<B>& ctx, std::span<const std::int32_t> ids) {
  auto* to = ctx.arena.template take<OnDevice<std::int32_t>>(static_cast<std::int64_t>(ids.size()));
  upload_values(ctx, ids, to);
  return Vector<const OnDevice<std::int32_t>>(to, {static_cast<std::int64_t>(ids.size())});
}

/// A copy of the tensor, converted to the scalar of the backend (`T`: or to an accumulator), where it computes.
template <class B, class T = ScalarOf<B>>
Tensor<T> upload_tensor(Context<B>& ctx, const AnyTensor& tensor) {
  if constexpr (HostBackend<B>)
    return tensor.to<T>();
  else
    return Impl<UploadTensor, B>::template run<T>(ctx, tensor);
}

/// A copy for the host to read. Waits for what the backend is computing.
template <class B, class T>
Tensor<HostScalarOf<B>> download(Context<B>& ctx, Matrix<const T> from) {
  if constexpr (HostBackend<B>) {
    Tensor<T> out(from.shape());
    m2lm::copy_rows(from, out.template view<2>());
    return out;
  } else {
    return Impl<Download, B>::run(ctx, from);
  }
}

/// What a step depends on besides the memory it reads: equal keys, equal work at equal addresses.
struct StepKey {
  std::uint64_t words[8]{};
};

/// Does what `body` does on a device, which may record it and later repeat it without calling body. Returns whether body was called.
/// requires of body: it enqueues work only, and takes no memory that it has not taken before.
template <class B, class Body>
  requires(!HostBackend<B>)
bool replay(Context<B>& ctx, const StepKey& key, Body&& body) {
  return Impl<Replay, B>::run(ctx, key, body);
}

}  // namespace m2lm::ops
