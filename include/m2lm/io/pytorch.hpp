// PytorchFile: the tensors of a file that torch.save made of a state dict, pytorch_model.bin.
// Floor: io. May include: core, interop.
#pragma once

#include <m2lm/core/tensor.hpp>
#include <m2lm/io/file.hpp>
#include <m2lm/io/pickle.hpp>

#include <memory>
#include <span>
#include <string>
#include <string_view>

namespace m2lm::inline M2LM_ABI {

/// One file in the zip format of PyTorch 1.6 and later. The pickle in it is read and not run (io/pickle.hpp).
class PytorchFile {
  struct File;
  std::shared_ptr<const File> file_;

 public:
  PytorchFile() = default;
  /// Maps the file. A contiguous tensor is a view of it, another is copied into order; the copies together take no more bytes than
  /// the file has. throws CheckpointError naming file and tensor: not of that format, a pickle that is no state dict, a tensor outside
  /// its storage or larger than it.
  static PytorchFile open(std::string_view path, const PytorchLimits& limits = {});

  /// In the order of the state dict.
  std::span<const std::string> names() const;
  /// Whether the file has a tensor of that name.
  bool contains(std::string_view name) const;
  /// The data may be unaligned. throws CheckpointError for an unknown name.
  const AnyTensor& tensor(std::string_view name) const;
  /// The file as it lies in memory.
  const MappedFile& mapping() const;
};

}  // namespace m2lm
