// Definitions of models/hf_config.hpp.
// Floor: models. May include: core, ops, layers, parts, io, sampling.
#pragma once

#include <m2lm/io/file.hpp>
#include <m2lm/models/hf_config.hpp>

namespace m2lm::inline M2LM_ABI {

namespace detail {

/// A size: at least 1 and at most `most`. Products of three sizes do not overflow; a fourth factor (a patch's side or its channels)
/// is bounded more closely.
inline std::int64_t read_size(const ConfigValue& v, std::string_view key, std::int64_t fallback, std::int64_t most = std::int64_t{1} << 20) {
  const std::int64_t n = v.get_or<std::int64_t>(key, fallback);
  if (n < 1 || n > most) v.fail(concat(key, " = ", n, " is outside 1 to ", most));
  return n;
}

// Layers become objects before any tensor is looked at; ten times more than any model has.
inline constexpr std::int64_t most_layers = 4096;

inline double read_positive(const ConfigValue& v, std::string_view key, double fallback) {
  const double x = v.get_or<double>(key, fallback);
  if (!(x > 0)) v.fail(concat(key, " = ", x, " is not above 0"));
  return x;
}

inline void read_rope(const ConfigValue& text, RopeConfig& rope) {
  const bool newer = text.has_value("rope_parameters");
  const ConfigValue scaling = newer ? text["rope_parameters"] : (text.has_value("rope_scaling") ? text["rope_scaling"] : ConfigValue{});
  rope.theta = read_positive(text, "rope_theta", 10000.0);
  if (scaling.is_null()) return;
  if (newer) rope.theta = read_positive(scaling, "rope_theta", rope.theta);
  const std::string type = scaling.get_or<std::string>("rope_type", scaling.get_or<std::string>("type", "default"));
  if (type == "default") return;
  if (type == "longrope") {  // what the rope_freqs of a GGUF file are for transformers
    rope.scaling = RopeScaling::factors;
    rope.factors = scaling.get_list<double>("short_factor");
    for (const double factor : rope.factors)
      if (!(factor > 0)) scaling.fail(concat("short_factor: ", factor, " is not above 0"));
    if (scaling.get_list<double>("long_factor") != rope.factors || scaling.get_or<double>("attention_factor", 0.0) != 1.0)
      scaling.fail("longrope is supported with equal short_factor and long_factor and an attention_factor of 1 only");
    return;
  }
  if (type != "linear" && type != "llama3") scaling.fail(concat("rope_type \"", type, "\" is not supported; default, linear, llama3 and longrope are"));
  rope.factor = read_positive(scaling, "factor", 1.0);
  if (type == "linear") {
    rope.scaling = RopeScaling::linear;
    return;
  }
  rope.scaling = RopeScaling::llama3;
  rope.low_freq_factor = read_positive(scaling, "low_freq_factor", 1.0);
  rope.high_freq_factor = read_positive(scaling, "high_freq_factor", 4.0);
  if (!(rope.high_freq_factor > rope.low_freq_factor))
    scaling.fail(concat("high_freq_factor = ", rope.high_freq_factor, " is not above low_freq_factor = ", rope.low_freq_factor));
  rope.original_max_position_embeddings =
      read_positive(scaling, "original_max_position_embeddings", static_cast<double>(text.get_or<std::int64_t>("max_position_embeddings", 2048)));
}

inline std::vector<std::int32_t> read_ids(const ConfigValue& v, std::string_view key) {
  if (!v.has_value(key)) return {};
  if (v[key].is_array()) return v.get_list<std::int32_t>(key);
  return {v.get<std::int32_t>(key)};
}

}  // namespace detail

M2LM_IMPL Activation read_activation(const ConfigValue& where, std::string_view name) {
  if (name == "silu" || name == "swish") return Activation::silu;
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_pytorch_tanh" || name == "gelu_new") return Activation::gelu_tanh;
  if (name == "quick_gelu") return Activation::quick_gelu;
  if (name == "relu") return Activation::relu;
  where.fail(concat("activation \"", name, "\" is not supported; silu, gelu, gelu_new, gelu_pytorch_tanh, quick_gelu and relu are"));
}

M2LM_IMPL void read_config(const ConfigValue& root, LlamaConfig& config) {
  const ConfigValue text = root.has_value("text_config") ? root["text_config"] : root;
  const std::string type = text.get_or<std::string>("model_type", "llama");
  if (type != "llama" && type != "mistral") text.fail(concat("model_type \"", type, "\" is not supported by LlamaDecoder; llama and mistral are"));
  const bool mistral = type == "mistral";
  config.vocab_size = detail::read_size(text, "vocab_size", 32000);
  config.hidden_size = detail::read_size(text, "hidden_size", 4096);
  config.intermediate_size = detail::read_size(text, "intermediate_size", mistral ? 14336 : 11008);
  config.num_layers = detail::read_size(text, "num_hidden_layers", 32, detail::most_layers);
  config.num_heads = detail::read_size(text, "num_attention_heads", 32);
  config.num_kv_heads = detail::read_size(text, "num_key_value_heads", mistral ? 8 : config.num_heads);
  if (!text.has_value("head_dim") && config.hidden_size % config.num_heads != 0)
    text.fail(concat("hidden_size ", config.hidden_size, " is not a multiple of ", config.num_heads, " attention heads, and there is no head_dim"));
  config.head_dim = detail::read_size(text, "head_dim", config.hidden_size / config.num_heads);
  config.max_position_embeddings = detail::read_size(text, "max_position_embeddings", mistral ? 131072 : 2048, std::int64_t{1} << 30);
  // A Mistral config that does not mention the window has 4096; null switches it off.
  config.sliding_window = mistral ? (text.contains("sliding_window") ? text.get_or<std::int64_t>("sliding_window", 0) : 4096) : 0;
  if (config.sliding_window < 0) text.fail(concat("sliding_window = ", config.sliding_window, " is below 0"));
  config.rms_norm_eps = detail::read_positive(text, "rms_norm_eps", 1e-6);
  config.activation = read_activation(text, text.get_or<std::string>("hidden_act", "silu"));
  config.tie_word_embeddings = text.get_or<bool>("tie_word_embeddings", root.get_or<bool>("tie_word_embeddings", false));
  config.attention_bias = text.get_or<bool>("attention_bias", false);
  config.mlp_bias = text.get_or<bool>("mlp_bias", false);
  detail::read_rope(text, config.rope);
  if (config.num_heads % config.num_kv_heads != 0)
    text.fail(concat(config.num_heads, " attention heads do not share ", config.num_kv_heads, " key-value heads evenly"));
  if (config.head_dim % 2 != 0) text.fail(concat("head_dim = ", config.head_dim, " is odd; rotary embedding needs pairs"));
  if (config.rope.scaling == RopeScaling::factors && static_cast<std::int64_t>(config.rope.factors.size()) != config.head_dim / 2)
    text.fail(concat("rope_scaling has ", config.rope.factors.size(), " factors, head_dim = ", config.head_dim, " needs one for each pair"));
}

M2LM_IMPL void read_config(const ConfigValue& root, ClipVisionConfig& config) {
  const bool nested = root.has_value("vision_config");
  const ConfigValue vision = nested ? root["vision_config"] : root;
  const std::string type = vision.get_or<std::string>("model_type", "clip_vision_model");
  if (type != "clip_vision_model") vision.fail(concat("model_type \"", type, "\" is not supported by ClipVit; clip_vision_model is"));
  // transformers' defaults of CLIPVisionConfig, and those a LLaVA config without a vision_config stands for (L/14-336).
  const bool llava = !nested && root.get_or<std::string>("model_type", "") == "llava";
  config.hidden_size = detail::read_size(vision, "hidden_size", llava ? 1024 : 768);
  config.intermediate_size = detail::read_size(vision, "intermediate_size", llava ? 4096 : 3072);
  config.num_layers = detail::read_size(vision, "num_hidden_layers", llava ? 24 : 12, detail::most_layers);
  config.num_heads = detail::read_size(vision, "num_attention_heads", llava ? 16 : 12);
  config.image_size = detail::read_size(vision, "image_size", llava ? 336 : 224);
  config.patch_size = detail::read_size(vision, "patch_size", llava ? 14 : 32, 1024);
  config.num_channels = detail::read_size(vision, "num_channels", 3, 64);
  config.projection_dim = detail::read_size(vision, "projection_dim", llava ? 768 : 512);
  config.layer_norm_eps = detail::read_positive(vision, "layer_norm_eps", 1e-5);
  config.activation = read_activation(vision, vision.get_or<std::string>("hidden_act", "quick_gelu"));
  if (config.hidden_size % config.num_heads != 0)
    vision.fail(concat("hidden_size ", config.hidden_size, " is not a multiple of ", config.num_heads, " attention heads"));
  config.feature_layer = root.get_or<int>("vision_feature_layer", -2);
  const std::string strategy = root.get_or<std::string>("vision_feature_select_strategy", "default");
  if (strategy != "default" && strategy != "full")
    root.fail(concat("vision_feature_select_strategy \"", strategy, "\" is not supported; default and full are"));
  config.features = strategy == "full" ? VitFeatures::all_tokens : VitFeatures::patches;
}

M2LM_IMPL void read_config(const ConfigValue& root, ProjectorConfig& config) {
  config.activation = read_activation(root, root.get_or<std::string>("projector_hidden_act", "gelu"));
  config.bias = root.get_or<bool>("multimodal_projector_bias", true);
  // LLaVA's own layout: identity, linear, mlp2x_gelu, mlp3x_gelu, …
  if (!root.has_value("mm_projector_type")) return;
  const std::string type = root.get<std::string>("mm_projector_type");
  if (type == "identity")
    config.layers = 0;
  else if (type == "linear")
    config.layers = 1;
  else if (type.size() == 10 && type.starts_with("mlp") && type[3] >= '1' && type[3] <= '9' && type.ends_with("x_gelu"))
    config.layers = type[3] - '0';
  else
    root.fail(concat("mm_projector_type \"", type, "\" is not supported; identity, linear and mlpNx_gelu (N from 1 to 9) are"));
}

M2LM_IMPL std::vector<std::int32_t> read_stop_tokens(std::string_view directory, const ConfigValue& root) {
  const std::string path = join_path(directory, "generation_config.json");
  if (file_exists(path)) {
    std::vector<std::int32_t> ids = detail::read_ids(ConfigValue::parse_file(path), "eos_token_id");
    if (!ids.empty()) return ids;
  }
  std::vector<std::int32_t> ids = detail::read_ids(root, "eos_token_id");
  if (ids.empty() && root.has_value("text_config")) ids = detail::read_ids(root["text_config"], "eos_token_id");
  return ids;
}

}  // namespace m2lm
