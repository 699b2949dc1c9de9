// KvCache: the keys and values of every layer of one sequence.
// Floor: layers. May include: core, ops.
#pragma once

#include <m2lm/layers/cross_features.hpp>
#include <m2lm/ops/attention.hpp>

#include <cstdlib>
#include <memory>
#include <span>
#include <vector>

namespace m2lm {

/// Room for `capacity` positions in `layers` layers. The memory is zero and only becomes resident as it is written, so a long
/// context costs nothing until it is used. Movable.
template <class B>
class KvCache {
  struct Free {
    void operator()(std::byte* p) const { std::free(p); }
  };
  using Bytes = std::unique_ptr<std::byte, Free>;
  std::vector<Bytes> storage_;
  std::vector<KeyValues> layers_;
  std::int64_t capacity_ = 0, length_ = 0;

 public:
  KvCache() = default;
  /// throws CapacityError with the size in MiB when the memory cannot be had.
  KvCache(Context<B>& ctx, DType format, std::int64_t layers, std::int64_t kv_heads, std::int64_t head_dim, std::int64_t capacity) : capacity_(capacity) {
    const KeyValuesPlan plan = ops::plan_key_values(ctx, format, kv_heads, head_dim, capacity);
    storage_.reserve(static_cast<std::size_t>(2 * layers));  // so that nothing fails between taking a block and owning it
    for (std::int64_t i = 0; i < 2 * layers; ++i) {
      storage_.emplace_back(static_cast<std::byte*>(std::calloc(plan.bytes ? plan.bytes : 1, 1)));
      require<CapacityError>(storage_.back() != nullptr, "m2lm: no memory for a KV cache of ", capacity, " positions (",
                             2 * static_cast<std::size_t>(layers) * plan.bytes >> 20, " MiB); ask for a shorter context");
    }
    for (std::int64_t i = 0; i < layers; ++i)
      layers_.push_back(KeyValues{.format = format, .kv_heads = kv_heads, .head_dim = head_dim, .capacity = plan.capacity,
                                  .keys = storage_[static_cast<std::size_t>(2 * i)].get(), .values = storage_[static_cast<std::size_t>(2 * i + 1)].get()});
  }

  /// A cache of its own with the same positions. requires capacity >= length().
  KvCache fork(Context<B>& ctx, std::int64_t capacity) const {
    if (layers_.empty()) return {};
    KvCache out(ctx, layers_[0].format, static_cast<std::int64_t>(layers_.size()), layers_[0].kv_heads, layers_[0].head_dim, capacity);
    for (std::size_t i = 0; i < layers_.size(); ++i) ops::copy_key_values(ctx, layers_[i], length_, out.layers_[i]);
    out.length_ = length_;
    return out;
  }

  std::int64_t capacity() const { return capacity_; }
  /// Positions that hold keys and values in every layer.
  std::int64_t length() const { return length_; }
  void advance(std::int64_t positions) { length_ += positions; }
  /// Forgets the positions from `length` on.
  void truncate(std::int64_t length) {
    require(0 <= length && length <= length_, "m2lm::KvCache::truncate(", length, ") of ", length_, " positions");
    length_ = length;
  }
  const KeyValues& layer(std::int64_t i) const { return layers_[static_cast<std::size_t>(i)]; }
};

/// Which rows of a batch belong to one sequence: rows [begin, begin + count) stand at positions first() onwards. Without a cache they
/// are the whole sequence, from position 0, and their keys and values are forgotten (training does this).
template <class B>
struct SequenceRows {
  KvCache<B>* cache = nullptr;
  std::int64_t begin = 0;
  std::int64_t count = 0;
  std::span<const CrossInstance<ScalarOf<B>>> media = {};  ///< for hooks: the instances in the sequence so far, in its order

  std::int64_t first() const { return cache ? cache->length() : 0; }
  /// Where a row of the batch stands in its sequence. requires begin <= row < begin + count.
  std::int64_t position(std::int64_t row) const { return first() + row - begin; }
};

}  // namespace m2lm
