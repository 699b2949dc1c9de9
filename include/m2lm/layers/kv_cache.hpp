// KvCache: the keys and values of every layer of one sequence.
// Floor: layers. May include: core, ops.
#pragma once

#include <m2lm/layers/cross_features.hpp>
#include <m2lm/ops/attention.hpp>

#include <cstdlib>
#include <memory>
#include <span>
#include <type_traits>
#include <vector>

namespace m2lm::inline M2LM_ABI {

/// Room for `capacity` positions in `layers` layers. The memory is zero; that of the host only becomes resident as it is written, so a
/// long context costs nothing until it is used. A device's knows the length too: kernels read it there. Movable.
template <class B>
class KvCache {
  struct Free {
    MemoryResource* memory = nullptr;
    void operator()(std::byte* p) const {
      if (memory)
        memory->release(p);
      else
        std::free(p);
    }
  };
  using Bytes = std::unique_ptr<std::byte, Free>;
  struct HostLength {};
  struct DeviceLength {
    std::unique_ptr<B> backend;  // a pointer, so that a cache can be made empty
    Tensor<OnDevice<std::int32_t>> value;
  };
  [[no_unique_address]] std::conditional_t<HostBackend<B>, HostLength, DeviceLength> on_device_;  // first: what follows may lie in its memory
  std::vector<Bytes> storage_;
  std::vector<KeyValues> layers_;
  std::int64_t capacity_ = 0, length_ = 0;
  std::uint64_t number_ = next_number();

  static Bytes take_zeroed([[maybe_unused]] const B& backend, std::size_t bytes) {
    if constexpr (HostBackend<B>)
      return Bytes(static_cast<std::byte*>(std::calloc(bytes ? bytes : 1, 1)), Free{});
    else
      return Bytes(static_cast<std::byte*>(backend.memory().allocate_zeroed(bytes)), Free{&backend.memory()});
  }

 public:
  KvCache() = default;
  /// throws CapacityError with the size in MiB when the memory cannot be had.
  KvCache(Context<B>& ctx, DType format, std::int64_t layers, std::int64_t kv_heads, std::int64_t head_dim, std::int64_t capacity) : capacity_(capacity) {
    const KeyValuesPlan plan = ops::plan_key_values(ctx, format, kv_heads, head_dim, capacity);
    storage_.reserve(static_cast<std::size_t>(2 * layers));  // so that nothing fails between taking a block and owning it
    for (std::int64_t i = 0; i < 2 * layers; ++i) {
      storage_.push_back(take_zeroed(ctx.backend, plan.bytes));
      require<CapacityError>(storage_.back() != nullptr, "m2lm: no memory for a KV cache of ", capacity, " positions (",
                             2 * static_cast<std::size_t>(layers) * plan.bytes >> 20, " MiB); ask for a shorter context");
    }
    const OnDevice<std::int32_t>* length = nullptr;
    if constexpr (!HostBackend<B>) {
      on_device_.backend = std::make_unique<B>(ctx.backend);
      on_device_.value = make_tensor<OnDevice<std::int32_t>>(ctx.backend, Shape{1});
      length = on_device_.value.data();
    }
    for (std::int64_t i = 0; i < layers; ++i)
      layers_.push_back(KeyValues{.format = format, .kv_heads = kv_heads, .head_dim = head_dim, .capacity = plan.capacity,
                                  .keys = storage_[static_cast<std::size_t>(2 * i)].get(), .values = storage_[static_cast<std::size_t>(2 * i + 1)].get(),
                                  .length = length});
  }

  /// A cache of its own with the same positions. requires capacity >= length().
  KvCache fork(Context<B>& ctx, std::int64_t capacity) const {
    if (layers_.empty()) return {};
    KvCache out(ctx, layers_[0].format, static_cast<std::int64_t>(layers_.size()), layers_[0].kv_heads, layers_[0].head_dim, capacity);
    for (std::size_t i = 0; i < layers_.size(); ++i) ops::copy_key_values(ctx, layers_[i], length_, out.layers_[i]);
    out.advance(length_);
    return out;
  }

  /// No other cache of the program has the same: its addresses are in recorded steps.
  std::uint64_t number() const { return number_; }
  /// Positions that fit.
  std::int64_t capacity() const { return capacity_; }
  /// Positions that hold keys and values in every layer.
  std::int64_t length() const { return length_; }
  /// Counts positions whose keys and values every layer has stored.
  void advance(std::int64_t positions) {
    if constexpr (!HostBackend<B>) ops::Impl<ops::AddToLength, B>::run(*on_device_.backend, on_device_.value.data(), positions);
    length_ += positions;
  }
  /// What advance does on the host: a recorded step that was repeated has done the rest.
  void count_repeated(std::int64_t positions) { length_ += positions; }
  /// Forgets the positions from `length` on.
  void truncate(std::int64_t length) {
    require(0 <= length && length <= length_, "m2lm::KvCache::truncate(", length, ") of ", length_, " positions");
    if constexpr (!HostBackend<B>)
      if (length != length_) ops::Impl<ops::SetLength, B>::run(*on_device_.backend, on_device_.value.data(), length);
    length_ = length;
  }
  /// Keys and values of layer i. requires 0 <= i < layers.
  const KeyValues& layer(std::int64_t i) const { return layers_[static_cast<std::size_t>(i)]; }
  /// Where a device keeps the length; null on the host.
  const OnDevice<std::int32_t>* device_length() const { return layers_.empty() ? nullptr : layers_[0].length; }
};

/// Which rows of a batch belong to one sequence: rows [begin, begin + count) stand at positions first() onwards. Without a cache they
/// are the whole sequence, from position 0, and their keys and values are forgotten (training does this).
template <class B>
struct SequenceRows {
  KvCache<B>* cache = nullptr;
  std::int64_t begin = 0;
  std::int64_t count = 0;
  std::span<const CrossInstance<ScalarOf<B>>> media = {};  ///< for hooks: the instances in the sequence so far, in its order

  /// Position of the first row: what the cache holds comes before it.
  std::int64_t first() const { return cache ? cache->length() : 0; }
  /// Where a device keeps first(); null on the host and without a cache.
  const OnDevice<std::int32_t>* device_length() const { return cache ? cache->device_length() : nullptr; }
  /// Where a row of the batch stands in its sequence. requires begin <= row < begin + count.
  std::int64_t position(std::int64_t row) const { return first() + row - begin; }
};

}  // namespace m2lm
