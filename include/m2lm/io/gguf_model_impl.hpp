// Definitions of io/gguf_model.hpp.
// Floor: io. May include: core, interop.
#pragma once

#include <m2lm/io/config_impl.hpp>
#include <m2lm/io/file_impl.hpp>
#include <m2lm/io/gguf_impl.hpp>
#include <m2lm/io/gguf_model.hpp>
#include <m2lm/io/image_processor_impl.hpp>

#include <algorithm>
#include <array>
#include <cstring>
#include <filesystem>
#include <functional>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace m2lm::inline M2LM_ABI {

namespace detail {

using GgufName = std::pair<std::string_view, std::string_view>;  // as stored, as transformers calls it

inline constexpr std::array<GgufName, 9> gguf_text_modules{{{"attn_norm", "input_layernorm"},
                                                            {"ffn_norm", "post_attention_layernorm"},
                                                            {"attn_q", "self_attn.q_proj"},
                                                            {"attn_k", "self_attn.k_proj"},
                                                            {"attn_v", "self_attn.v_proj"},
                                                            {"attn_output", "self_attn.o_proj"},
                                                            {"ffn_gate", "mlp.gate_proj"},
                                                            {"ffn_up", "mlp.up_proj"},
                                                            {"ffn_down", "mlp.down_proj"}}};
inline constexpr std::array<GgufName, 3> gguf_text_names{
    {{"token_embd.", "model.embed_tokens."}, {"output_norm.", "model.norm."}, {"output.", "lm_head."}}};
inline constexpr std::array<GgufName, 8> gguf_vision_modules{{{"ln1", "layer_norm1"},
                                                              {"ln2", "layer_norm2"},
                                                              {"attn_q", "self_attn.q_proj"},
                                                              {"attn_k", "self_attn.k_proj"},
                                                              {"attn_v", "self_attn.v_proj"},
                                                              {"attn_out", "self_attn.out_proj"},
                                                              {"ffn_up", "mlp.fc1"},
                                                              {"ffn_down", "mlp.fc2"}}};
inline constexpr std::array<GgufName, 7> gguf_vision_names{{{"v.class_embd", "vision_tower.vision_model.embeddings.class_embedding"},
                                                            {"v.patch_embd.", "vision_tower.vision_model.embeddings.patch_embedding."},
                                                            {"v.position_embd.", "vision_tower.vision_model.embeddings.position_embedding."},
                                                            {"v.pre_ln.", "vision_tower.vision_model.pre_layrnorm."},
                                                            {"v.post_ln.", "vision_tower.vision_model.post_layernorm."},
                                                            {"mm.0.", "multi_modal_projector.linear_1."},
                                                            {"mm.2.", "multi_modal_projector.linear_2."}}};

/// "PREFIXN.MODULE.REST" as "TARGETN.NAME.REST"; empty when it is no such name.
M2LM_IMPL std::string block_name(std::string_view name, std::string_view prefix, std::string_view target, std::span<const GgufName> modules) {
  if (!name.starts_with(prefix)) return {};
  const std::string_view rest = name.substr(prefix.size());
  const std::size_t number = rest.find('.');
  if (number == std::string_view::npos) return {};
  const std::size_t module_end = rest.find('.', number + 1);
  if (module_end == std::string_view::npos) return {};
  const std::string_view module = rest.substr(number + 1, module_end - number - 1);
  for (const auto& [stored, called] : modules)
    if (module == stored) return concat(target, rest.substr(0, number + 1), called, rest.substr(module_end));
  return {};
}

M2LM_IMPL std::string prefixed_name(std::string_view name, std::span<const GgufName> prefixes) {
  for (const auto& [stored, called] : prefixes)
    if (name.starts_with(stored)) return concat(called, name.substr(stored.size()));
  return std::string(name);
}

/// The *.gguf files of a directory: text models and companions.
M2LM_IMPL std::pair<std::vector<std::string>, std::vector<std::string>> gguf_files(const std::string& directory) {
  std::pair<std::vector<std::string>, std::vector<std::string>> out;
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator(directory.empty() ? "." : directory, error)) {
    const std::string name = entry.path().filename().string();
    if (name.ends_with(".gguf")) (name.find("mmproj") == std::string::npos ? out.first : out.second).push_back(name);
  }
  std::sort(out.first.begin(), out.first.end());
  std::sort(out.second.begin(), out.second.end());
  return out;
}

