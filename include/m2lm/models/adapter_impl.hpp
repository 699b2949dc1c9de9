// Definitions of models/adapter.hpp.
// Floor: models. May include: core, ops, layers, parts, io, sampling.
#pragma once

#include <m2lm/io/config.hpp>
#include <m2lm/io/directory.hpp>
#include <m2lm/io/file.hpp>
#include <m2lm/io/pytorch.hpp>
#include <m2lm/io/safetensors.hpp>
#include <m2lm/models/adapter.hpp>

#include <algorithm>
#include <cmath>
#include <map>
#include <optional>
#include <set>
#include <vector>

namespace m2lm::inline M2LM_ABI::detail {

namespace adapters {

/// The tensors of adapter_model.safetensors, or of adapter_model.bin.
inline std::vector<NamedTensor> read_tensors(std::string_view directory, const CheckpointLimits& limits, std::string& path) {
  std::vector<NamedTensor> out;
  path = join_path(directory, "adapter_model.safetensors");
  if (file_exists(path)) {
    const Safetensors file = Safetensors::open(path, limits.safetensors);
    for (const std::string& name : file.names()) out.push_back({name, file.tensor(name)});
    return out;
  }
  const std::string pickled = join_path(directory, "adapter_model.bin");
  require<CheckpointError>(file_exists(pickled), directory, ": holds neither adapter_model.safetensors nor adapter_model.bin");
  path = pickled;
  const PytorchFile file = PytorchFile::open(path, limits.pytorch);
  for (const std::string& name : file.names()) out.push_back({name, file.tensor(name)});
  return out;
}

/// "k_proj" names every module whose last part it is, "a.k_proj" likewise; as PEFT compares target_modules and the patterns' keys.
inline bool names_module(std::string_view target, std::string_view module) {
  return module == target || (module.size() > target.size() && module.ends_with(target) && module[module.size() - target.size() - 1] == '.');
}

/// The value of a pattern ("rank_pattern", "alpha_pattern") for a module; the keys are used as suffixes, not as regular expressions.
inline double pattern_value(const ConfigValue& config, std::string_view key, std::string_view module, double fallback) {
  if (!config.has_value(key)) return fallback;
  const ConfigValue pattern = config[key];
  for (std::string name : pattern.keys()) {
    const ConfigValue value = pattern[name];
    if (name.find_first_of("*+?[](){}|\\$") != std::string::npos) value.fail("is a regular expression; only names of modules are supported");
    if (!name.empty() && name.front() == '^') name.erase(0, 1);
    if (names_module(name, module)) return value.as<double>();
  }
  return fallback;
}

struct Update {
  std::string module;  // as the adapter names it, without its prefix
  const AnyTensor* a = nullptr;
  const AnyTensor* b = nullptr;
};

/// w + scale·b·a in the dtype of w.
inline AnyTensor merged(const AnyTensor& w, const LowRankUpdate& update) {
  const std::int64_t rows = w.shape()[0], columns = w.shape()[1], rank = update.a.shape()[0];
  const Tensor<double> a = update.a.to<double>();
  std::vector<double> row(static_cast<std::size_t>(columns)), factors(static_cast<std::size_t>(rank));
  const auto fill = [&]<class T>(Tensor<T> out) {
    for (std::int64_t i = 0; i < rows; ++i) {
      w.copy_to(row.data(), i * columns, columns);
      update.b.copy_to(factors.data(), i * rank, rank);
      for (std::int64_t r = 0; r < rank; ++r) {
        const double factor = update.scale * factors[static_cast<std::size_t>(r)];
        const double* const source = a.data() + r * columns;
        for (std::int64_t j = 0; j < columns; ++j) row[static_cast<std::size_t>(j)] += factor * source[j];
      }
      for (std::int64_t j = 0; j < columns; ++j) {
        const double x = row[static_cast<std::size_t>(j)];
        T& y = out.data()[i * columns + j];
        if constexpr (std::is_same_v<T, Bf16>)
          y = to_bf16(static_cast<float>(x));
        else if constexpr (std::is_same_v<T, Half>)
          y = to_half(static_cast<float>(x));
        else
          y = static_cast<T>(x);
      }
    }
    return AnyTensor(std::move(out));
  };
  switch (w.dtype()) {
    case DType::bf16: return fill(Tensor<Bf16>(w.shape()));
    case DType::f16: return fill(Tensor<Half>(w.shape()));
    case DType::f64: return fill(Tensor<double>(w.shape()));
    default: return fill(Tensor<float>(w.shape()));
  }
}

/// Keys that change what an update means, and the value at which they do not.
inline void refuse_variants(const ConfigValue& config) {
  const std::string type = config.get_or<std::string>("peft_type", "LORA");
  if (type != "LORA") config["peft_type"].fail(concat("adapters of the type ", type, " are not supported; LORA is"));
  for (const char* key : {"use_dora", "fan_in_fan_out", "use_qalora", "lora_bias"})
    if (config.has_value(key) && config[key].is_bool() && config.get<bool>(key)) config[key].fail("true is not supported");
  for (const char* key : {"trainable_token_indices", "target_parameters", "alora_invocation_tokens", "layer_replication", "arrow_config"}) {
    if (!config.has_value(key)) continue;
    const ConfigValue value = config[key];
    if ((value.is_array() && value.size() == 0) || (value.is_object() && value.keys().empty())) continue;
    value.fail("is not supported");
  }
}

}  // namespace adapters

M2LM_IMPL std::size_t apply_adapter(std::span<const NamedParameter> parameters, std::string_view adapter_directory, AdapterMode mode,
                                    std::span<const NameRule> rules, const CheckpointLimits& limits, bool follow_links) {
  using namespace adapters;  // NOLINT: the helpers above
  require<CheckpointError>(directory_exists(adapter_directory), "m2lm: there is no adapter directory ", adapter_directory);
  if (!follow_links) require_own_files(adapter_directory);
  const ConfigValue config = ConfigValue::parse_file(join_path(adapter_directory, "adapter_config.json"), limits.json);
  if (!config.is_object()) config.fail("an object is wanted");
  refuse_variants(config);
  const auto rank = config.get_or<std::int64_t>("r", 8);
  if (rank < 1 || rank > 65536) config.fail(concat("r = ", rank, " is outside 1 to 65536"));
  const double alpha = config.get_or<double>("lora_alpha", 8.0);
  const bool rank_stabilized = config.get_or<bool>("use_rslora", false);
  std::string path;
  const std::vector<NamedTensor> tensors = read_tensors(adapter_directory, limits, path);

  std::map<std::string, Parameter*, std::less<>> by_name;
  std::vector<std::string> names;
  for (const NamedParameter& p : parameters) {
    by_name.emplace(p.name, p.parameter);
    names.push_back(p.name);
  }
  // The adapter's names are the base's: canonical ones, or those of any dialect.
  const auto find_parameter = [&](const std::string& name) -> Parameter* {
    if (const auto found = by_name.find(name); found != by_name.end()) return found->second;
    for (const NameRule& rule : rules)
      for (const std::string_view stored : rule.stored)
        if (!stored.empty() && name.starts_with(stored))
          if (const auto found = by_name.find(concat(rule.canonical, std::string_view(name).substr(stored.size()))); found != by_name.end())
            return found->second;
    return nullptr;
  };

  // Blocks behind the chosen feature layer, for one, are left alone in the base, too.
  const auto is_ignorable = [](std::string_view name) {
    return std::any_of(ignorable_names.begin(), ignorable_names.end(), [&](std::string_view pattern) { return glob_match(pattern, name); });
  };
  std::vector<std::string> problems;
  const auto problem = [&](const auto&... what) { problems.push_back(concat(what...)); };
  std::map<std::string, Update> updates;
  std::vector<std::pair<std::string, const AnyTensor*>> replaced;
  constexpr std::string_view prefix = "base_model.model.";
  for (const NamedTensor& t : tensors) {
    std::string_view name = t.name;
    if (!name.starts_with(prefix)) {
      problem(t.name, " does not begin with ", prefix);
      continue;
    }
    name.remove_prefix(prefix.size());
    bool is_part = false;
    for (const auto& [suffix, part] : {std::pair{std::string_view(".lora_A.weight"), &Update::a}, {std::string_view(".lora_B.weight"), &Update::b}}) {
      if (!name.ends_with(suffix)) continue;
      const std::string module(name.substr(0, name.size() - suffix.size()));
      Update& update = updates[module];
      update.module = module;
      update.*part = &t.tensor;
      is_part = true;
    }
    if (is_part) continue;
    if (name.find(".lora_") != std::string_view::npos) {
      problem(t.name, ": an update of this kind is not supported; lora_A.weight and lora_B.weight are");
      continue;
    }
    std::string whole(name);
    for (const std::string_view inner : {".base_layer.", ".modules_to_save.default.", ".original_module."})
      if (const std::size_t at = whole.find(inner); at != std::string::npos) whole.replace(at, inner.size(), ".");
    replaced.emplace_back(whole, &t.tensor);
  }

  std::size_t bytes = 0;
  std::vector<std::pair<Parameter*, LowRankUpdate>> accepted;
  for (const auto& [module, update] : updates) {
    if (update.a == nullptr || update.b == nullptr) {
      problem(module, ": lora_", update.a ? "B" : "A", ".weight is missing");
      continue;
    }
    Parameter* parameter = find_parameter(module + ".weight");
    if (parameter == nullptr) {
      if (is_ignorable(module + ".weight")) continue;
      const std::string nearest = nearest_name(module + ".weight", names);
      problem(module, ": the model has no such module", nearest.empty() ? "" : "; the nearest is ", nearest);
      continue;
    }
    const double wanted = pattern_value(config, "rank_pattern", module, static_cast<double>(rank));
    const Shape &a = update.a->shape(), &b = update.b->shape(), &w = parameter->shape;
    if (a.rank() != 2 || b.rank() != 2 || w.rank() != 2 || !is_floating(update.a->dtype()) || !is_floating(update.b->dtype())) {
      problem(module, ": A ", a.string(), " and B ", b.string(), " are no floating matrices beside a matrix ", w.string());
    } else if (a[0] != b[1] || static_cast<double>(a[0]) != wanted) {
      problem(module, ": A ", a.string(), " and B ", b.string(), " are not of the rank ", static_cast<std::int64_t>(wanted),
              " that adapter_config.json says");
    } else if (a[1] != w[1] || b[0] != w[0]) {
      problem(module, ": A ", a.string(), " and B ", b.string(), " do not fit the base's weight ", w.string());
    } else {
      const double scale = pattern_value(config, "alpha_pattern", module, alpha) / (rank_stabilized ? std::sqrt(wanted) : wanted);
      accepted.push_back({parameter, LowRankUpdate{*update.a, *update.b, M2LM_FAULT(50) ? 1.0 : scale}});
    }
  }
  std::vector<std::pair<Parameter*, const AnyTensor*>> whole;
  for (const auto& [name, tensor] : replaced) {
    Parameter* parameter = find_parameter(name);
    if (parameter == nullptr) {
      if (is_ignorable(name)) continue;
      const std::string nearest = nearest_name(name, names);
      problem(name, ": the model has no such parameter", nearest.empty() ? "" : "; the nearest is ", nearest);
    } else if (tensor->shape() != parameter->shape || !is_floating(tensor->dtype())) {
      problem(name, " is ", tensor->shape().string(), " in ", dtype_name(tensor->dtype()), ", the base has ", parameter->shape.string(),
              " in a floating dtype");
    } else {
      whole.emplace_back(parameter, tensor);
    }
  }
  // A list of targets promises tensors; a text is a regular expression and promises nothing that we could check.
  if (config.has_value("target_modules") && config["target_modules"].is_array())
    for (const std::string& target : config.get_list<std::string>("target_modules"))
      if (std::none_of(updates.begin(), updates.end(), [&](const auto& u) { return names_module(target, u.first); }))
        problem("target_modules names \"", target, "\", of which the file has no tensors");
  if (config.has_value("modules_to_save") && config["modules_to_save"].is_array())
    for (const std::string& target : config.get_list<std::string>("modules_to_save"))
      if (std::none_of(replaced.begin(), replaced.end(), [&](const auto& r) { return names_module(target, r.first.substr(0, r.first.rfind('.'))); }))
        problem("modules_to_save names \"", target, "\", of which the file has no tensors");
  if (!problems.empty()) {
    std::string list;
    constexpr std::size_t most = 20;
    for (std::size_t i = 0; i < problems.size() && i < most; ++i) list += "\n  " + problems[i];
    if (problems.size() > most) list += concat("\n  and ", problems.size() - most, " more");
    throw CheckpointError(concat(path, ": the adapter does not fit this model (it was made for \"",
                                 config.get_or<std::string>("base_model_name_or_path", ""), "\"):", list));
  }
  require<CheckpointError>(!accepted.empty() || !whole.empty(), path, ": holds no update");

  for (const auto& [parameter, tensor] : whole) parameter->value = *tensor;
  for (auto& [parameter, update] : accepted) {
    if (mode == AdapterMode::merge) {
      parameter->value = merged(parameter->value, update);
      bytes += parameter->value.bytes();
    } else {
      bytes += static_cast<std::size_t>(update.a.shape().elements() + update.b.shape().elements()) * sizeof(float);
      parameter->update = std::make_shared<const LowRankUpdate>(std::move(update));
    }
  }
  return bytes;
}

}  // namespace m2lm::detail
