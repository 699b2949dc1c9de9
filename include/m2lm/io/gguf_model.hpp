// GgufModel: a LLaMA-family model in GGUF form, and its CLIP companion, seen as a Hugging Face checkpoint.
// Floor: io. May include: core, interop.
#pragma once

#include <m2lm/io/config.hpp>
#include <m2lm/io/gguf.hpp>
#include <m2lm/io/image_processor.hpp>
#include <m2lm/io/tokenizer.hpp>

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace m2lm::inline M2LM_ABI {

/// The text model and, for one that sees, the encoder and projector ("mmproj"). What GGUF has under its own names and in its own
/// order is translated, so that the rest of the library meets one dialect. source: llama.cpp's converters and its file format.
struct GgufModel {
  Gguf text;
  std::optional<Gguf> vision;

  /// The model that `path` names: a *.gguf file, with the mmproj*.gguf beside it whose width fits; or a directory that holds no
  /// Hugging Face weights, one such file and at most one companion. Nothing when it names neither.
  /// throws CheckpointError when it names several, and as Gguf::open.
  static std::optional<GgufModel> find(std::string_view path, const GgufLimits& limits = {});

  /// The two as config.json describes them. throws CheckpointError naming file and key: an architecture, projector or scaling that is
  /// not supported, a key that is missing.
  ConfigValue config() const;

  /// A tensor under its Hugging Face name and where it is.
  struct Source {
    std::string name;  ///< model.layers.0.self_attn.q_proj.weight; with a companion, language_model.model.…
    Gguf file;
    std::string stored;      ///< blk.0.attn_q.weight
    std::int64_t heads = 0;  ///< rows are stored with the halves of so many heads interleaved; 0 = as they are
  };
  /// All tensors, in the order of the files; what has no name there keeps its own.
  std::vector<Source> sources() const;
  /// The tensor, with its rows in Hugging Face's order. Blocks that DType has not become f32.
  static AnyTensor read(const Source& source);
  /// Bytes of memory that all tensors take that are not used where they are in the file.
  std::size_t unpacked_bytes() const;

  /// The text model's; with a companion it knows the placeholder "<image>", behind the vocabulary if it is not in it.
  Tokenizer tokenizer() const;
  /// The Jinja text of the chat template; empty if there is none.
  std::string chat_template() const;
  /// Ids that end an answer.
  std::vector<std::int32_t> stop_tokens() const;
  /// CLIP's preprocessing with the companion's mean and deviation. requires a companion.
  ImageProcessorConfig image_processor() const;
};

}  // namespace m2lm
