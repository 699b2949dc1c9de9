// Random checkpoints in the Hugging Face layout, as small as one likes: for tests of programs that load a model.
// Floor: testing. May include: config, core, ops, backends, layers, parts, io, sampling, models, train.
#pragma once

#include <m2lm/core/rng.hpp>
#include <m2lm/io/config.hpp>
#include <m2lm/io/file.hpp>
#include <m2lm/io/safetensors.hpp>
#include <m2lm/parts/decoders/llama.hpp>
#include <m2lm/parts/encoders/clip_vit.hpp>
#include <m2lm/parts/projectors/mlp_projector.hpp>

#include <cmath>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace m2lm::inline M2LM_ABI::testing {

/// A decoder that is quick to run and has different numbers everywhere: 4 heads share 2 key-value heads.
inline LlamaConfig small_llama() {
  LlamaConfig c;
  c.vocab_size = 96;
  c.hidden_size = 32;
  c.intermediate_size = 48;
  c.num_layers = 2;
  c.num_heads = 4;
  c.num_kv_heads = 2;
  c.head_dim = 8;
  c.max_position_embeddings = 256;
  return c;
}

/// An encoder of four patches.
inline ClipVisionConfig small_clip() {
  ClipVisionConfig c;
  c.hidden_size = 24;
  c.intermediate_size = 40;
  c.num_layers = 3;
  c.num_heads = 3;
  c.image_size = 28;
  c.patch_size = 14;
  c.projection_dim = 16;
  return c;
}

namespace detail {

/// A backend of parts that are only listed, never run.
struct Unused {
  using Scalar = float;
};

/// Value of all elements of a parameter: 1 + noise for norms, noise for the rest, scaled so that activations keep their size.
inline Tensor<float> random_parameter(std::string_view name, const Shape& shape, Rng& rng) {
  Tensor<float> values(shape);
  const bool norm = shape.rank() == 1 && name.find("norm") != std::string_view::npos && name.ends_with("weight");
  const std::int64_t inputs = shape.rank() < 2 ? 1 : shape.elements() / shape[0];
  const bool table = name.find("embed") != std::string_view::npos;
  const double scale = shape.rank() < 2 ? 0.1 : (table ? 0.7 : 1.7 / std::sqrt(static_cast<double>(inputs)));
  // A uniform number of variance 1.
  for (float& x : values.span()) x = static_cast<float>((norm ? 1.0 : 0.0) + scale * std::sqrt(12.0) * (rng.uniform() - 0.5));
  return values;
}

/// Random tensors for every parameter below `root`, stored as `dtype` (f32 or bf16).
template <class P>
void append_random(std::vector<NamedTensor>& out, const P& root, std::string prefix, Rng& rng, DType dtype) {
  for_each_parameter(
      [&](std::string_view name, const Parameter& p) {
        Tensor<float> values = random_parameter(name, p.shape, rng);
        if (dtype == DType::f32) {
          out.push_back({std::string(name), AnyTensor(std::move(values))});
          return;
        }
        Tensor<Bf16> rounded(p.shape);
        for (std::int64_t i = 0; i < rounded.elements(); ++i) rounded.data()[i] = to_bf16(values.data()[i]);
        out.push_back({std::string(name), AnyTensor(std::move(rounded))});
      },
      root, std::move(prefix));
}

inline void write_llama_keys(JsonWriter& json, const LlamaConfig& c) {
  json.member("model_type", c.sliding_window > 0 ? "mistral" : "llama").member("vocab_size", c.vocab_size).member("hidden_size", c.hidden_size);
  json.member("intermediate_size", c.intermediate_size).member("num_hidden_layers", c.num_layers).member("num_attention_heads", c.num_heads);
  json.member("num_key_value_heads", c.num_kv_heads).member("head_dim", c.head_dim).member("rms_norm_eps", c.rms_norm_eps);
  json.member("max_position_embeddings", c.max_position_embeddings).member("tie_word_embeddings", c.tie_word_embeddings);
  json.member("attention_bias", c.attention_bias).member("mlp_bias", c.mlp_bias).member("hidden_act", "silu").member("eos_token_id", 2);
  if (c.sliding_window > 0) json.member("sliding_window", c.sliding_window);
  json.key("rope_parameters").begin_object().member("rope_theta", c.rope.theta);
  if (c.rope.scaling == RopeScaling::none) json.member("rope_type", "default");
  if (c.rope.scaling != RopeScaling::none) json.member("factor", c.rope.factor);
  if (c.rope.scaling == RopeScaling::linear) json.member("rope_type", "linear");
  if (c.rope.scaling == RopeScaling::llama3) {
    json.member("rope_type", "llama3").member("low_freq_factor", c.rope.low_freq_factor).member("high_freq_factor", c.rope.high_freq_factor);
    json.member("original_max_position_embeddings", c.rope.original_max_position_embeddings);
  }
  json.end_object();
}

inline void write_clip_keys(JsonWriter& json, const ClipVisionConfig& c) {
  json.member("model_type", "clip_vision_model").member("hidden_size", c.hidden_size).member("intermediate_size", c.intermediate_size);
  json.member("num_hidden_layers", c.num_layers).member("num_attention_heads", c.num_heads).member("image_size", c.image_size);
  json.member("patch_size", c.patch_size).member("projection_dim", c.projection_dim).member("layer_norm_eps", c.layer_norm_eps);
  json.member("hidden_act", "quick_gelu");
}

}  // namespace detail

