// PackedMatrix: a weight matrix in the form that a backend's kernels read.
// Floor: core. May include: config, core.
#pragma once

#include <m2lm/core/dtype.hpp>

#include <cstddef>
#include <cstdint>
#include <memory>

namespace m2lm::inline M2LM_ABI {

/// A matrix [rows, cols] (rows = outputs, cols = inputs) packed for one backend. The format is a run-time value: each backend
/// has a kernel table by format. Derived from a checkpoint's tensor, never trained or saved. Copies share the bytes.
struct PackedMatrix {
  DType format = DType::native;
  std::int64_t rows = 0;
  std::int64_t cols = 0;
  /// Two matrices of rows/2 each, laid out so that a kernel can emit act(first) * second (see ops::linear).
  bool gated = false;
  std::shared_ptr<const std::byte> data;
  std::size_t bytes = 0;

  /// True of one that was not packed.
  bool empty() const { return data == nullptr; }
};

}  // namespace m2lm
