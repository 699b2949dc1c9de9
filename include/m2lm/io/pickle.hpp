// Pickled state dicts: the tensors that a pickle of torch.save describes, read without running anything in it.
// Floor: io. May include: core, interop.
#pragma once

#include <m2lm/core/dtype.hpp>

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

namespace m2lm::inline M2LM_ABI {

/// A tensor as a pickle describes it; the texts are in the pickle's bytes. Nothing of it is checked against the storage.
struct PickledTensor {
  std::string_view name;
  DType dtype = DType::f32;
  std::string_view storage;                  ///< key of the storage, the NAME of "data/NAME"
  std::int64_t storage_elements = 0;         ///< elements that the storage is said to have
  std::int64_t offset = 0;                   ///< in elements
  std::vector<std::int64_t> shape, strides;  ///< max_rank extents at most
};

/// Limits of a PyTorch file.
struct PytorchLimits {
  std::size_t max_pickle_bytes = std::size_t{1} << 24;  ///< a state dict takes about 150 for each tensor; at most 2^31
};

/// The tensors of the state dict that the pickle builds, in its order; other values of it are left out. A pickle is a program; this
/// interpreter knows only the steps and names that torch.save of a state dict uses, and calls nothing.
/// throws CheckpointError naming `file`, the position, and the opcode or global that is not of these.
/// Source: CPython's Lib/pickletools.py for the opcodes; torch/_utils.py and torch/serialization.py for what torch puts in.
std::vector<PickledTensor> read_pickled_tensors(std::span<const std::byte> pickle, std::string_view file, const PytorchLimits& limits = {});

}  // namespace m2lm