M2LM_IMPL std::string joined(std::span<const std::string> names) {
  std::string out;
  for (std::size_t i = 0; i < names.size() && i < 8; ++i) out += concat(i ? ", " : "", names[i]);
  return out + (names.size() > 8 ? ", …" : "");
}

/// A number that some files have once, others once per layer, all equal.
M2LM_IMPL std::int64_t one_for_all_layers(const ConfigValue& meta, std::string_view key) {
  if (!meta[key].is_array()) return meta.get<std::int64_t>(key);
  const auto values = meta.get_list<std::int64_t>(key);
  if (values.empty() || std::adjacent_find(values.begin(), values.end(), std::not_equal_to<>()) != values.end())
    meta[key].fail("must be the same for all layers");
  return values.front();
}

/// Ids are stored as u32 with all bits set where there is none.
M2LM_IMPL std::optional<std::int32_t> gguf_token(const ConfigValue& meta, std::string_view key) {
  if (!meta.has_value(key)) return std::nullopt;
  const auto id = meta.get<std::int64_t>(key);
  if (id < 0 || id == 0xffffffff) return std::nullopt;
  if (id > (1 << 24)) meta[key].fail(concat("the token id ", id, " is above ", 1 << 24));
  return static_cast<std::int32_t>(id);
}

/// Widths of the text model and of what the companion makes for it; 0 where it cannot be told.
M2LM_IMPL std::int64_t gguf_projected_width(const Gguf& vision) {
  return vision.contains("mm.2.weight") && vision.shape("mm.2.weight").rank() == 2 ? vision.shape("mm.2.weight")[0] : 0;
}

}  // namespace detail

M2LM_IMPL std::optional<GgufModel> GgufModel::find(std::string_view path, const GgufLimits& limits) {
  GgufModel out;
  const bool directory = directory_exists(path);
  std::string folder(path), text;
  if (directory) {
    for (const char* name : {"model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"})
      if (file_exists(join_path(path, name))) return std::nullopt;
  } else {
    if (!path.ends_with(".gguf")) return std::nullopt;
    const std::size_t slash = path.rfind('/');
    folder = slash == std::string_view::npos ? std::string() : std::string(path.substr(0, slash + 1));
    text = path;
  }
  const auto [texts, companions] = detail::gguf_files(folder);
  if (directory) {
    if (texts.empty() && companions.empty()) return std::nullopt;
    require<CheckpointError>(texts.size() == 1, path, ": holds ", texts.size(), " GGUF files that are no companion (", detail::joined(texts),
                             "); give the path of the one to load");
    require<CheckpointError>(companions.size() <= 1, path, ": holds ", companions.size(), " GGUF companions (", detail::joined(companions),
                             "); leave one of them in the directory");
    text = join_path(path, texts.front());
  }
  out.text = Gguf::open(text, limits);
  if (companions.size() != 1 || text == join_path(folder, companions.front())) return out;
  Gguf vision = Gguf::open(join_path(folder, companions.front()), limits);
  const auto width = out.text.metadata().get_or<std::int64_t>("llama.embedding_length", 0);
  const std::int64_t projected = detail::gguf_projected_width(vision);
  // Beside a file that was named itself, a companion may be of another model.
  if (!directory && width != projected) return out;
  require<CheckpointError>(width == projected, vision.path(), ": projects to a width of ", projected, ", ", text,
                           " has llama.embedding_length = ", width, ": the two are not of one model");
  out.vision = std::move(vision);
  return out;
}

