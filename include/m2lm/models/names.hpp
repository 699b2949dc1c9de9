// Checkpoint dialects as data: where the canonical names of parameters are found in files in the wild.
// Floor: models. May include: core.
#pragma once

#include <array>
#include <span>
#include <string_view>

#include <m2lm/config.hpp>

namespace m2lm::inline M2LM_ABI {

/// Names that begin with `canonical` may be stored with any of the prefixes `stored`; the one that fits most tensors is used.
struct NameRule {
  std::string_view canonical;
  std::span<const std::string_view> stored;
};

namespace detail {

inline constexpr std::array<std::string_view, 3> decoder_prefixes{"model.", "language_model.model.", "model.language_model."};
inline constexpr std::array<std::string_view, 3> head_prefixes{"lm_head.", "language_model.lm_head.", "model.lm_head."};
inline constexpr std::array<std::string_view, 7> vision_prefixes{
    "vision_tower.vision_model.", "vision_tower.", "model.vision_tower.vision_model.", "model.vision_tower.", "model.vision_tower.vision_tower.vision_model.",
    "vision_model.", ""};
inline constexpr std::array<std::string_view, 2> projection_prefixes{"visual_projection.", "vision_tower.visual_projection."};
inline constexpr std::array<std::string_view, 2> projector_prefixes{"multi_modal_projector.", "model.multi_modal_projector."};

// LLaVA's own layout numbers the modules of its projector; activations are modules, too. A projector of one layer has no number.
inline constexpr std::array<std::string_view, 4> projector1_prefixes{"multi_modal_projector.linear_1.", "model.multi_modal_projector.linear_1.",
                                                                     "model.mm_projector.0.", "model.mm_projector."};
inline constexpr std::array<std::string_view, 3> projector2_prefixes{"multi_modal_projector.linear_2.", "model.multi_modal_projector.linear_2.",
                                                                     "model.mm_projector.2."};
inline constexpr std::array<std::string_view, 3> projector3_prefixes{"multi_modal_projector.linear_3.", "model.multi_modal_projector.linear_3.",
                                                                     "model.mm_projector.4."};

inline constexpr std::array<NameRule, 8> hugging_face_rules{{
    {"model.", decoder_prefixes},
    {"lm_head.", head_prefixes},
    {"vision_tower.vision_model.", vision_prefixes},
    {"vision_tower.visual_projection.", projection_prefixes},
    {"multi_modal_projector.linear_1.", projector1_prefixes},
    {"multi_modal_projector.linear_2.", projector2_prefixes},
    {"multi_modal_projector.linear_3.", projector3_prefixes},
    {"multi_modal_projector.", projector_prefixes},
}};

// Tensors that are in real files and that a model leaves alone: buffers, encoder layers behind the chosen one, CLIP's text half.
// A '*' stands for any text.
inline constexpr std::array<std::string_view, 12> ignorable_names{"*position_ids",
                                                                  "*rotary_emb.inv_freq",
                                                                  "*vision_tower*encoder.layers.*",
                                                                  "*vision_tower*post_layernorm.*",
                                                                  "vision_model.encoder.layers.*",
                                                                  "vision_model.post_layernorm.*",
                                                                  "encoder.layers.*",
                                                                  "post_layernorm.*",
                                                                  "*visual_projection.weight",
                                                                  "text_model.*",
                                                                  "text_projection.weight",
                                                                  "logit_scale"};

}  // namespace detail

/// The layouts of transformers' LLaMA, Mistral, CLIP and LLaVA checkpoints, old and new, and LLaVA's own. source: the key mappings of
/// transformers 4 and 5, files saved by both, and transformers' conversion of LLaVA's weights.
inline constexpr std::span<const NameRule> hugging_face_names{detail::hugging_face_rules};

/// Whether `name` matches a pattern in which '*' stands for any text.
constexpr bool glob_match(std::string_view pattern, std::string_view name) {
  while (!pattern.empty() && pattern.front() != '*') {
    if (name.empty() || name.front() != pattern.front()) return false;
    pattern.remove_prefix(1);
    name.remove_prefix(1);
  }
  if (pattern.empty()) return name.empty();
  pattern.remove_prefix(1);
  for (std::size_t i = 0; i <= name.size(); ++i)
    if (glob_match(pattern, name.substr(i))) return true;
  return false;
}

}  // namespace m2lm
