// BasicCuda: the backend that runs on an NVIDIA GPU. Compiles without CUDA; a program that uses it links kernels that nvcc has compiled
// (m2lm.cuh, m2lm_instantiate).
// Floor: backends. May include: core, ops.
#pragma once

#include <m2lm/backends/cuda/kernels.hpp>
#include <m2lm/backends/cuda/upload.hpp>
#include <m2lm/ops/attention.hpp>
#include <m2lm/ops/gather.hpp>
#include <m2lm/ops/linear.hpp>
#include <m2lm/ops/norm.hpp>
#include <m2lm/ops/rope.hpp>
#include <m2lm/ops/sample.hpp>
#include <m2lm/ops/transfer.hpp>

#include <algorithm>
#include <bit>
#include <cstring>
#include <memory>
#include <mutex>
#include <span>
#include <type_traits>
#include <vector>

namespace m2lm::inline M2LM_ABI {

/// What a BasicCuda is made with.
struct CudaOptions {
  int device = 0;  ///< as CUDA_VISIBLE_DEVICES numbers them
};

/// A device and its stream. Copies share both; so do models made from one backend: their work is done in order. Activations are of
/// type E (float, Half or Bf16) in the device's memory, sums, logits and rotary angles f32. Weights are in E, q8 or q4, the KV cache in E.
/// Sessions of several threads take turns, an answer at a time.
template <class E>
class BasicCuda {
  static_assert(std::is_same_v<E, float> || std::is_same_v<E, Half> || std::is_same_v<E, Bf16>, "m2lm::BasicCuda<E>: E is float, Half or Bf16");
  std::shared_ptr<cuda::Device> device_;

 public:
  using Scalar = OnDevice<E>;
  using Element = E;

  BasicCuda() : BasicCuda(CudaOptions{}) {}
  /// throws DeviceError with the reason when the device cannot be used.
  BasicCuda(const CudaOptions& options) : device_(std::make_shared<cuda::Device>(options.device)) {}  // NOLINT: implicit, as Cpu's

  /// The device with its stream, which copies of this backend share.
  cuda::Device& device() const { return *device_; }
  /// The same for who may outlive the backend.
  const std::shared_ptr<cuda::Device>& shared_device() const { return device_; }
  /// Where tensors, arenas and KV caches of this backend lie.
  MemoryResource& memory() const { return *device_; }
  /// What is done under this lock no other thread's work comes between.
  [[nodiscard]] std::unique_lock<std::recursive_mutex> exclusive() const { return device_->exclusive(); }
  /// Waits until the device has done all that was asked of it. throws DeviceError for a kernel that has failed.
  void synchronize() const { device_->synchronize(); }

  /// Rows of a prompt that go through the decoder at once: enough for products to fill the device.
  static constexpr std::int64_t prefill_rows = 4096;

  /// What a decode step with `keys` keys is shaped for: steps of one bucket are one recording.
  static constexpr std::int64_t key_bucket(std::int64_t keys) {
    constexpr std::uint64_t smallest = 256;
    return static_cast<std::int64_t>(std::max(smallest, std::bit_ceil(static_cast<std::uint64_t>(keys))));
  }

  /// Ids on their way to the host, in two slots.
  class Mailbox {
    std::shared_ptr<cuda::Device> device_;
    std::size_t rows_;
    std::shared_ptr<void> pinned_;
    std::size_t count_[2]{};

    std::int32_t* slot(int i) const { return static_cast<std::int32_t*>(pinned_.get()) + static_cast<std::size_t>(i) * rows_; }

   public:
    /// For at most `rows` ids in each slot, in page-locked memory of the host.
    Mailbox(const BasicCuda& backend, std::int64_t rows)
        : device_(backend.device_), rows_(static_cast<std::size_t>(rows)), pinned_(device_->pinned(2 * rows_ * sizeof(std::int32_t))) {}

