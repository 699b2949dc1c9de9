// Definitions of the non-template parts of models/model.hpp.
// Floor: models. May include: core, ops, layers, parts, io, sampling.
#pragma once

#include <m2lm/io/directory.hpp>
#include <m2lm/io/file.hpp>
#include <m2lm/io/gguf_model.hpp>
#include <m2lm/models/llava_native.hpp>
#include <m2lm/models/model.hpp>

#include <algorithm>
#include <cstdio>

namespace m2lm::inline M2LM_ABI::detail {

namespace files {

/// The Jinja text of a checkpoint's chat template, wherever it is; empty if there is none.
inline std::string chat_template_text(std::string_view directory) {
  const std::string jinja = join_path(directory, "chat_template.jinja");
  if (file_exists(jinja)) return read_file(jinja);
  for (const char* name : {"chat_template.json", "tokenizer_config.json"}) {
    const std::string path = join_path(directory, name);
    if (!file_exists(path)) continue;
    const ConfigValue file = ConfigValue::parse_file(path);
    if (!file.has_value("chat_template")) continue;
    const ConfigValue value = file["chat_template"];
    if (!value.is_array()) return value.as<std::string>();
    for (std::size_t i = 0; i < value.size(); ++i)  // several under names; "default" is the one for conversations
      if (value.at(i).get<std::string>("name") == "default") return value.at(i).get<std::string>("template");
    value.fail("none of the templates is called \"default\"");
  }
  return {};
}

/// "MemAvailable" of the system, capped by the memory that the control group leaves; 0 when it cannot be read.
inline std::size_t available_memory() {
  const auto number_in = [](const char* path, const char* key) -> std::size_t {
    std::FILE* file = std::fopen(path, "r");
    if (file == nullptr) return 0;
    char line[256];
    unsigned long long value = 0;
    const std::string_view wanted = key;
    while (std::fgets(line, sizeof(line), file))
      if (std::string_view(line).starts_with(wanted) && std::sscanf(line + wanted.size(), "%llu", &value) == 1) break;
    std::fclose(file);
    return static_cast<std::size_t>(value);
  };
  std::size_t available = number_in("/proc/meminfo", "MemAvailable:") * 1024;
  const std::size_t limit = number_in("/sys/fs/cgroup/memory.max", ""), used = number_in("/sys/fs/cgroup/memory.current", "");
  // What the group uses counts cached files too, which make room when memory is asked for.
  const std::size_t cached = number_in("/sys/fs/cgroup/memory.stat", "active_file") + number_in("/sys/fs/cgroup/memory.stat", "inactive_file");
  if (limit > 0 && used > 0) available = std::min(available, limit > used ? limit - used + std::min(cached, used) : std::min(cached, used));
  return available;
}

}  // namespace files

/// Everything but config and tensors: the tokenizer, the tokens that end an answer, the chat template.
M2LM_IMPL const ChatTemplate& find_chat_template(const ConfigValue& config, std::string_view directory, const GgufModel* gguf) {
  const std::string jinja = gguf ? gguf->chat_template() : files::chat_template_text(directory);
  const std::string model_type = config.get_or<std::string>("model_type", "");
  const std::string text_type = config.has_value("text_config") ? config["text_config"].get_or<std::string>("model_type", "") : "";
  const std::vector<std::string> architectures =
      config.has_value("architectures") ? config.get_list<std::string>("architectures") : std::vector<std::string>{};
  // The last part of the name only: parent directories say nothing about a model.
  std::string name = config.get_or<std::string>("_name_or_path", "");
  if (name.empty()) name = directory;
  while (name.size() > 1 && name.back() == '/') name.pop_back();
  name = name.substr(name.rfind('/') + 1);
  return detect_chat_template(CheckpointFacts{.model_type = model_type, .text_model_type = text_type,
                                                            .architecture = architectures.empty() ? std::string_view{} : std::string_view(architectures.front()),
                                                            .name = name, .chat_template = jinja});
}

M2LM_IMPL void describe_model_files(ModelFiles& out, std::string_view directory, std::string_view template_name, const GgufModel* gguf = nullptr) {
  out.directory = directory;
  try {
    out.tokenizer = gguf ? gguf->tokenizer() : Tokenizer::from_directory(directory);
  } catch (const CheckpointError& error) {
    // Token ids still work without one; the reason is given when text is used.
    out.tokenizer_error = error.what();
  }
  out.stop_tokens = gguf ? gguf->stop_tokens() : read_stop_tokens(directory, out.config);
  if (out.stop_tokens.empty() && out.tokenizer && out.tokenizer->eos()) out.stop_tokens.push_back(*out.tokenizer->eos());
  if (!template_name.empty()) {
    out.chat_template = &chat_template(template_name);
    return;
  }
  out.chat_template = &find_chat_template(out.config, directory, gguf);
}

/// Puts the config in transformers' words, and adds the tensors of a vision tower that has a directory of its own.
M2LM_IMPL void open_llava_native(ModelFiles& files, std::string_view directory, const LoadOptions& options) {
  const std::string tower = find_llava_tower(files.config, directory, options.vision_tower);
  if (!options.follow_links && !tower.empty()) require_own_files(tower);
  files.config = translate_llava_config(files.config, directory, tower);
  const std::vector<std::string> names = files.checkpoint.names();
  const bool inside = std::any_of(names.begin(), names.end(), [](const std::string& name) { return name.find("vision_tower.") != std::string::npos; });
  if (inside) return;
  require<CheckpointError>(!tower.empty(), "m2lm: ", directory, " holds no vision tower, and ", files.config.file(), " names one that is not in it either (mm_vision_tower: \"",
                           files.config.get_or<std::string>("mm_vision_tower", ""), "\"); name its directory with LoadOptions::vision_tower");
  files.checkpoint = files.checkpoint.joined(Checkpoint::open(tower, options.limits));
}

M2LM_IMPL ModelFiles open_model_files(std::string_view directory, const LoadOptions& options) {
  ModelFiles out;
  if (!options.follow_links && directory_exists(directory)) require_own_files(directory);
  if (const auto gguf = GgufModel::find(directory, options.limits.gguf)) {
    require_memory(directory, gguf->unpacked_bytes(), 0, DType::f32);  // before anything is unpacked
    out.config = gguf->config();
    out.checkpoint = Checkpoint::open(directory, options.limits);
    describe_model_files(out, directory, options.template_name, &*gguf);
    return out;
  }
  require<CheckpointError>(directory_exists(directory), "m2lm: there is no directory ", directory);
  out.config = ConfigValue::parse_file(join_path(directory, "config.json"), options.limits.json);
  if (!out.config.is_object()) out.config.fail(concat("an object is wanted, not ", out.config.type_name()));
  out.checkpoint = Checkpoint::open(directory, options.limits);
  if (is_llava_native(out.config)) open_llava_native(out, directory, options);
  describe_model_files(out, directory, options.template_name);
  return out;
}

M2LM_IMPL ModelFiles model_files_of_config(const ConfigValue& config, std::string_view directory, std::string_view template_name) {
  if (!config.is_object()) config.fail(concat("an object is wanted, not ", config.type_name()));
  require<CheckpointError>(directory.empty() || directory_exists(directory), "m2lm: there is no directory ", directory);
  ModelFiles out;
  out.config = config;
  // Without a directory: a path below which there is nothing.
  describe_model_files(out, directory.empty() ? concat(config.file(), "/(no directory)") : std::string(directory), template_name);
  return out;
}

M2LM_IMPL void require_memory(std::string_view directory, std::size_t needed, std::size_t limit, DType format) {
  const std::size_t available = limit ? limit : files::available_memory();
  require<CapacityError>(available == 0 || needed <= available, "m2lm: the model in ", directory, " needs about ", needed >> 20, " MiB of memory in ",
                         dtype_name(format), ", but ", available >> 20, " MiB are available; choose a smaller precision or free memory");
}

M2LM_IMPL std::optional<std::int32_t> bos_token(const ModelFiles& files) {
  if (files.tokenizer) return files.tokenizer->bos();
  if (files.config.has_value("bos_token_id")) return files.config.get<std::int32_t>("bos_token_id");
  return std::nullopt;
}

M2LM_IMPL ComponentTokens component_tokens(const ModelFiles& files, std::string_view name, std::size_t index, InsertionKind insertion, std::string_view before,
                                           std::string_view after) {
  const auto configured = [&](std::initializer_list<const char*> suffixes) -> std::optional<std::int32_t> {
    for (const char* suffix : suffixes) {
      const std::string key = concat(name, suffix);
      if (files.config.has_value(key)) return files.config.get<std::int32_t>(key);
    }
    return std::nullopt;
  };
  const auto delimiter = [&](std::string_view text, const char* suffix) -> std::optional<std::int32_t> {
    if (text.empty()) return std::nullopt;
    std::optional<std::int32_t> id = configured({suffix});
    if (!id && files.tokenizer) id = files.tokenizer->token_id(text);
    require<CheckpointError>(id.has_value(), "m2lm: ", files.directory, " has no token \"", text, "\", which stands beside every <", name,
                             ">: neither config.json (", name, suffix, ") nor the tokenizer names one");
    return id;
  };
  ComponentTokens out{.name = name, .insertion = insertion, .placeholder = -1 - static_cast<std::int32_t>(index), .before = {}, .after = {}};
  out.before = delimiter(before, "_begin_token_id");
  out.after = delimiter(after, "_end_token_id");
  if (insertion == InsertionKind::prefix_after_bos) return out;  // nothing in the text stands for an instance
  std::optional<std::int32_t> id = configured({"_token_index", "_token_id"});
  const std::optional<std::int32_t> token = files.tokenizer ? files.tokenizer->token_id(concat("<", name, ">")) : std::nullopt;
  out.is_token = token.has_value() && (!id || *id == *token);
  if (!id) id = token;
  if (id) out.placeholder = *id;
  if (name == "image" && files.config.get_or<bool>("mm_use_im_start_end", false)) {
    out.text_before = "<im_start>";
    out.text_after = "<im_end>";
    for (const std::string_view text : {out.text_before, out.text_after})
      require<CheckpointError>(!files.tokenizer || files.tokenizer->token_id(text).has_value(), "m2lm: ", files.directory, ": config.json says mm_use_im_start_end, but \"",
                               text, "\" is no token of the tokenizer");
  }
  return out;
}

M2LM_IMPL std::vector<std::int32_t> encode_text(const Tokenizer& tokenizer, std::string_view text, bool add_bos, std::span<const ComponentTokens> components) {
  std::vector<std::int32_t> out;
  const auto append = [&](const std::string& piece) {
    if (piece.empty() && !add_bos) return;
    const std::vector<std::int32_t> ids = tokenizer.encode(piece, add_bos);
    out.insert(out.end(), ids.begin(), ids.end());
    add_bos = false;
  };
  std::string_view behind;  // what the last placeholder leaves before the text behind it
  while (true) {
    std::size_t first = std::string_view::npos;
    const ComponentTokens* found = nullptr;
    for (const ComponentTokens& c : components) {
      if (c.is_token || c.insertion == InsertionKind::prefix_after_bos) continue;
      const std::size_t at = text.find(concat("<", c.name, ">"));
      if (at >= first) continue;
      first = at;
      found = &c;
    }
    std::string piece = concat(behind, text.substr(0, first));
    if (found == nullptr) {
      append(piece);
      return out;
    }
    // Who has written the tokens around the placeholder does not get them twice.
    const bool wrap = !piece.ends_with(found->text_before);
    if (wrap) piece += found->text_before;
    behind = wrap ? found->text_after : std::string_view();
    append(piece);
    out.push_back(found->placeholder);
    text.remove_prefix(first + found->name.size() + 2);
  }
}

}  // namespace m2lm::detail