/// Writes config.json and model.safetensors of a LlamaForCausalLM (with a sliding_window: MistralForCausalLM) into an existing
/// directory. There is no tokenizer: use token ids. The same seed writes the same bytes. requires dtype f32 or bf16.
inline void write_synthetic_llama(std::string_view directory, const LlamaConfig& config = small_llama(), std::uint64_t seed = 1, DType dtype = DType::f32) {
  Rng rng(seed);
  std::vector<NamedTensor> tensors;
  detail::append_random(tensors, LlamaDecoder<>::On<detail::Unused, Precision{}>(config), "", rng, dtype);
  write_safetensors(join_path(directory, "model.safetensors"), tensors);
  JsonWriter json;
  json.begin_object().key("architectures").begin_array().value(config.sliding_window > 0 ? "MistralForCausalLM" : "LlamaForCausalLM").end_array();
  detail::write_llama_keys(json, config);
  write_file(join_path(directory, "config.json"), json.end_object().text());
}

/// The same for a LlavaForConditionalGeneration; the last id of the vocabulary is the image placeholder, and the projector has
/// two layers. vision.feature_layer and vision.features (patches or all_tokens) become the checkpoint's choice.
inline void write_synthetic_llava(std::string_view directory, const LlamaConfig& text = small_llama(), const ClipVisionConfig& vision = small_clip(),
                                  std::uint64_t seed = 1, DType dtype = DType::f32) {
  Rng rng(seed);
  std::vector<NamedTensor> tensors;
  detail::append_random(tensors, LlamaDecoder<>::On<detail::Unused, Precision{}>(text), "", rng, dtype);
  detail::append_random(tensors, ClipVit<>::On<detail::Unused, Precision{}>(vision), "vision_tower", rng, dtype);
  const ProjectorConfig projector{.input_width = vision.hidden_size, .output_width = text.hidden_size};
  detail::append_random(tensors, MlpProjector<2>::On<detail::Unused, Precision{}>(projector), "multi_modal_projector", rng, dtype);
  for (NamedTensor& t : tensors)
    if (t.name.starts_with("model.") || t.name.starts_with("lm_head.")) t.name = "language_model." + t.name;
  write_safetensors(join_path(directory, "model.safetensors"), tensors);
  JsonWriter json;
  json.begin_object().key("architectures").begin_array().value("LlavaForConditionalGeneration").end_array().member("model_type", "llava");
  json.member("image_token_index", text.vocab_size - 1).member("projector_hidden_act", "gelu").member("vision_feature_layer", vision.feature_layer);
  json.member("vision_feature_select_strategy", vision.features == VitFeatures::all_tokens ? "full" : "default");
  json.member("tie_word_embeddings", text.tie_word_embeddings).key("text_config").begin_object();
  detail::write_llama_keys(json, text);
  json.end_object().key("vision_config").begin_object();
  detail::write_clip_keys(json, vision);
  json.end_object();
  write_file(join_path(directory, "config.json"), json.end_object().text());
}

/// The same for a CLIPVisionModelWithProjection: all layers, the norm behind them and the projection.
inline void write_synthetic_clip(std::string_view directory, const ClipVisionConfig& config = small_clip(), std::uint64_t seed = 1, DType dtype = DType::f32) {
  Rng rng(seed);
  std::vector<NamedTensor> tensors;
  using Encoder = ClipVit<VitPolicy{.feature_layer = -1, .features = VitFeatures::projected}>;
  detail::append_random(tensors, Encoder::On<detail::Unused, Precision{}>(config), "", rng, dtype);
  write_safetensors(join_path(directory, "model.safetensors"), tensors);
  JsonWriter json;
  json.begin_object().key("architectures").begin_array().value("CLIPVisionModelWithProjection").end_array();
  detail::write_clip_keys(json, config);
  write_file(join_path(directory, "config.json"), json.end_object().text());
}

}  // namespace m2lm::testing