    /// Enqueues the copy of `count` ids to slot `to`, 0 or 1; `read` waits for it.
    void post(const BasicCuda&, const OnDevice<std::int32_t>* ids, std::int64_t count, int to) {
      count_[to] = static_cast<std::size_t>(count);
      device_->copy_to_pinned(slot(to), ids, count_[to] * sizeof(std::int32_t), to);
    }
    /// Waits for the message; what was enqueued behind it goes on.
    std::span<const std::int32_t> read(int from) {
      device_->wait_for(from);
      return {slot(from), count_[from]};
    }
  };
};

/// bf16 activations: what most checkpoints were trained in.
using Cuda = BasicCuda<Bf16>;

namespace detail {

/// The values of a device view, for kernels.
template <class T, int Rank>
auto raw(View<T, Rank> view) {
  using Value = std::remove_pointer_t<decltype(values_of(view.data()))>;
  return View<Value, Rank>(values_of(view.data()), view.extents(), view.strides());
}

inline const std::int32_t* raw_length(const OnDevice<std::int32_t>* length) { return length ? values_of(length) : nullptr; }

}  // namespace detail

namespace ops {

template <class E>
struct Impl<CopyRows, BasicCuda<E>> {
  using B = BasicCuda<E>;
  static void run(Context<B>& ctx, Matrix<const OnDevice<E>> from, Matrix<OnDevice<E>> to) {
    cuda::copy_rows<E>(ctx.backend.device(), detail::raw(from), detail::raw(to));
  }
};

template <class E>
struct Impl<UploadValues, BasicCuda<E>> {
  static void run(Context<BasicCuda<E>>& ctx, const void* from, void* to, std::size_t bytes) { ctx.backend.device().copy_to_device(to, from, bytes); }
};

template <class E>
struct Impl<Upload, BasicCuda<E>> {
  static void run(Context<BasicCuda<E>>& ctx, std::span<const float> from, OnDevice<E>* to) {
    if constexpr (std::is_same_v<E, float>) {
      ctx.backend.device().copy_to_device(to, from.data(), from.size_bytes());
    } else {
      const Arena::Scope scope(ctx.arena);
      auto* wide = values_of(ctx.arena.template take<OnDevice<float>>(static_cast<std::int64_t>(from.size())));
      ctx.backend.device().copy_to_device(wide, from.data(), from.size_bytes());
      cuda::convert<float, E>(ctx.backend.device(), wide, values_of(to), static_cast<std::int64_t>(from.size()));
    }
  }
};

template <class E>
struct Impl<UploadTensor, BasicCuda<E>> {
  template <class T>
  static Tensor<T> run(Context<BasicCuda<E>>& ctx, const AnyTensor& tensor) {
    Tensor<T> out = make_tensor<T>(ctx.backend, tensor.shape());
    if (out.elements() != 0) cuda::upload_tensor(ctx.backend.device(), tensor, values_of(out.data()), dtype_of<T>);
    return out;
  }
};

template <class E>
struct Impl<Download, BasicCuda<E>> {
  template <class T>
  static Tensor<float> run(Context<BasicCuda<E>>& ctx, Matrix<const OnDevice<T>> from) {
    Tensor<float> out(from.shape());
    if (out.elements() == 0) return out;
    const Arena::Scope scope(ctx.arena);
    Matrix<const OnDevice<T>> rows = from;
    if constexpr (std::is_same_v<T, E>) {
      if (!from.contiguous()) {
        const Matrix<OnDevice<E>> together = ctx.arena.template matrix<OnDevice<E>>(from.extent(0), from.extent(1));
        cuda::copy_rows<E>(ctx.backend.device(), detail::raw(from), detail::raw(together));
        rows = together;
      }
    }
    require(rows.contiguous(), "m2lm::ops::download: rows of ", from.extent(1), " elements at a distance of ", from.stride(0));
    if constexpr (std::is_same_v<T, float>) {
      ctx.backend.device().copy_to_host(out.data(), values_of(rows.data()), static_cast<std::size_t>(out.elements()) * sizeof(float));
    } else {
      std::vector<T> narrow(static_cast<std::size_t>(out.elements()));
      ctx.backend.device().copy_to_host(narrow.data(), values_of(rows.data()), narrow.size() * sizeof(T));
      std::transform(narrow.begin(), narrow.end(), out.data(), [](T x) { return to_float(x); });
    }
    return out;
  }
};

template <class E>
struct Impl<Replay, BasicCuda<E>> {
  template <class Body>
  static bool run(Context<BasicCuda<E>>& ctx, const StepKey& key, Body& body) {
    cuda::ReplayKey words;
    std::copy(std::begin(key.words), std::end(key.words), words.words);
    return ctx.backend.device().replay(words, FunctionRef<void()>(body));
  }
};

template <class E>
struct Impl<Pack, BasicCuda<E>> {
  static PackedMatrix run(Context<BasicCuda<E>>& ctx, std::span<const AnyTensor> sources, DType format, bool gated) {
    require<OptionError>(cuda::has_format<E>(format), "m2lm::Cuda: activations are in ", dtype_name(dtype_of<E>), ", so weights are in ",
                         dtype_name(dtype_of<E>), ", q8 or q4, not in ", dtype_name(format),
                         "; for those use BasicCuda<float>, BasicCuda<Half> or BasicCuda<Bf16>");
    return cuda::pack<E>(ctx.backend.device(), ctx.backend.shared_device(), sources, format, gated);
  }
};

template <class E>
struct Impl<Linear, BasicCuda<E>> {
  using B = BasicCuda<E>;
  static void run(Context<B>& ctx, Matrix<const OnDevice<E>> x, const PackedMatrix& w, const Epilogue<OnDevice<E>>& epilogue, Matrix<OnDevice<E>> y) {
    const Arena::Scope scope(ctx.arena);
    std::byte* scratch = ctx.arena.template take<std::byte>(static_cast<std::int64_t>(cuda::linear_scratch<E>(x.extent(0), w)));
    cuda::linear<E, E>(ctx.backend.device(), detail::raw(x), w, values_of(epilogue.bias), epilogue.activation, detail::raw(epilogue.residual),
                       detail::raw(y), scratch);
  }
  static void run(Context<B>& ctx, Matrix<const OnDevice<E>> x, const PackedMatrix& w, Matrix<OnDevice<float>> y) {
    const Arena::Scope scope(ctx.arena);
    std::byte* scratch = ctx.arena.template take<std::byte>(static_cast<std::int64_t>(cuda::linear_scratch<E>(x.extent(0), w)));
    cuda::linear<E, float>(ctx.backend.device(), detail::raw(x), w, nullptr, Activation::none, Matrix<const float>(), detail::raw(y), scratch);
  }
};

template <class E>
struct Impl<RmsNorm, BasicCuda<E>> {
  static void run(Context<BasicCuda<E>>& ctx, Matrix<const OnDevice<E>> x, Vector<const OnDevice<E>> weight, double eps, Matrix<OnDevice<E>> y) {
    cuda::rms_norm<E>(ctx.backend.device(), detail::raw(x), values_of(weight.data()), static_cast<float>(eps), detail::raw(y));
  }
};

template <class E>
struct Impl<LayerNorm, BasicCuda<E>> {
  static void run(Context<BasicCuda<E>>& ctx, Matrix<const OnDevice<E>> x, Vector<const OnDevice<E>> weight, Vector<const OnDevice<E>> bias,
                  double eps, Matrix<OnDevice<E>> y) {
    cuda::layer_norm<E>(ctx.backend.device(), detail::raw(x), values_of(weight.data()), values_of(bias.data()), static_cast<float>(eps),
                        detail::raw(y));
  }
};

template <class E>
struct Impl<RopeAngles, BasicCuda<E>> {
  static void run(Context<BasicCuda<E>>& ctx, const Tensor<OnDevice<float>>& frequencies, std::int64_t first, const OnDevice<std::int32_t>* length,
                  Matrix<OnDevice<float>> cos, Matrix<OnDevice<float>> sin) {
    cuda::rope_angles(ctx.backend.device(), values_of(frequencies.data()), {.length = detail::raw_length(length), .first = first, .most_keys = 0},
                      detail::raw(cos), detail::raw(sin));
  }
};

template <class E>
struct Impl<Rope, BasicCuda<E>> {
  static void run(Context<BasicCuda<E>>& ctx, Matrix<OnDevice<E>> x, std::int64_t head_dim, Matrix<const OnDevice<float>> cos,
                  Matrix<const OnDevice<float>> sin) {
    cuda::rope<E>(ctx.backend.device(), detail::raw(x), head_dim, detail::raw(cos), detail::raw(sin));
  }
};

template <class E>
struct Impl<PlanKeyValues, BasicCuda<E>> {
  static KeyValuesPlan run(Context<BasicCuda<E>>&, DType format, std::int64_t kv_heads, std::int64_t head_dim, std::int64_t capacity) {
    require<OptionError>(format == dtype_of<E>, "m2lm::Cuda: a KV cache in ", dtype_name(format), " is not supported where activations are in ",
                         dtype_name(dtype_of<E>), "; give .kv_cache = ", dtype_name(dtype_of<E>),
                         ", or use BasicCuda<float>, BasicCuda<Half> or BasicCuda<Bf16>");
    return {capacity, static_cast<std::size_t>(kv_heads * capacity * head_dim) * sizeof(E)};
  }
};

template <class E>
struct Impl<AppendKeyValues, BasicCuda<E>> {
  static void run(Context<BasicCuda<E>>& ctx, Matrix<const OnDevice<E>> k, Matrix<const OnDevice<E>> v, std::int64_t first, const KeyValues& kv) {
    cuda::append_key_values<E>(ctx.backend.device(), detail::raw(k), detail::raw(v),
                               {.length = detail::raw_length(kv.length), .first = first, .most_keys = kv.capacity}, kv);
  }
};

template <class E>
struct Impl<RopeAppend, BasicCuda<E>> {
  static void run(Context<BasicCuda<E>>& ctx, Matrix<OnDevice<E>> qkv, std::int64_t heads, Matrix<const OnDevice<float>> cos,
                  Matrix<const OnDevice<float>> sin, std::int64_t first, const KeyValues& kv) {
    cuda::rope_append<E>(ctx.backend.device(), detail::raw(qkv), heads, detail::raw(cos), detail::raw(sin),
                         {.length = detail::raw_length(kv.length), .first = first, .most_keys = kv.capacity}, kv);
  }
};

template <class E>
struct Impl<CopyKeyValues, BasicCuda<E>> {
  static void run(Context<BasicCuda<E>>& ctx, const KeyValues& from, std::int64_t count, const KeyValues& to) {
    cuda::copy_key_values<E>(ctx.backend.device(), from, count, to);
  }
};

template <class E>
struct Impl<AddToLength, BasicCuda<E>> {
  static void run(const BasicCuda<E>& backend, OnDevice<std::int32_t>* length, std::int64_t by) {
    cuda::add_to_length(backend.device(), values_of(length), static_cast<std::int32_t>(by));
  }
};

template <class E>
struct Impl<SetLength, BasicCuda<E>> {
  static void run(const BasicCuda<E>& backend, OnDevice<std::int32_t>* length, std::int64_t value) {
    cuda::set_length(backend.device(), values_of(length), static_cast<std::int32_t>(value));
  }
};

template <class E>
struct Impl<Attention, BasicCuda<E>> {
  static void run(Context<BasicCuda<E>>& ctx, Matrix<const OnDevice<E>> q, const KeyValues& kv, std::int64_t keys, std::int64_t first,
                  AttentionMask mask, double scale, Matrix<OnDevice<E>> y, Sinks sinks) {
    const Arena::Scope scope(ctx.arena);
    const bool ordered = mask.causal || mask.window > 0;
    const cuda::Position position{.length = ordered ? detail::raw_length(kv.length) : nullptr,
                                  .first = first,
                                  .most_keys = ordered ? std::min(BasicCuda<E>::key_bucket(keys), kv.capacity) : keys};
    std::byte* scratch = ctx.arena.template take<std::byte>(static_cast<std::int64_t>(
        cuda::attention_scratch<E>(ctx.backend.device().properties(), q.extent(0), q.extent(1) / kv.head_dim, kv, position.most_keys)));
    cuda::attention<E>(ctx.backend.device(), detail::raw(q), kv, position, mask, static_cast<float>(scale), detail::raw(y), sinks, scratch);
  }
};

template <class E>
struct Impl<GatherRows, BasicCuda<E>> {
  static void run(Context<BasicCuda<E>>& ctx, Matrix<const OnDevice<E>> table, Vector<const OnDevice<std::int32_t>> ids, Matrix<OnDevice<E>> y) {
    cuda::gather_rows<E>(ctx.backend.device(), detail::raw(table), values_of(ids.data()), detail::raw(y));
  }
  /// Of a table in the host's memory: the rows travel.
  static void run(Context<BasicCuda<E>>& ctx, const AnyTensor& table, std::span<const std::int32_t> ids, Matrix<OnDevice<E>> y) {
    const std::int64_t width = table.shape()[1];
    Tensor<float> rows(Shape{static_cast<std::int64_t>(ids.size()), width});
    for (std::size_t i = 0; i < ids.size(); ++i) table.copy_to(rows.data() + static_cast<std::int64_t>(i) * width, ids[i] * width, width);
    const Arena::Scope scope(ctx.arena);
    const Matrix<OnDevice<E>> together = ctx.arena.template matrix<OnDevice<E>>(y.extent(0), y.extent(1));
    upload(ctx, std::as_const(rows).span(), together.data());
    cuda::copy_rows<E>(ctx.backend.device(), detail::raw(Matrix<const OnDevice<E>>(together)), detail::raw(y));
  }
};

template <class E>
struct Impl<Patchify, BasicCuda<E>> {
  static void run(Context<BasicCuda<E>>& ctx, View<const OnDevice<E>, 3> pixels, std::int64_t patch, Matrix<OnDevice<E>> y) {
    cuda::patchify<E>(ctx.backend.device(), detail::raw(pixels), patch, detail::raw(y));
  }
};

template <class E>
struct Impl<AddRows, BasicCuda<E>> {
  static void run(Context<BasicCuda<E>>& ctx, Matrix<OnDevice<E>> x, Matrix<const OnDevice<E>> addend) {
    cuda::add_rows<E>(ctx.backend.device(), detail::raw(x), detail::raw(addend));
  }
};

template <class E>
struct Impl<ActivationForward, BasicCuda<E>> {
  static void run(Context<BasicCuda<E>>& ctx, Matrix<const OnDevice<E>> z, Activation activation, Matrix<OnDevice<E>> y) {
    cuda::activation_forward<E>(ctx.backend.device(), detail::raw(z), activation, detail::raw(y));
  }
};

template <class E>
struct Impl<Sample, BasicCuda<E>> {
  static void run(Context<BasicCuda<E>>& ctx, Matrix<OnDevice<float>> logits, OnDevice<SamplerRow>* rows, OnDevice<std::uint32_t>* seen,
                  OnDevice<std::int32_t>* ids, bool greedy) {
    const Arena::Scope scope(ctx.arena);
    std::byte* scratch = ctx.arena.template take<std::byte>(static_cast<std::int64_t>(cuda::sample_scratch(logits.extent(0), logits.extent(1))));
    cuda::sample(ctx.backend.device(), detail::raw(logits), values_of(rows), seen ? values_of(seen) : nullptr, values_of(ids), scratch, greedy);
  }
};

}  // namespace ops
}  // namespace m2lm
