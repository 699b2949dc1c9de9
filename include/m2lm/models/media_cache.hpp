// MediaCache: what attached media became, kept by their content so that the same picture is encoded once.
// Floor: models. May include: core, ops, layers, parts, io, sampling.
#pragma once

#include <m2lm/core/tensor.hpp>
#include <m2lm/io/image.hpp>
#include <m2lm/layers/cross_features.hpp>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace m2lm::inline M2LM_ABI {

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
  /// Adds bytes. Where they are cut makes no difference.
  void bytes(std::span<const std::byte> data);
  /// Adds the bytes of a plain value.
  template <class T>
  void value(const T& x) {
    static_assert(std::is_trivially_copyable_v<T>, "m2lm::ContentHash::value: plain values only");
    bytes(std::as_bytes(std::span<const T>(&x, 1)));
  }
  /// Of all that was added so far.
  ContentKey key() const;
};

/// The content of an input of a modality. For an own input type write such a function beside it; without one its instances are
/// encoded anew each time.
inline void hash_content(ContentHash& hash, const Image& image) {
  hash.value(image.width);
  hash.value(image.height);
  hash.bytes(std::as_bytes(std::span(image.pixels)));
}
/// Of a text.
inline void hash_content(ContentHash& hash, const std::string& text) {
  hash.value(text.size());
  hash.bytes(std::as_bytes(std::span(text.data(), text.size())));
}
/// Of plain values.
template <class T>
  requires std::is_trivially_copyable_v<T>
void hash_content(ContentHash& hash, const std::vector<T>& values) {
  hash.value(values.size());
  hash.bytes(std::as_bytes(std::span<const T>(values)));
}
/// Of embeddings.
inline void hash_content(ContentHash& hash, const AnyTensor& tensor) {
  hash.value(tensor.dtype());
  hash.value(tensor.shape().rank());
  for (const std::int64_t extent : tensor.shape().extents()) hash.value(extent);
  hash.bytes({tensor.data(), tensor.bytes()});
}

/// How a cache has done so far.
struct MediaCacheStats {
  std::size_t entries = 0;  ///< encoded media that are kept
  std::size_t bytes = 0;    ///< of them
  std::size_t hits = 0;     ///< media that were not encoded, because they were there
  std::size_t misses = 0;   ///< media that were encoded
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
class MediaCache {
  struct Entry {
    ContentKey key;
    std::shared_ptr<const void> media;
    std::size_t bytes = 0;
    std::uint64_t used = 0;
  };
  mutable std::mutex mutex_;
  std::vector<Entry> entries_;  // some hundred at most: media are large
  std::uint64_t clock_ = 0;
  std::size_t capacity_;
  MediaCacheStats stats_;

 public:
  explicit MediaCache(std::size_t capacity) : capacity_(capacity) {}

  /// Null when there is no such entry.
  std::shared_ptr<const void> find(const ContentKey& key);
  /// Media that are larger than the whole cache are not kept.
  void insert(const ContentKey& key, std::shared_ptr<const void> media, std::size_t bytes);
  /// Forgets everything: encoder or projector have changed.
  void clear();
  MediaCacheStats stats() const;
};

}  // namespace detail
}  // namespace m2lm
