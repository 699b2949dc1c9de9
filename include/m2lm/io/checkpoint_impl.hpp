// Definitions of io/checkpoint.hpp.
// Floor: io. May include: core, interop.
#pragma once

#include <m2lm/io/checkpoint.hpp>
#include <m2lm/io/config_impl.hpp>
#include <m2lm/io/gguf_model_impl.hpp>
#include <m2lm/io/pytorch_impl.hpp>
#include <m2lm/io/safetensors_impl.hpp>

#include <algorithm>
#include <iterator>
#include <map>
#include <mutex>
#include <optional>
#include <set>
#include <unordered_map>

namespace m2lm::inline M2LM_ABI {

namespace detail {

/// A tensor that has to be made from what is stored, once, when it is first asked for.
class DeferredTensor {
  GgufModel::Source source_;
  std::once_flag once_;
  AnyTensor tensor_;

 public:
  explicit DeferredTensor(GgufModel::Source source) : source_(std::move(source)) {}
  const AnyTensor& get() {
    std::call_once(once_, [&] { tensor_ = GgufModel::read(source_); });
    return tensor_;
  }
};

}  // namespace detail

struct Checkpoint::State {
  static constexpr std::size_t no_file = static_cast<std::size_t>(-1);
  struct Entry {
    std::size_t file = 0;
    std::optional<AnyTensor> tensor;
    std::string problem = {};  // why there is no tensor: its dtype is not supported
    std::shared_ptr<detail::DeferredTensor> deferred = {};
  };
  std::string directory;
  CheckpointLimits limits;
  std::vector<MappedFile> files;
  std::vector<std::string> names;
  std::unordered_map<std::string, Entry> entries;

  void add(const std::string& name, Entry entry) {
    entries.emplace(name, std::move(entry));
    names.push_back(name);
  }
  const Entry* find(std::string_view name) const {
    const auto found = entries.find(std::string(name));
    return found == entries.end() ? nullptr : &found->second;
  }

  /// Adds the tensors of a file that are in `wanted`, or all. Returns those of `wanted` that the file lacks.
  std::vector<std::string> add_file(const std::string& path, const std::vector<std::string>* wanted) {
    const std::set<std::string_view> chosen = wanted ? std::set<std::string_view>(wanted->begin(), wanted->end()) : std::set<std::string_view>();
    const auto take = [&](const auto& file, auto&& entry_of) {
      files.push_back(file.mapping());
      for (const std::string& name : file.names())
        if (!wanted || chosen.contains(name)) add(name, entry_of(name));
      std::vector<std::string> lacking;
      if (wanted) std::copy_if(wanted->begin(), wanted->end(), std::back_inserter(lacking), [&](const std::string& name) { return !file.contains(name); });
      return lacking;
    };
    const std::size_t number = files.size();
    if (path.ends_with(".bin")) {
      const PytorchFile file = PytorchFile::open(path, limits.pytorch);
      return take(file, [&](const std::string& name) { return Entry{number, file.tensor(name)}; });
    }
    const Safetensors file = Safetensors::open(path, limits.safetensors);
    return take(file, [&](const std::string& name) {
      Entry entry{number, std::nullopt};
      try {
        entry.tensor = file.tensor(name);
      } catch (const CheckpointError& error) {
        entry.problem = error.what();
      }
      return entry;
    });
  }

  void add_gguf(const GgufModel& model) {
    files.push_back(model.text.mapping());
    if (model.vision) files.push_back(model.vision->mapping());
    for (GgufModel::Source& source : model.sources()) {
      const std::size_t file = source.file.path() == files.front().path() ? 0 : 1;
      const std::string name = source.name;
      require<CheckpointError>(!entries.contains(name), files[file].path(), ": tensor \"", source.stored, "\" and another both stand for ", name);
      add(name, Entry{file, std::nullopt, {}, std::make_shared<detail::DeferredTensor>(std::move(source))});
    }
  }

