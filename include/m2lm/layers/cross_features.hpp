// CrossFeatures: what an encoder leaves for hooks of the decoder to read, besides the rows that enter the sequence.
// Floor: layers. May include: core, ops.
#pragma once

#include <m2lm/core/tensor.hpp>

#include <cstdint>
#include <memory>
#include <span>
#include <utility>
#include <vector>

namespace m2lm::inline M2LM_ABI {

/// One level of a feature pyramid: values [height·width, channels], row by row.
template <class S>
struct FeatureLevel {
  std::int64_t height = 0, width = 0;
  Tensor<S> values;
};

/// The values of all levels below each other: [Σ height·width, channels]. requires equal channels.
template <class S>
Tensor<S> flatten(std::span<const FeatureLevel<S>> levels) {
  std::int64_t rows = 0;
  for (const FeatureLevel<S>& level : levels) rows += level.values.shape()[0];
  Tensor<S> out(Shape{rows, levels.empty() ? 0 : levels[0].values.shape()[1]});
  S* to = out.data();
  for (const FeatureLevel<S>& level : levels) {
    require(level.values.shape()[1] == out.shape()[1], "m2lm::flatten: a level is ", level.values.shape(), ", the first has ", out.shape()[1], " channels");
    for (const S& value : level.values.span()) *to++ = value;
  }
  return out;
}

/// The pyramid of one media instance, and what the decoder's hook derived from it once (its keys and values, say).
template <class S>
class CrossFeatures {
  std::shared_ptr<const void> derived_;

 public:
  std::vector<FeatureLevel<S>> levels;

  /// Levels as the encoder gave them.
  explicit CrossFeatures(std::vector<FeatureLevel<S>> pyramid) : levels(std::move(pyramid)) {}
  /// Keeps what the hook's `derive` returned.
  template <class T>
  void set_derived(T value) {
    derived_ = std::make_shared<const T>(std::move(value));
  }
  /// requires T to be what the hook's `derive` returned.
  template <class T>
  const T& derived() const {
    return *static_cast<const T*>(derived_.get());
  }
};

/// An instance of a sequence: its rows stand at positions [begin, begin + rows).
template <class S>
struct CrossInstance {
  std::shared_ptr<const CrossFeatures<S>> features;
  std::int64_t begin = 0, rows = 0;
};

/// Those that begin at `position` or before it, the nearest last. requires `media` in the order of the sequence.
template <class S>
std::span<const CrossInstance<S>> visible(std::span<const CrossInstance<S>> media, std::int64_t position) {
  std::size_t count = media.size();
  while (count > 0 && media[count - 1].begin > position) --count;
  return media.first(count);
}

}  // namespace m2lm
