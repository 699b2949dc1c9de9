// MediaCache: what attached media became, kept by their content so that the same picture is encoded once.
// Floor: models. May include: core, ops, layers, parts, io, sampling.
#pragma once

#include <m2lm/core/tensor.hpp>
#include <m2lm/io/image.hpp>
#include <m2lm/layers/cross_features.hpp>

#include <cstddef>
#include <cstdint>
#include <list>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace m2lm {

/// 128 bits of content, keyed by a number that each process draws: contents that collide cannot be prepared in advance.
struct ContentKey {
  std::uint64_t high = 0, low = 0;
  friend constexpr bool operator==(const ContentKey&, const ContentKey&) = default;
};

/// Collects bytes into a ContentKey.
class ContentHash {
  ContentKey state_;
  std::uint64_t length_ = 0;

 public:
  ContentHash();
  void bytes(std::span<const std::byte> data);
  template <class T>
  void value(const T& x) {
    static_assert(std::is_trivially_copyable_v<T>, "m2lm::ContentHash::value: plain values only");
    bytes(std::as_bytes(std::span<const T>(&x, 1)));
  }
  ContentKey key() const;
};

/// The content of an input of a modality. For an own input type write such a function beside it; without one its instances are
/// encoded anew each time.
inline void hash_content(ContentHash& hash, const Image& image) {
  hash.value(image.width);
  hash.value(image.height);
  hash.bytes(std::as_bytes(std::span(image.pixels)));
}
inline void hash_content(ContentHash& hash, const std::string& text) {
  hash.value(text.size());
  hash.bytes(std::as_bytes(std::span(text.data(), text.size())));
}
template <class T>
  requires std::is_trivially_copyable_v<T>
void hash_content(ContentHash& hash, const std::vector<T>& values) {
  hash.value(values.size());
  hash.bytes(std::as_bytes(std::span<const T>(values)));
}
inline void hash_content(ContentHash& hash, const AnyTensor& tensor) {
  hash.value(tensor.dtype());
  hash.value(tensor.shape().rank());
  for (const std::int64_t extent : tensor.shape().extents()) hash.value(extent);
  hash.bytes({tensor.data(), tensor.bytes()});
}

/// How a cache has done so far.
struct MediaCacheStats {
  std::size_t entries = 0, bytes = 0;
  std::size_t hits = 0, misses = 0;
};

namespace detail {

template <class Input>
concept HashableContent = requires(ContentHash& hash, const Input& input) { hash_content(hash, input); };

/// What one attached instance became.
template <class S>
struct EncodedMedia {
  ContentKey key{};                               ///< equal keys of one component: equal media
  Tensor<S> rows;                                 ///< [rows, hidden]
  std::vector<std::int32_t> token_ids;            ///< instead of rows
  std::shared_ptr<const CrossFeatures<S>> cross;  ///< null where the encoder leaves none

  std::size_t bytes() const {
    std::size_t elements = static_cast<std::size_t>(rows.elements());
    if (cross)
      for (const FeatureLevel<S>& level : cross->levels) elements += 2 * static_cast<std::size_t>(level.values.elements());  // and what hooks derive
    return sizeof(EncodedMedia) + elements * sizeof(S) + token_ids.size() * sizeof(std::int32_t);
  }
};

/// A key that equals no other: of media whose content cannot be compared.
ContentKey unique_key();

/// Least recently used entries go first when `capacity` bytes are exceeded. Several threads may use one cache.
template <class S>
class MediaCache {
  using Media = std::shared_ptr<const EncodedMedia<S>>;
  struct KeyHash {
    std::size_t operator()(const ContentKey& key) const { return static_cast<std::size_t>(key.low); }
  };
  mutable std::mutex mutex_;
  std::list<Media> entries_;  // the most recently used first
  std::unordered_map<ContentKey, typename std::list<Media>::iterator, KeyHash> index_;
  std::size_t capacity_;
  MediaCacheStats stats_;

 public:
  explicit MediaCache(std::size_t capacity) : capacity_(capacity) {}

  /// Null when there is no such entry.
  Media find(const ContentKey& key) {
    const std::lock_guard lock(mutex_);
    const auto found = index_.find(key);
    if (found == index_.end()) {
      ++stats_.misses;
      return nullptr;
    }
    ++stats_.hits;
    entries_.splice(entries_.begin(), entries_, found->second);
    return entries_.front();
  }
  /// Media that are larger than the whole cache are not kept.
  void insert(Media media) {
    const std::size_t bytes = media->bytes();
    const std::lock_guard lock(mutex_);
    if (bytes > capacity_ || index_.contains(media->key)) return;
    while (stats_.bytes + bytes > capacity_) {
      stats_.bytes -= entries_.back()->bytes();
      index_.erase(entries_.back()->key);
      entries_.pop_back();
    }
    entries_.push_front(std::move(media));
    index_.emplace(entries_.front()->key, entries_.begin());
    stats_.bytes += bytes;
  }
  /// Forgets everything: the encoders have changed.
  void clear() {
    const std::lock_guard lock(mutex_);
    index_.clear();
    entries_.clear();
    stats_.bytes = 0;
  }
  MediaCacheStats stats() const {
    const std::lock_guard lock(mutex_);
    MediaCacheStats out = stats_;
    out.entries = entries_.size();
    return out;
  }
};

}  // namespace detail
}  // namespace m2lm
