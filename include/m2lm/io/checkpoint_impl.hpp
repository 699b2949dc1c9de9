// Definitions of io/checkpoint.hpp.
// Floor: io. May include: core, interop.
#pragma once

#include <m2lm/io/checkpoint.hpp>
#include <m2lm/io/config_impl.hpp>
#include <m2lm/io/safetensors_impl.hpp>

#include <map>
#include <set>
#include <unordered_map>

namespace m2lm {

struct Checkpoint::State {
  static constexpr std::size_t no_file = static_cast<std::size_t>(-1);
  struct Entry {
    std::size_t file = 0;
    std::optional<AnyTensor> tensor;  // nothing when the dtype is not supported
  };
  std::string directory;
  std::vector<Safetensors> files;
  std::vector<std::string> names;
  std::unordered_map<std::string, Entry> entries;

  void add(const std::string& name, std::size_t file) {
    Entry entry{file, std::nullopt};
    if (files[file].dtype(name)) entry.tensor = files[file].tensor(name);
    entries.emplace(name, std::move(entry));
    names.push_back(name);
  }
  const Entry* find(std::string_view name) const {
    const auto found = entries.find(std::string(name));
    return found == entries.end() ? nullptr : &found->second;
  }
};

namespace detail {

/// "a, b, c and 12 more".
M2LM_IMPL std::string list_names(const std::vector<std::string>& names, std::size_t most = 20) {
  std::string out;
  for (std::size_t i = 0; i < names.size() && i < most; ++i) out += (i ? ", " : "") + names[i];
  if (names.size() > most) out += concat(" and ", names.size() - most, " more");
  return out;
}

}  // namespace detail

M2LM_IMPL Checkpoint Checkpoint::open(std::string_view directory) {
  auto state = std::make_shared<State>();
  state->directory = std::string(directory);
  require<CheckpointError>(directory_exists(directory), directory, ": there is no such directory");
  const std::string index = join_path(directory, "model.safetensors.index.json");
  const std::string single = join_path(directory, "model.safetensors");

  if (file_exists(single)) {
    state->files.push_back(Safetensors::open(single));
    for (const std::string& name : state->files[0].names()) state->add(name, 0);
  } else if (file_exists(index)) {
    const ConfigValue map = ConfigValue::parse_file(index)["weight_map"];
    std::map<std::string, std::vector<std::string>> promised;  // shard -> names
    std::vector<std::string> missing, outside;
    for (const std::string& name : map.keys()) promised[map.get<std::string>(name)].push_back(name);
    for (const auto& [shard, names] : promised) {
      if (shard.empty() || shard.find('/') != std::string::npos || shard.find('\\') != std::string::npos || shard == "..")
        outside.push_back(concat("\"", shard, "\" (tensor ", names.front(), ")"));
      else if (!file_exists(join_path(directory, shard)))
        missing.push_back(concat(shard, " (", names.size(), " tensors, among them ", names.front(), ")"));
    }
    require<CheckpointError>(outside.empty(), index, ": weight_map must name files of this directory, found ", detail::list_names(outside));
    require<CheckpointError>(missing.empty(), index, ": shards are missing: ", detail::list_names(missing),
                             "; download the checkpoint again");
    std::vector<std::string> lacking;
    for (const auto& [shard, names] : promised) {
      const std::size_t file = state->files.size();
      state->files.push_back(Safetensors::open(join_path(directory, shard)));
      const std::set<std::string_view> wanted(names.begin(), names.end());
      for (const std::string& name : names)
        if (!state->files[file].contains(name)) lacking.push_back(concat(name, " (", shard, ")"));
      for (const std::string& name : state->files[file].names())
        if (wanted.contains(name)) state->add(name, file);
    }
    require<CheckpointError>(lacking.empty(), index, ": tensors are not in the shards that should hold them: ", detail::list_names(lacking));
  } else {
    for (const char* name : {"pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth"})
      require<CheckpointError>(!file_exists(join_path(directory, name)), join_path(directory, name),
                               ": pickled PyTorch weights are not supported yet; convert them with transformers: "
                               "AutoModel.from_pretrained(DIR).save_pretrained(DIR, safe_serialization=True)");
    throw CheckpointError(concat(directory, ": holds neither model.safetensors nor model.safetensors.index.json"));
  }
  Checkpoint out;
  out.state_ = std::move(state);
  return out;
}

M2LM_IMPL Checkpoint Checkpoint::of_tensors(std::string_view name, std::vector<NamedTensor> tensors) {
  auto state = std::make_shared<State>();
  state->directory = std::string(name);
  for (NamedTensor& t : tensors) {
    state->names.push_back(t.name);
    state->entries.emplace(std::move(t.name), State::Entry{State::no_file, std::move(t.tensor)});
  }
  Checkpoint out;
  out.state_ = std::move(state);
  return out;
}

M2LM_IMPL const std::string& Checkpoint::directory() const { return state_->directory; }
M2LM_IMPL std::vector<std::string> Checkpoint::names() const { return state_->names; }

M2LM_IMPL const AnyTensor* Checkpoint::find(std::string_view name) const {
  const State::Entry* entry = state_->find(name);
  if (!entry) return nullptr;
  if (!entry->tensor) (void)state_->files[entry->file].tensor(name);  // throws and names the dtype
  return &*entry->tensor;
}

M2LM_IMPL std::string_view Checkpoint::file_of(std::string_view name) const {
  const State::Entry* entry = state_->find(name);
  if (!entry) {
    const std::string nearest = detail::nearest_name(name, state_->names);
    throw CheckpointError(concat(state_->directory, ": has no tensor \"", name, "\"", nearest.empty() ? "" : "; the nearest name is ", nearest));
  }
  return entry->file == State::no_file ? state_->directory : state_->files[entry->file].path();
}

M2LM_IMPL std::size_t Checkpoint::total_bytes() const {
  std::size_t sum = 0;
  for (const Safetensors& file : state_->files) sum += file.bytes();
  return sum;
}

M2LM_IMPL void Checkpoint::release_pages() const {
  for (const Safetensors& file : state_->files) file.release_pages();
}

}  // namespace m2lm
