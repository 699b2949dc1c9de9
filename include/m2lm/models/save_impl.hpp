// Definitions of models/save.hpp.
// Floor: models. May include: core, ops, layers, parts, io, sampling.
#pragma once

#include <m2lm/core/rng.hpp>
#include <m2lm/io/config_impl.hpp>
#include <m2lm/io/directory.hpp>
#include <m2lm/io/safetensors.hpp>
#include <m2lm/models/save.hpp>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <map>
#include <numbers>
#include <set>

namespace m2lm::inline M2LM_ABI::detail {

namespace saving {

/// Files of a Hugging Face directory that say how text and pictures become tensors, or how to generate.
inline constexpr std::string_view companions[] = {"tokenizer.model",         "tokenizer.json",   "tokenizer_config.json", "added_tokens.json",
                                                  "special_tokens_map.json", "vocab.json",       "merges.txt",            "preprocessor_config.json",
                                                  "processor_config.json",   "chat_template.jinja", "chat_template.json", "generation_config.json"};

/// Whether a file of the old directory is one that a saved model brings anew, or would contradict.
inline bool belongs_to_checkpoint(std::string_view name) {
  if (name == "config.json" || name.ends_with(".safetensors") || name.ends_with(".safetensors.index.json")) return true;
  if (glob_match("pytorch_model*", name)) return true;
  return std::find(std::begin(companions), std::end(companions), name) != std::end(companions);
}

inline AnyTensor converted(const AnyTensor& tensor, DType dtype) {
  const auto as = [&]<class T>(T) {
    Tensor<T> out(tensor.shape());
    for (std::int64_t i = 0; i < out.elements(); ++i) {
      const auto x = static_cast<float>(tensor.at(i));
      if constexpr (std::is_same_v<T, Bf16>)
        out.data()[i] = to_bf16(x);
      else if constexpr (std::is_same_v<T, Half>)
        out.data()[i] = to_half(x);
      else
        out.data()[i] = x;
    }
    return AnyTensor(std::move(out));
  };
  if (dtype == DType::inherit && is_block_format(tensor.dtype())) return as(float{});  // safetensors has no blocks
  if (dtype == DType::inherit || dtype == tensor.dtype() || !is_floating(tensor.dtype())) return tensor;
  return dtype == DType::bf16 ? as(Bf16{}) : dtype == DType::f16 ? as(Half{}) : as(float{});
}

/// "float32" for the widest floating dtype of the tensors: what transformers reads the directory in.
inline std::string_view torch_dtype(std::span<const NamedTensor> tensors) {
  bool half = false, bf16 = false, wide = false, wider = false;
  for (const NamedTensor& t : tensors) {
    half = half || t.tensor.dtype() == DType::f16;
    bf16 = bf16 || t.tensor.dtype() == DType::bf16;
    wide = wide || t.tensor.dtype() == DType::f32 || is_block_format(t.tensor.dtype());
    wider = wider || t.tensor.dtype() == DType::f64;
  }
  if (wider) return "float64";
  if (wide || (half && bf16)) return "float32";  // the two 16-bit formats together fit in f32 only
  return bf16 ? "bfloat16" : "float16";
}

/// config.json with the dtype of what is written beside it.
inline std::string config_text(const ConfigValue& config, std::string_view dtype) {
  OwnedJson document;
  const std::string problem = try_parse_json(config.text(), false, {}, document);
  require<CheckpointError>(problem.empty() && document.root.is_object(), config.file(), ": is no configuration that can be written: ", problem);
  Json& json = document.root;
  const std::string name(dtype);
  json[json.contains("torch_dtype") ? "torch_dtype" : "dtype"] = name;
  for (const char* part : {"text_config", "vision_config"})
    for (const char* key : {"dtype", "torch_dtype"})
      if (json.contains(part) && json[part].is_object() && json[part].contains(key)) json[part][key] = name;
  return json.dump(2) + "\n";
}

/// A canonical name as the checkpoints of llava-hf have it: a decoder beside other components stands below language_model.
inline std::string hugging_face_name(const std::string& canonical, bool nested) {
  const bool decoder = canonical.starts_with("model.") || canonical.starts_with("lm_head.");
  return nested && decoder ? "language_model." + canonical : canonical;
}

/// The names under which the tensors of a checkpoint are written: their own; in LLaVA's own layout those of transformers, as its
/// configuration is written in transformers' words too.
class Names {
  bool translate_ = false;
  std::map<std::string, std::string> bound_;                          // stored -> written
  std::vector<std::pair<std::string, std::string>> prefixes_;          // of stored and canonical names whose ends agree

