// CrossFeatures: what an encoder leaves for hooks of the decoder to read, besides the rows that enter the sequence.
// Floor: layers. May include: core, ops.
#pragma once

#include <m2lm/core/tensor.hpp>

#include <cstdint>
#include <memory>
#include <vector>

namespace m2lm {

/// One level of a feature pyramid: values [height·width, channels], row by row.
template <class S>
struct FeatureLevel {
  std::int64_t height = 0, width = 0;
  Tensor<S> values;
};

/// The pyramid of one media instance, and what the decoder's hook derived from it once (keys and values per layer, say).
template <class S>
struct CrossFeatures {
  std::vector<FeatureLevel<S>> levels;
  std::vector<Tensor<S>> derived;
};

/// An instance of a sequence: its rows stand at positions [begin, begin + rows).
template <class S>
struct CrossInstance {
  std::shared_ptr<const CrossFeatures<S>> features;
  std::int64_t begin = 0, rows = 0;
};

}  // namespace m2lm
