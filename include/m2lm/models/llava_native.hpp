// LLaVA's own checkpoint layout, read as if transformers had written it.
// Floor: models. May include: core, ops, layers, parts, io, sampling.
#pragma once

#include <m2lm/io/config.hpp>

#include <cstdint>
#include <string>
#include <string_view>

namespace m2lm::inline M2LM_ABI::detail {

/// The id that stands for a picture in token ids of LLaVA's own code. source: llava/constants.py.
inline constexpr std::int32_t llava_image_token_index = -200;

/// Whether config.json is one of LLaVA's own code: it has mm_… keys and no text_config.
bool is_llava_native(const ConfigValue& root);

/// The directory of the vision tower that `root` names (mm_vision_tower): `given` itself if it has a config.json, or the directory in
/// it that has the tower's name; without `given`, a directory of that name, or `vision_tower`, in `directory`. Only the last part of the
/// tower's name is used, so nothing outside these two directories is opened. Empty when there is none.
/// throws CheckpointError when `given` is none of that.
std::string find_llava_tower(const ConfigValue& root, std::string_view directory, std::string_view given);

/// `root` in transformers' words: text_config, vision_config (from the tower's directory, or a known tower's sizes), vision_feature_layer
/// and …_select_strategy, image_token_index, and how pictures are prepared under `image_processor_config`.
/// throws CheckpointError naming file and key: a projector, feature, aspect ratio or tower that is not supported or found.
ConfigValue translate_llava_config(const ConfigValue& root, std::string_view directory, std::string_view tower_directory);

}  // namespace m2lm::detail