M2LM_IMPL ConfigValue GgufModel::config() const {
  const ConfigValue& meta = text.metadata();
  const auto architecture = meta.get<std::string>("general.architecture");
  if (architecture != "llama")
    meta["general.architecture"].fail(concat("\"", architecture, "\" is not supported; llama is (LLaMA, Vicuna, Mistral)"));
  if (meta.get_or<std::int64_t>("split.count", 0) > 1)
    meta["split.count"].fail("a model in several GGUF files is not supported; join them with llama.cpp's llama-gguf-split --merge");
  if (meta.get_or<std::int64_t>("llama.expert_count", 0) > 0) meta["llama.expert_count"].fail("mixtures of experts are not supported");
  const std::int64_t heads = detail::one_for_all_layers(meta, "llama.attention.head_count");
  const auto width = meta.get<std::int64_t>("llama.embedding_length");
  if (heads < 1) meta["llama.attention.head_count"].fail(concat("must be at least 1, found ", heads));
  const auto head_dim = meta.get_or<std::int64_t>("llama.attention.key_length", width / heads);
  if (meta.get_or<std::int64_t>("llama.attention.value_length", head_dim) != head_dim)
    meta["llama.attention.value_length"].fail(concat("values of another width than keys, which have ", head_dim, ", are not supported"));
  if (meta.get_or<std::int64_t>("llama.rope.dimension_count", head_dim) != head_dim)
    meta["llama.rope.dimension_count"].fail(concat("rotating a part of the heads, which have ", head_dim, " values, is not supported"));
  const std::string table = "token_embd.weight";
  if (!text.contains(table) || text.shape(table).rank() != 2)
    throw CheckpointError(concat(text.path(), ": the tensor \"", table, "\" is missing or no matrix"));

  JsonWriter w;
  w.begin_object();
  if (vision) w.member("model_type", "llava").key("text_config").begin_object();
  const auto window = meta.get_or<std::int64_t>("llama.attention.sliding_window", 0);
  w.member("model_type", window > 0 ? "mistral" : "llama");
  if (window > 0) w.member("sliding_window", window);
  w.member("vocab_size", text.shape(table)[0]).member("hidden_size", width).member("head_dim", head_dim).member("num_attention_heads", heads);
  w.member("intermediate_size", detail::one_for_all_layers(meta, "llama.feed_forward_length"));
  w.member("num_hidden_layers", meta.get<std::int64_t>("llama.block_count"));
  w.member("num_key_value_heads",
           meta.has_value("llama.attention.head_count_kv") ? detail::one_for_all_layers(meta, "llama.attention.head_count_kv") : heads);
  w.member("max_position_embeddings", meta.get<std::int64_t>("llama.context_length"));
  w.member("rms_norm_eps", meta.get<double>("llama.attention.layer_norm_rms_epsilon"));
  w.member("tie_word_embeddings", !text.contains("output.weight"));
  w.member("attention_bias", text.contains("blk.0.attn_q.bias")).member("mlp_bias", text.contains("blk.0.ffn_gate.bias"));
  w.member("rope_theta", meta.get_or<double>("llama.rope.freq_base", 10000.0));
  const auto scaling = meta.get_or<std::string>("llama.rope.scaling.type", meta.has_value("llama.rope.scale_linear") ? "linear" : "none");
  if (scaling != "none" && scaling != "linear")
    meta["llama.rope.scaling.type"].fail(concat("\"", scaling, "\" is not supported; none and linear are, and the factors of rope_freqs.weight"));
  if (text.contains("rope_freqs.weight")) {
    if (scaling != "none") meta["llama.rope.scaling.type"].fail("both linear scaling and rope_freqs.weight are there");
    const AnyTensor factors = text.tensor("rope_freqs.weight");
    if (factors.shape() != Shape{head_dim / 2})
      throw CheckpointError(concat(text.path(), ": rope_freqs.weight is ", factors.shape().string(), ", expected ", Shape{head_dim / 2}.string()));
    // Made from LLaMA 3's rule, which cannot be had back from them; in transformers' terms they are the factors of longrope.
    w.key("rope_scaling").begin_object().member("rope_type", "longrope").member("attention_factor", 1.0);
    for (const char* key : {"short_factor", "long_factor"}) {
      w.key(key).begin_array();
      for (std::int64_t i = 0; i < factors.shape().elements(); ++i) w.value(factors.at(i));
      w.end_array();
    }
    w.end_object();
  } else if (scaling == "linear") {
    const char* key = meta.has_value("llama.rope.scaling.factor") ? "llama.rope.scaling.factor" : "llama.rope.scale_linear";
    w.key("rope_scaling").begin_object().member("rope_type", "linear").member("factor", meta.get<double>(key)).end_object();
  }
  if (vision) {
    w.end_object();
    const ConfigValue& see = vision->metadata();
    if (see.get<std::string>("general.architecture") != "clip") see["general.architecture"].fail("a companion must be \"clip\"");
    const char* kind = see.has_value("clip.vision.projector_type") ? "clip.vision.projector_type" : "clip.projector_type";
    const auto projector = see.get_or<std::string>(kind, "mlp");
    if (projector != "mlp") see[kind].fail(concat("the projector \"", projector, "\" is not supported; mlp is (LLaVA 1.5)"));
    w.key("vision_config").begin_object().member("model_type", "clip_vision_model");
    const auto copy = [&](std::string_view name, std::string_view key) { w.member(name, see.get<std::int64_t>(concat("clip.vision.", key))); };
    copy("hidden_size", "embedding_length");
    copy("intermediate_size", "feed_forward_length");
    copy("num_hidden_layers", "block_count");
    copy("num_attention_heads", "attention.head_count");
    copy("image_size", "image_size");
    copy("patch_size", "patch_size");
    if (see.get_or<std::int64_t>("clip.vision.projection_dim", 0) > 0) copy("projection_dim", "projection_dim");
    w.member("layer_norm_eps", see.get<double>("clip.vision.attention.layer_norm_epsilon"));
    w.member("hidden_act", see.get_or("clip.use_gelu", false) ? "gelu" : see.get_or("clip.use_silu", false) ? "silu" : "quick_gelu");
    w.end_object();
    // Older converters leave out the blocks behind the features; newer ones name the layer.
    std::int64_t layer = -1;
    if (see.has_value("clip.vision.feature_layer")) {
      const auto layers = see.get_list<std::int64_t>("clip.vision.feature_layer");
      if (layers.size() != 1)
        see["clip.vision.feature_layer"].fail(concat("features of ", layers.size(), " layers are not supported; of one they are"));
      layer = layers.front();
    }
    // llama.cpp puts features between pieces of text and needs no token for them; here one behind the vocabulary stands for the picture.
    const auto tokens = meta.has_value("tokenizer.ggml.tokens") ? meta.get_list<std::string>("tokenizer.ggml.tokens") : std::vector<std::string>{};
    w.member("image_token_index", std::find(tokens.begin(), tokens.end(), "<image>") - tokens.begin());
    w.member("vision_feature_layer", layer).member("vision_feature_select_strategy", "default");
    w.member("projector_hidden_act", "gelu").member("multimodal_projector_bias", vision->contains("mm.0.bias"));
  }
  w.end_object();
  return ConfigValue::parse_text(w.text(), concat(text.path(), " (as config.json)"));
}