 public:
  Names(std::span<const NamedParameter> parameters, std::span<const std::string> stored, bool nested) {
    for (std::size_t i = 0; i < stored.size(); ++i) {
      const std::string &from = stored[i], &to = parameters[i].name;
      translate_ = translate_ || from.starts_with("model.mm_projector.");
      bound_.emplace(from, hugging_face_name(to, nested));
      std::size_t same = 0;
      while (same < from.size() && same < to.size() && from[from.size() - 1 - same] == to[to.size() - 1 - same]) ++same;
      if (same < from.size()) prefixes_.emplace_back(from.substr(0, from.size() - same), to.substr(0, to.size() - same));
    }
  }
  std::string operator()(const std::string& stored) const {
    if (!translate_) return stored;
    if (const auto found = bound_.find(stored); found != bound_.end()) return found->second;
    for (const auto& [from, to] : prefixes_)
      if (stored.starts_with(from)) return to + stored.substr(from.size());
    return stored;
  }
};

inline std::string shard_name(std::size_t i, std::size_t of) {
  char text[64];
  std::snprintf(text, sizeof(text), "model-%05zu-of-%05zu.safetensors", i + 1, of);
  return text;
}

}  // namespace saving

M2LM_IMPL void save_model(std::string_view directory, const SaveSource& source, const SaveOptions& options) {
  const DType dtype = options.dtype;
  require<OptionError>(dtype == DType::inherit || dtype == DType::f32 || dtype == DType::f16 || dtype == DType::bf16, "m2lm::Model::save_pretrained: dtype ",
                       dtype_name(dtype), " is not one of f32, f16, bf16, or inherit");
  require<OptionError>(options.max_shard_bytes > 0, "m2lm::Model::save_pretrained: max_shard_bytes = 0");

  for (const NamedParameter& p : source.parameters)
    require<OptionError>(!p.parameter->update, "m2lm::Model::save_pretrained: ", p.name, " has an adapter beside it, which is not saved; load the adapter merged");
  // Every tensor of the checkpoint under its own name: the model's parameters as they are now, the others as they were (encoder blocks
  // behind the chosen layer). So the directory is as complete as the one that was loaded.
  std::vector<std::string> stored;
  std::vector<Parameter> scratch;
  scratch.reserve(source.parameters.size());
  std::vector<NamedParameter> binding;
  for (const NamedParameter& p : source.parameters) {
    scratch.emplace_back(p.parameter->shape);
    binding.push_back({p.name, &scratch.back()});
  }
  require_complete(bind_parameters(binding, source.checkpoint, hugging_face_names, &stored), source.checkpoint.directory());
  const saving::Names written_name(source.parameters, stored, source.config.has_value("text_config"));
  std::map<std::string_view, const Parameter*> current;
  for (std::size_t i = 0; i < stored.size(); ++i) current.emplace(stored[i], source.parameters[i].parameter);
  const bool own_head = std::any_of(source.parameters.begin(), source.parameters.end(), [](const NamedParameter& p) { return p.name == "lm_head.weight"; });
  std::vector<NamedTensor> tensors;
  for (const std::string& name : source.checkpoint.names()) {
    const auto found = current.find(name);
    // A copy of a tied head would be the table of before the training.
    if (found == current.end() && !own_head && name.ends_with("lm_head.weight")) continue;
    tensors.push_back({written_name(name), found == current.end() ? *source.checkpoint.find(name) : found->second->value});
  }
  const auto bytes_of = [&](const NamedTensor& t) {
    const DType as = dtype == DType::inherit && is_block_format(t.tensor.dtype()) ? DType::f32 : dtype;
    return as == DType::inherit ? t.tensor.bytes() : dtype_bytes(as, t.tensor.shape().elements());
  };
  std::vector<std::size_t> shard_of(tensors.size());
  std::size_t shards = 1, in_shard = 0, total = 0;
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const std::size_t bytes = bytes_of(tensors[i]);
    if (in_shard > 0 && in_shard + bytes > options.max_shard_bytes) {
      ++shards;
      in_shard = 0;
    }
    in_shard += bytes;
    total += bytes;
    shard_of[i] = shards - 1;
  }

  DirectoryWriter writer(directory);
  const std::map<std::string, std::string> metadata{{"format", "pt"}};
  JsonWriter index;
  index.begin_object().key("metadata").begin_object().member("total_size", total).end_object().key("weight_map").begin_object();
  std::vector<NamedTensor> written;  // with the data of one shard at a time
  std::string_view dtype_written;
  if (dtype == DType::inherit)
    dtype_written = saving::torch_dtype(tensors);
  else
    dtype_written = dtype == DType::f32 ? "float32" : dtype == DType::f16 ? "float16" : "bfloat16";
  for (std::size_t shard = 0; shard < shards; ++shard) {
    const std::string file = shards == 1 ? std::string("model.safetensors") : saving::shard_name(shard, shards);
    written.clear();
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      if (shard_of[i] != shard) continue;
      written.push_back({tensors[i].name, saving::converted(tensors[i].tensor, dtype)});
      index.member(tensors[i].name, file);
    }
    write_safetensors(writer / file, written, metadata);
  }
  if (shards > 1) {
    index.end_object().end_object();
    write_file(writer / "model.safetensors.index.json", index.text() + "\n");
  }
  write_file(writer / "config.json", saving::config_text(source.config, dtype_written));
  for (const std::string_view name : saving::companions) {
    const std::string from = join_path(source.directory, name);
    if (!source.directory.empty() && file_exists(from)) write_file(writer / name, read_file(from));
  }
  // LLaVA's own layout says in config.json how pictures are prepared.
  if (const std::string pictures = writer / "preprocessor_config.json"; source.config.has_value("image_processor_config") && !file_exists(pictures))
    write_file(pictures, source.config["image_processor_config"].text() + "\n");
  writer.commit(saving::belongs_to_checkpoint);
}

