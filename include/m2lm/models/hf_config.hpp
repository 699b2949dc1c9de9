// Reading config.json and generation_config.json of Hugging Face directories, in both dialects.
// Floor: models. May include: core, ops, layers, parts, io, sampling.
#pragma once

#include <m2lm/io/config.hpp>
#include <m2lm/parts/decoders/llama.hpp>
#include <m2lm/parts/encoders/clip_vit.hpp>
#include <m2lm/parts/projectors/mlp_projector.hpp>

#include <cstdint>
#include <string_view>
#include <vector>

namespace m2lm::inline M2LM_ABI {

/// Reads `root`, or its "text_config". Missing keys get the defaults of the model_type, as in transformers. Understands
/// `rope_theta` + `rope_scaling` and the newer `rope_parameters`. throws CheckpointError naming file and key: an architecture,
/// activation or RoPE scaling that is not supported, or sizes that contradict each other.
void read_config(const ConfigValue& root, LlamaConfig& config);

/// Reads `root`, or its "vision_config"; the feature choice from root's vision_feature_layer and vision_feature_select_strategy.
void read_config(const ConfigValue& root, ClipVisionConfig& config);

/// Reads the projector's activation and bias; the widths are not in the file and stay as they are.
void read_config(const ConfigValue& root, ProjectorConfig& config);

/// The activation that config.json calls `name`. throws CheckpointError at `where` for an unknown one.
Activation read_activation(const ConfigValue& where, std::string_view name);

/// Ids that end an answer: generation_config.json's eos_token_id if that file is there, else config.json's.
std::vector<std::int32_t> read_stop_tokens(std::string_view directory, const ConfigValue& root);

}  // namespace m2lm