M2LM_IMPL std::vector<GgufModel::Source> GgufModel::sources() const {
  const ConfigValue& meta = text.metadata();
  const std::int64_t heads = detail::one_for_all_layers(meta, "llama.attention.head_count");
  const std::int64_t kv_heads =
      meta.has_value("llama.attention.head_count_kv") ? detail::one_for_all_layers(meta, "llama.attention.head_count_kv") : heads;
  std::vector<Source> out;
  for (const std::string& name : text.names()) {
    if (name == "rope_freqs.weight") continue;  // part of the configuration
    std::string called = detail::block_name(name, "blk.", "model.layers.", detail::gguf_text_modules);
    if (called.empty()) called = detail::prefixed_name(name, detail::gguf_text_names);
    std::int64_t interleaved = 0;
    if (called.find(".self_attn.q_proj.") != std::string::npos) interleaved = heads;
    if (called.find(".self_attn.k_proj.") != std::string::npos) interleaved = M2LM_FAULT(45) ? heads : kv_heads;
    if (vision && called != name) called.insert(0, "language_model.");
    out.push_back({std::move(called), text, name, interleaved});
  }
  if (!vision) return out;
  // Older converters call fc1 ffn_down and fc2 ffn_up: then ffn_down takes what the block is wide, not what is between.
  const std::string probe = "v.blk.0.ffn_down.weight";
  const bool swapped = vision->contains(probe) && vision->shape(probe).rank() == 2 &&
                       vision->shape(probe)[1] == vision->metadata().get_or<std::int64_t>("clip.vision.embedding_length", 0);
  for (const std::string& name : vision->names()) {
    std::string stored = name;
    if (swapped) {
      const std::size_t up = stored.find(".ffn_up."), down = stored.find(".ffn_down.");
      if (up != std::string::npos) stored.replace(up, 8, ".ffn_down.");
      if (down != std::string::npos) stored.replace(down, 10, ".ffn_up.");
    }
    std::string called = detail::block_name(stored, "v.blk.", "vision_tower.vision_model.encoder.layers.", detail::gguf_vision_modules);
    if (called.empty()) called = detail::prefixed_name(stored, detail::gguf_vision_names);
    out.push_back({std::move(called), *vision, name, 0});
  }
  return out;
}

