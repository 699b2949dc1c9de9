// Definitions of models/packed_cache.hpp.
// Floor: models. May include: core, ops, layers, parts, io, sampling.
#pragma once

#include <m2lm/models/packed_cache.hpp>
#include <m2lm/ops/linear.hpp>

#include <algorithm>
#include <cstring>

namespace m2lm::inline M2LM_ABI::detail {

namespace packed_cache {

/// Packed matrices begin on a cache line.
inline constexpr std::size_t alignment = 64;
/// What is read of a file's ends to know it again: the headers of all formats lie there.
inline constexpr std::size_t head_bytes = std::size_t{1} << 20, tail_bytes = std::size_t{1} << 16;

/// 64 bits of any bytes: four words at a time, each in a lane of its own. Tells files apart; it is no seal against forgery.
class Hash {
  static constexpr std::uint64_t odd_ = 0x9e3779b97f4a7c15U;  // 2^64 / golden ratio
  std::uint64_t lanes_[4] = {1, 2, 3, 4};

  static std::uint64_t turned(std::uint64_t x) { return x << 29 | x >> 35; }

 public:
  void bytes(std::span<const std::byte> data) {
    const auto add = [this](std::size_t lane, std::uint64_t word) { lanes_[lane] = turned(lanes_[lane] ^ word) * odd_; };
    std::size_t i = 0;
    for (; i + 32 <= data.size(); i += 32) {
      std::uint64_t words[4];
      std::memcpy(words, data.data() + i, sizeof(words));
      for (std::size_t lane = 0; lane < 4; ++lane) add(lane, words[lane]);
    }
    std::uint64_t rest[4] = {0, 0, 0, data.size()};
    for (std::size_t at = 0; i < data.size(); ++i, ++at) rest[at / 8 % 4] ^= std::to_integer<std::uint64_t>(data[i]) << at % 8 * 8;
    for (std::size_t lane = 0; lane < 4; ++lane) add(lane, rest[lane]);
  }
  std::string text() const {
    std::uint64_t x = 0;
    for (const std::uint64_t lane : lanes_) {
      x = (turned(x) ^ lane) * odd_;
      x ^= x >> 32;
    }
    std::string out;
    for (int shift = 60; shift >= 0; shift -= 4) out += "0123456789abcdef"[x >> shift & 15U];
    return out;
  }
};

inline std::string hash_of(std::span<const std::byte> bytes) {
  Hash hash;
  hash.bytes(bytes);
  return hash.text();
}

inline std::string_view file_name(std::string_view path) { return path.substr(path.rfind('/') + 1); }

/// What a file of the checkpoint is known by.
inline std::string description(const MappedFile& file) {
  const std::span<const std::byte> bytes = file.bytes();
  Hash hash;
  hash.bytes(bytes.first(std::min(bytes.size(), head_bytes)));
  hash.bytes(bytes.last(std::min(bytes.size(), tail_bytes)));
  return concat(file_name(file.path()), ", ", bytes.size(), " bytes, changed at ", file_time(file.path()), ", ends ", hash.text());
}

/// Hash of the data of all tensors of a file of packed weights, in their order.
inline std::string data_hash(std::span<const NamedTensor> tensors) {
  Hash hash;
  for (const NamedTensor& t : tensors) hash.bytes({t.tensor.data(), t.tensor.bytes()});
  return hash.text();
}

inline constexpr const char* kind = "packed weights of m2lm";

}  // namespace packed_cache

M2LM_IMPL std::string packed_cache_path(std::string_view checkpoint, std::string_view backend, DType weights) {
  const std::string name = concat("m2lm-packed.", backend, ".", dtype_name(weights), ".safetensors");
  return directory_exists(checkpoint) ? join_path(checkpoint, name) : concat(checkpoint, ".", name);
}

M2LM_IMPL std::string PackedCache::key(std::span<const AnyTensor> sources, DType format, bool gated) const {
  std::int64_t rows = 0;
  std::string names;
  for (const AnyTensor& source : sources) {
    const auto name = names_.find(source.data());
    if (name == names_.end()) return {};
    rows += source.shape()[0];
    names += concat(names.empty() ? " " : " + ", name->second);
  }
  return concat(dtype_name(format), gated ? " gated [" : " [", rows, ", ", ops::columns_of(sources[0].shape()), "]", names);
}

M2LM_IMPL void PackedCache::open(const Checkpoint& checkpoint) {
  const std::string& path = request_.path;
  file_ = Safetensors::open(path);
  const std::map<std::string, std::string>& metadata = file_.metadata();
  const auto require_same = [&](const std::string& name, const std::string& wanted, std::string_view what) {
    const auto found = metadata.find(name);
    const std::string held = found == metadata.end() ? "nothing" : concat("\"", found->second, "\"");
    require<CheckpointError>(found != metadata.end() && found->second == wanted, path, ": ", what, ": it says ", held, ", expected \"", wanted,
                             "\"; write it again with m2lm-pack");
  };
  require_same("kind", packed_cache::kind, "is no file of packed weights");
  require_same("backend", std::string(request_.backend), "was packed for another backend");
  require_same("version", std::to_string(request_.version), "was packed by another version of the library");
  const std::span<const MappedFile> files = checkpoint.files();
  require_same("files", std::to_string(files.size()), "was packed from other files");
  for (std::size_t i = 0; i < files.size(); ++i) {
    require_same(concat("file ", i), packed_cache::description(files[i]), "was packed from other files, or they have changed since");
    if (request_.in_full) require_same(concat("content ", i), packed_cache::hash_of(files[i].bytes()), "was packed from other contents");
  }
  std::vector<NamedTensor> tensors;
  for (const std::string& name : file_.names()) {
    const AnyTensor tensor = file_.tensor(name);
    require<CheckpointError>(tensor.dtype() == DType::u8 && tensor.shape().rank() == 1 && reinterpret_cast<std::uintptr_t>(tensor.data()) % packed_cache::alignment == 0,
                             path, ": \"", name, "\" is no packed matrix; write the file again with m2lm-pack");
    if (request_.in_full) tensors.push_back({name, tensor});
    const std::string_view text = name;
    const std::size_t names = text.find("] ");
    if (names == std::string_view::npos) continue;
    const std::string_view format = text.substr(0, text.find(' '));
    for (std::size_t at = names + 2; at <= text.size();) {
      const std::size_t end = std::min(text.find(" + ", at), text.size());
      held_.insert(concat(format, " ", text.substr(at, end - at)));
      at = end + 3;
    }
  }
  if (request_.in_full) require_same("content", packed_cache::data_hash(tensors), "its weights are damaged");
  file_.mapping().require_intact();
  open_ = true;
}

M2LM_IMPL std::string PackedCache::start(const PackedCacheRequest& request, std::span<const NamedParameter> parameters, const Checkpoint& checkpoint) {
  request_ = request;
  if (request.mode == PackedCacheMode::ignored) return {};
  const bool from_files = checkpoint.has_files();
  require<CheckpointError>(from_files || request.mode == PackedCacheMode::when_valid, "m2lm: a model that was made from a configuration has no file of packed weights");
  if (!from_files) return {};
  const bool there = file_exists(request.path);
  require<CheckpointError>(there || request.mode != PackedCacheMode::required, request.path, ": there is no such file; write it with m2lm-pack");
  if (!there && request.mode == PackedCacheMode::when_valid) return {};
  for (const NamedParameter& p : parameters)
    if (p.parameter->shape.rank() >= 2) names_.emplace(p.parameter->value.data(), p.name);
  if (request.mode == PackedCacheMode::written) return {};
  try {
    open(checkpoint);
  } catch (const CheckpointError& error) {
    if (request.mode == PackedCacheMode::required) throw;
    file_ = {};
    held_.clear();
    return error.what();
  }
  return {};
}

M2LM_IMPL bool PackedCache::holds(std::string_view name, DType format) const { return open_ && held_.contains(concat(dtype_name(format), " ", name)); }

M2LM_IMPL PackedMatrix PackedCache::find(std::span<const AnyTensor> sources, DType format, bool gated, std::size_t bytes) const {
  const std::string name = open_ ? key(sources, format, gated) : std::string();
  if (name.empty() || !file_.contains(name)) return {};
  const AnyTensor held = file_.tensor(name);
  if (held.bytes() != bytes) return {};
  PackedMatrix out{.format = format, .rows = 0, .cols = ops::columns_of(sources[0].shape()), .gated = gated, .data = {}, .bytes = bytes};
  for (const AnyTensor& source : sources) out.rows += source.shape()[0];
  out.data = std::shared_ptr<const std::byte>(held.owner(), held.data());
  return out;
}

M2LM_IMPL void PackedCache::keep(std::span<const AnyTensor> sources, const PackedMatrix& matrix) {
  const std::string name = key(sources, matrix.format, matrix.gated);
  if (name.empty() || matrix.bytes == 0 || !made_names_.insert(name).second) return;
  made_.push_back({name, AnyTensor(DType::u8, Shape{static_cast<std::int64_t>(matrix.bytes)}, matrix.data.get(), matrix.data)});
}

M2LM_IMPL void PackedCache::write(const Checkpoint& checkpoint) const {
  const std::span<const MappedFile> files = checkpoint.files();
  std::map<std::string, std::string> metadata{{"kind", packed_cache::kind},
                                              {"backend", std::string(request_.backend)},
                                              {"version", std::to_string(request_.version)},
                                              {"files", std::to_string(files.size())},
                                              {"content", packed_cache::data_hash(made_)}};
  for (std::size_t i = 0; i < files.size(); ++i) {
    metadata[concat("file ", i)] = packed_cache::description(files[i]);
    metadata[concat("content ", i)] = packed_cache::hash_of(files[i].bytes());
  }
  checkpoint.require_intact();
  write_safetensors(request_.path, made_, metadata, packed_cache::alignment);
}

M2LM_IMPL void PackedCache::require_intact() const {
  if (open_) file_.mapping().require_intact();
}

}  // namespace m2lm::detail