  /// Adds the shards that the index file names.
  void add_shards(const std::string& index);
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

M2LM_IMPL void Checkpoint::State::add_shards(const std::string& index) {
  const ConfigValue map = ConfigValue::parse_file(index, limits.json)["weight_map"];
  const std::string_view extension = index.ends_with(".bin.index.json") ? ".bin" : ".safetensors";
  std::map<std::string, std::vector<std::string>> promised;  // shard -> names
  std::vector<std::string> missing, outside;
  for (const std::string& name : map.keys()) promised[map.get<std::string>(name)].push_back(name);
  for (const auto& [shard, shard_names] : promised) {
    if (shard.find('/') != std::string::npos || shard.find('\\') != std::string::npos || !shard.ends_with(extension))
      outside.push_back(concat("\"", shard, "\" (tensor ", shard_names.front(), ")"));
    else if (!file_exists(join_path(directory, shard)))
      missing.push_back(concat(shard, " (", shard_names.size(), " tensors, among them ", shard_names.front(), ")"));
  }
  require<CheckpointError>(outside.empty(), index, ": weight_map must name ", extension, " files of this directory, found ", detail::list_names(outside));
  require<CheckpointError>(missing.empty(), index, ": shards are missing: ", detail::list_names(missing), "; download the checkpoint again");
  std::vector<std::string> lacking;
  for (const auto& [shard, shard_names] : promised)
    for (const std::string& name : add_file(join_path(directory, shard), &shard_names)) lacking.push_back(concat(name, " (", shard, ")"));
  require<CheckpointError>(lacking.empty(), index, ": tensors are not in the shards that should hold them: ", detail::list_names(lacking));
}

M2LM_IMPL Checkpoint Checkpoint::open(std::string_view directory, const CheckpointLimits& limits) try {
  auto state = std::make_shared<State>();
  state->limits = limits;
  state->directory = std::string(directory);
  const auto finish = [&] {
    Checkpoint out;
    out.state_ = std::move(state);
    return out;
  };
  if (const auto model = GgufModel::find(directory, limits.gguf)) {
    state->add_gguf(*model);
    return finish();
  }
  require<CheckpointError>(directory_exists(directory), directory, ": there is no such directory");
  for (const char* name : {"model.safetensors", "pytorch_model.bin"}) {
    const std::string single = join_path(directory, name), index = single + ".index.json";
    if (file_exists(single)) {
      state->add_file(single, nullptr);
      return finish();
    }
    if (file_exists(index)) {
      state->add_shards(index);
      return finish();
    }
  }
  const std::string meta = join_path(directory, "consolidated.00.pth");
  require<CheckpointError>(!file_exists(meta), meta, ": Meta's own layout is not supported; convert it with transformers' convert_llama_weights_to_hf.py");
  throw CheckpointError(concat(directory, ": holds neither model.safetensors nor pytorch_model.bin, nor the index of one in shards, nor a *.gguf file"));
} catch (const std::bad_alloc&) {
  detail::throw_out_of_memory("the names of a checkpoint's tensors");
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

M2LM_IMPL Checkpoint Checkpoint::joined(const Checkpoint& other) const {
  auto state = std::make_shared<State>(*state_);
  const std::size_t files = state->files.size();
  state->files.insert(state->files.end(), other.state_->files.begin(), other.state_->files.end());
  for (const std::string& name : other.state_->names) {
    if (state->entries.contains(name)) continue;
    State::Entry entry = other.state_->entries.at(name);
    if (entry.file != State::no_file) entry.file += files;
    state->add(name, std::move(entry));
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
  if (entry->deferred) return &entry->deferred->get();
  require<CheckpointError>(entry->tensor.has_value(), entry->problem);
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

M2LM_IMPL std::span<const MappedFile> Checkpoint::files() const { return state_->files; }

M2LM_IMPL std::size_t Checkpoint::total_bytes() const {
  std::size_t sum = 0;
  for (const MappedFile& file : state_->files) sum += file.bytes().size();
  return sum;
}

M2LM_IMPL void Checkpoint::require_intact() const {
  if (!state_) return;  // a model made from a configuration has no files
  for (const MappedFile& file : state_->files) file.require_intact();
}

M2LM_IMPL void Checkpoint::release_pages() const {
  for (const MappedFile& file : state_->files) file.release(0, file.bytes().size());
}

}  // namespace m2lm