M2LM_IMPL AnyTensor GgufModel::read(const Source& source) {
  AnyTensor stored = source.file.tensor(source.stored);
  const Shape& shape = stored.shape();
  if (source.heads == 0 || stored.bytes() == 0 || shape.rank() == 0) return stored;  // rows without columns may be any number
  const std::int64_t rows = shape[0];
  require<CheckpointError>(source.heads > 0 && rows % source.heads == 0 && rows / source.heads % 2 == 0, source.file.path(), ": tensor \"",
                           source.stored, "\" has ", rows, " rows, which ", source.heads, " heads do not share in halves");
  const std::size_t row_bytes = stored.bytes() / static_cast<std::size_t>(rows);
  const std::int64_t half = rows / source.heads / 2;
  auto bytes = std::make_shared<Tensor<std::uint8_t>>(Shape{static_cast<std::int64_t>(stored.bytes())});
  for (std::int64_t row = 0; row < rows; ++row) {  // of the result: head, half, place
    const std::int64_t head = row / (2 * half), within = row % (2 * half);
    const std::int64_t from = head * 2 * half + within % half * 2 + within / half;
    std::memcpy(bytes->data() + static_cast<std::size_t>(row) * row_bytes, stored.data() + static_cast<std::size_t>(from) * row_bytes, row_bytes);
  }
  const auto* data = reinterpret_cast<const std::byte*>(bytes->data());
  return AnyTensor(stored.dtype(), shape, data, std::move(bytes));
}

M2LM_IMPL std::size_t GgufModel::unpacked_bytes() const {
  std::size_t sum = 0;
  for (const Source& source : sources()) {
    const GgufFormat* format = source.file.format(source.stored);
    if (format != nullptr && (!format->in_place() || source.heads != 0))
      sum += dtype_bytes(format->dtype, source.file.shape(source.stored).elements());
  }
  return sum;
}

M2LM_IMPL std::string GgufModel::chat_template() const { return text.metadata().get_or("tokenizer.chat_template", ""); }

M2LM_IMPL std::vector<std::int32_t> GgufModel::stop_tokens() const {
  const ConfigValue& meta = text.metadata();
  std::vector<std::int32_t> out;
  const auto add = [&](std::optional<std::int32_t> id) {
    if (id && std::find(out.begin(), out.end(), *id) == out.end()) out.push_back(*id);
  };
  for (const char* key : {"tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"})
    add(detail::gguf_token(meta, key));
  // Files that say only what ends a text: the vocabulary has what ends a turn. Only a control token counts, not text that looks like one.
  if (!meta.has_value("tokenizer.ggml.tokens") || !meta.has_value("tokenizer.ggml.token_type")) return out;
  const ConfigValue tokens = meta["tokenizer.ggml.tokens"], types = meta["tokenizer.ggml.token_type"];
  constexpr std::int64_t control = 3;
  for (std::size_t i = 0; i < std::min(tokens.size(), types.size()); ++i) {
    if (types.at(i).as<std::int64_t>() != control) continue;
    const auto token = tokens.at(i).as<std::string>();
    for (const char* known : {"<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end_of_text|>", "<|endoftext|>"})
      if (token == known) add(static_cast<std::int32_t>(i));
  }
  return out;
}

M2LM_IMPL ImageProcessorConfig GgufModel::image_processor() const {
  const ConfigValue& see = vision->metadata();
  ImageProcessorConfig out = clip_image_processor(detail::processor_size(see["clip.vision.image_size"]));
  out.mean = detail::processor_channels(see, "clip.vision.image_mean", out.mean, false);
  out.std = detail::processor_channels(see, "clip.vision.image_std", out.std, true);
  return out;
}

}  // namespace m2lm
