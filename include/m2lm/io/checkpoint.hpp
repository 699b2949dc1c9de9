// Checkpoint: the tensors of a Hugging Face directory, single or in shards, by name.
// Floor: io. May include: core, interop.
#pragma once

#include <m2lm/core/tensor.hpp>
#include <m2lm/io/config.hpp>
#include <m2lm/io/gguf.hpp>
#include <m2lm/io/pickle.hpp>
#include <m2lm/io/safetensors.hpp>

#include <cstddef>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace m2lm::inline M2LM_ABI {

/// Limits of the files of a directory.
struct CheckpointLimits {
  JsonLimits json = {};                ///< of config.json, the index and the tokenizer's files
  SafetensorsLimits safetensors = {};  ///< of each *.safetensors
  PytorchLimits pytorch = {};          ///< of each pytorch_model*.bin
  GgufLimits gguf = {};                ///< of a *.gguf
};

/// All tensors of a directory: `model.safetensors`, or the shards that `model.safetensors.index.json` names, or the same with
/// `pytorch_model.bin` (io/pytorch.hpp), or a model in GGUF (io/gguf_model.hpp) under the names it has in such a directory.
/// Memory-mapped; copies share the mapping.
class Checkpoint {
  struct State;
  std::shared_ptr<const State> state_;

 public:
  Checkpoint() = default;
  /// throws CheckpointError: no such directory, no checkpoint in it, a format that is not supported, a missing shard, shards
  /// that lack promised tensors, an index that leads out of the directory, or a damaged file. All that is missing is named at once.
  /// `directory` may be the path of a *.gguf file.
  static Checkpoint open(std::string_view directory, const CheckpointLimits& limits = {});

  /// Tensors that are in no file; `name` stands for the directory in messages. requires distinct names.
  static Checkpoint of_tensors(std::string_view name, std::vector<NamedTensor> tensors);

  /// These tensors and those of `other` whose names are not among them.
  Checkpoint joined(const Checkpoint& other) const;

  /// As given to `open`, or the name given to `of_tensors`.
  const std::string& directory() const;
  /// In the order of the files and, in each, of their data.
  std::vector<std::string> names() const;
  /// nullptr when there is no such tensor. Of a GGUF model, blocks that DType has not become f32 when they are first asked for.
  /// throws CheckpointError when it is there with a dtype the library does not know.
  const AnyTensor* find(std::string_view name) const;
  /// Path of the file that holds the tensor. throws CheckpointError when there is no such tensor.
  std::string_view file_of(std::string_view name) const;
  /// The files that the tensors lie in; none where they were made.
  std::span<const MappedFile> files() const;
  /// False of tensors that were made.
  bool has_files() const { return state_ != nullptr && !files().empty(); }
  /// Sum of the sizes of all files.
  std::size_t total_bytes() const;
  /// throws CheckpointError naming the file that was truncated, or could not be read, since it was opened: what was read of it since
  /// then may be zeros. Ask after reading, before the values are believed.
  void require_intact() const;
  /// Gives the pages of all files back to the system; they are read again when touched.
  void release_pages() const;
};

}  // namespace m2lm
