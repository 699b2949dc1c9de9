// Definitions of models/llava_native.hpp.
// Floor: models. May include: core, ops, layers, parts, io, sampling.
#pragma once

#include <m2lm/interop/json.hpp>
#include <m2lm/io/config_impl.hpp>
#include <m2lm/io/file.hpp>
#include <m2lm/models/llava_native.hpp>

#include <array>

namespace m2lm::inline M2LM_ABI::detail {

/// Towers that LLaVA's checkpoints name without saying how large they are. source: the config.json of each.
struct KnownTower {
  std::string_view name;
  int hidden_size, intermediate_size, layers, heads, patch_size, image_size, projection_dim;
};
inline constexpr std::array<KnownTower, 4> known_towers{{{"clip-vit-base-patch32", 768, 3072, 12, 12, 32, 224, 512},
                                                         {"clip-vit-base-patch16", 768, 3072, 12, 12, 16, 224, 512},
                                                         {"clip-vit-large-patch14", 1024, 4096, 24, 16, 14, 224, 768},
                                                         {"clip-vit-large-patch14-336", 1024, 4096, 24, 16, 14, 336, 768}}};

/// "b" of "a/b" and "a/b/": a name that leads nowhere else.
inline std::string last_part(std::string path) {
  while (!path.empty() && path.back() == '/') path.pop_back();
  path = path.substr(path.rfind('/') + 1);
  return path == "." || path == ".." || path.find('\0') != std::string::npos ? std::string() : path;
}

M2LM_IMPL bool is_llava_native(const ConfigValue& root) {
  return !root.has_value("text_config") &&
         (root.has_value("mm_vision_tower") || root.has_value("mm_projector_type") || root.has_value("mm_hidden_size"));
}

M2LM_IMPL std::string find_llava_tower(const ConfigValue& root, std::string_view directory, std::string_view given) {
  const std::string name = last_part(root.get_or<std::string>("mm_vision_tower", ""));
  const auto is_tower = [](const std::string& path) { return file_exists(join_path(path, "config.json")); };
  if (!given.empty()) {
    if (is_tower(std::string(given))) return std::string(given);
    if (const std::string below = join_path(given, name); !name.empty() && is_tower(below)) return below;
    throw CheckpointError(concat("m2lm: no vision tower is in ", given, ": neither it nor ",
                                 name.empty() ? "a directory in it" : join_path(given, name), " has a config.json (", root.file(),
                                 ": mm_vision_tower is \"", root.get_or<std::string>("mm_vision_tower", ""), "\")"));
  }
  for (const std::string& part : {name, std::string("vision_tower")})
    if (!part.empty() && is_tower(join_path(directory, part))) return join_path(directory, part);
  return {};
}

M2LM_IMPL ConfigValue translate_llava_config(const ConfigValue& root, std::string_view directory, std::string_view tower_directory) {
  Json out = Json::parse(root.text());
  Json text = out;
  const std::string type = root.get_or<std::string>("model_type", "llava");
  if (type != "llava" && type != "llava_llama" && type != "llava_mistral")
    root.fail(concat("model_type \"", type, "\" of LLaVA's own layout is not supported; llava, llava_llama and llava_mistral are"));
  text["model_type"] = type == "llava_mistral" ? "mistral" : "llama";
  for (const char* key : {"architectures", "_name_or_path"}) text.erase(key);
  for (auto at = text.begin(); at != text.end();) at = at.key().starts_with("mm_") || at.key().starts_with("image_") ? text.erase(at) : std::next(at);
  out["text_config"] = std::move(text);

  // The tower's sizes.
  const std::string tower = root.get_or<std::string>("mm_vision_tower", "");
  if (!root.has_value("vision_config")) {
    if (!tower_directory.empty()) {
      const ConfigValue config = ConfigValue::parse_file(join_path(tower_directory, "config.json"));
      const ConfigValue vision = config.has_value("vision_config") ? config["vision_config"] : config;
      if (!vision.is_object()) vision.fail("an object is wanted");
      out["vision_config"] = Json::parse(vision.text());
    } else {
      const std::string name = last_part(tower);
      const auto* known = std::find_if(known_towers.begin(), known_towers.end(), [&](const KnownTower& t) { return t.name == name; });
      if (known == known_towers.end())
        root.fail(concat("mm_vision_tower is \"", tower, "\", whose sizes are not known and which is not in ", directory,
                         " either; put its directory there as \"", name.empty() ? "vision_tower" : name,
                         "\", or name it with LoadOptions::vision_tower"));
      out["vision_config"] = {
          {"model_type", "clip_vision_model"},  {"hidden_size", known->hidden_size},      {"intermediate_size", known->intermediate_size},
          {"num_hidden_layers", known->layers}, {"num_attention_heads", known->heads},    {"patch_size", known->patch_size},
          {"image_size", known->image_size},    {"projection_dim", known->projection_dim}};
    }
  }
  const Json& vision = out["vision_config"];
  if (root.has_value("mm_hidden_size") && vision.contains("hidden_size") && vision["hidden_size"].is_number_integer() &&
      vision["hidden_size"].get<std::int64_t>() != root.get<std::int64_t>("mm_hidden_size"))
    root.fail(concat("mm_hidden_size is ", root.get<std::int64_t>("mm_hidden_size"), ", but the vision tower has hidden_size ",
                     vision["hidden_size"].get<std::int64_t>()));

  out["vision_feature_layer"] = root.get_or<int>("mm_vision_select_layer", -2);
  const std::string feature = root.get_or<std::string>("mm_vision_select_feature", "patch");
  if (feature != "patch" && feature != "cls_patch")
    root.fail(concat("mm_vision_select_feature \"", feature, "\" is not supported; patch and cls_patch are"));
  out["vision_feature_select_strategy"] = feature == "patch" ? "default" : "full";
  out["projector_hidden_act"] = "gelu";
  if (!root.has_value("image_token_index")) out["image_token_index"] = llava_image_token_index;

  // How pictures are prepared: what the tower says, and whether they are padded to a square.
  const std::string aspect = root.get_or<std::string>("image_aspect_ratio", "square");
  if (aspect != "pad" && aspect != "square") root.fail(concat("image_aspect_ratio \"", aspect, "\" is not supported; pad and square are"));
  Json processor = Json::object();
  for (const std::string_view place : {directory, tower_directory}) {
    const std::string path = join_path(place, "preprocessor_config.json");
    if (place.empty() || !file_exists(path)) continue;
    const ConfigValue config = ConfigValue::parse_file(path);
    if (!config.is_object()) config.fail("an object is wanted");
    processor = Json::parse(config.text());
    break;
  }
  processor["image_aspect_ratio"] = M2LM_FAULT(52) ? "square" : aspect;
  out["image_processor_config"] = std::move(processor);
  return ConfigValue::parse_text(out.dump(-1, ' ', false, Json::error_handler_t::replace), root.file());
}

}  // namespace m2lm::detail