namespace initial {

/// How the elements of one parameter begin.
struct Rule {
  double mean = 0, deviation = 0;
};

/// source: transformers' _init_weights of LlamaPreTrainedModel, LlavaPreTrainedModel and CLIPPreTrainedModel.
inline Rule rule_of(std::string_view name, const Shape& shape, const ConfigValue& config) {
  const auto number = [&](const char* part, const char* key, double fallback) {
    const ConfigValue c = config.has_value(part) ? config[part] : config;
    return c.get_or<double>(key, fallback);
  };
  const bool norm = name.find("norm") != std::string_view::npos;
  if (norm) return {name.ends_with("weight") ? 1.0 : 0.0, 0.0};
  if (name.ends_with("bias")) return {};
  if (name.starts_with("vision_tower.")) {
    const double factor = number("vision_config", "initializer_factor", 1.0), range = number("vision_config", "initializer_range", 0.02);
    const double width = number("vision_config", "hidden_size", 768), layers = number("vision_config", "num_hidden_layers", 12);
    const double deep = 1.0 / std::sqrt(width * 2.0 * layers);
    if (name.ends_with("class_embedding")) return {0, factor / std::sqrt(width)};
    if (name.ends_with("patch_embedding.weight") || name.ends_with("position_embedding.weight")) return {0, factor * range};
    if (name.ends_with("out_proj.weight")) return {0, factor / std::sqrt(width)};
    if (name.ends_with("q_proj.weight") || name.ends_with("k_proj.weight") || name.ends_with("v_proj.weight")) return {0, factor * deep};
    if (name.ends_with("fc1.weight")) return {0, factor / std::sqrt(2.0 * width)};
    if (name.ends_with("fc2.weight")) return {0, factor * deep};
    if (name.ends_with("visual_projection.weight")) return {0, factor / std::sqrt(width)};
  }
  return {0, shape.rank() < 2 ? 0.0 : number("text_config", "initializer_range", 0.02)};
}

/// Two normal numbers from four uniform ones would need a spare to be kept: one of the two is enough here. source: Box & Muller 1958.
inline double normal(Rng& rng) {
  const double u = 1.0 - rng.uniform();  // in (0, 1]
  return std::sqrt(-2.0 * std::log(u)) * std::cos(2.0 * std::numbers::pi * rng.uniform());
}

}  // namespace initial

M2LM_IMPL Checkpoint initial_checkpoint(const ConfigValue& config, std::span<const NamedParameter> parameters, std::uint64_t seed) {
  std::vector<NamedTensor> tensors;
  const bool nested = config.has_value("text_config");
  const auto add = [&](const std::string& name, const Shape& shape) {
    std::uint64_t hash = 0xcbf29ce484222325U;  // FNV-1a of the name: one stream of numbers per tensor
    for (const char c : name) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3U;
    Rng rng(seed ^ hash);
    const initial::Rule rule = initial::rule_of(name, shape, config);
    Tensor<float> values(shape);
    for (float& x : values.span()) x = static_cast<float>(rule.deviation == 0 ? rule.mean : rule.mean + rule.deviation * initial::normal(rng));
    tensors.push_back({saving::hugging_face_name(name, nested), AnyTensor(std::move(values))});
  };
  for (const NamedParameter& p : parameters) add(p.name, p.parameter->shape);

  // The model has the tower's blocks up to the chosen layer. The directory gets them all, and the norm behind them: transformers asks
  // for them.
  if (!config.has_value("vision_config")) return Checkpoint::of_tensors(config.file(), std::move(tensors));
  const std::string blocks = "vision_tower.vision_model.encoder.layers.", norm = "vision_tower.vision_model.post_layernorm.";
  const auto listed = [&](const std::string& name) {
    return std::any_of(parameters.begin(), parameters.end(), [&](const NamedParameter& p) { return p.name == name; });
  };
  for (const NamedParameter& p : parameters) {
    if (!p.name.starts_with(blocks + "0.")) continue;
    for (std::int64_t i = 1; i < config["vision_config"].get_or<std::int64_t>("num_hidden_layers", 12); ++i) {
      const std::string name = concat(blocks, i, p.name.substr(blocks.size() + 1));
      if (!listed(name)) add(name, p.parameter->shape);
    }
    if (!p.name.ends_with("layer_norm1.weight")) continue;
    for (const char* part : {"weight", "bias"})
      if (!listed(norm + part)) add(norm + part, p.parameter->shape);
  }
  return Checkpoint::of_tensors(config.file(), std::move(tensors));
}

}  // namespace m2lm::detail
