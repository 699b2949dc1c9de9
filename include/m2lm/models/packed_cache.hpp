// Packed weights in a file, which loading maps instead of packing again (docs/design/006-packed-cache.md).
// Floor: models. May include: core, ops, layers, parts, io, sampling.
#pragma once

#include <m2lm/core/packed.hpp>
#include <m2lm/io/checkpoint.hpp>
#include <m2lm/models/loader.hpp>

#include <cstddef>
#include <cstdint>
#include <map>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace m2lm::inline M2LM_ABI {

/// What loading does with a file of packed weights.
enum class PackedCacheMode : std::uint8_t {
  when_valid,  ///< use it if it is there and fits the checkpoint; if it does not, pack, and LoadReport::packed_cache says why
  required,    ///< CheckpointError unless it is there and fits
  ignored,     ///< do not look
  written,     ///< pack, and write the file
};

namespace detail {

/// What a file of packed weights is looked for and judged by.
struct PackedCacheRequest {
  PackedCacheMode mode = PackedCacheMode::when_valid;
  std::string path;               ///< of the file
  std::string_view backend;       ///< whose form the weights are in, and its version
  int version = 0;
  bool in_full = false;           ///< compare the contents of all files, not only their sizes, times and ends
};

/// "DIR/m2lm-packed.cpu.q4.safetensors", or "FILE.m2lm-packed.cpu.q4.safetensors" beside a checkpoint in one file.
std::string packed_cache_path(std::string_view checkpoint, std::string_view backend, DType weights);

/// A matrix is found by the parameters that it was packed from: those of a model, whose values share the checkpoint's bytes. What has
/// other bytes (a parameter that an adapter was merged into) is not in it.
class PackedCache {
  PackedCacheRequest request_;
  Safetensors file_;
  bool open_ = false;
  std::map<const std::byte*, std::string> names_;  // of the parameters' values
  std::set<std::string, std::less<>> held_;        // "format name" of each parameter in the file
  std::vector<NamedTensor> made_;
  std::set<std::string> made_names_;

  std::string key(std::span<const AnyTensor> sources, DType format, bool gated) const;
  void open(const Checkpoint& checkpoint);

 public:
  /// requires parameters bound to the checkpoint. Returns why a file that is there is not used, or nothing. throws CheckpointError as the
  /// mode says, and for a checkpoint without files where one is to be written.
  std::string start(const PackedCacheRequest& request, std::span<const NamedParameter> parameters, const Checkpoint& checkpoint);

  bool reads() const { return open_; }
  bool writes() const { return request_.mode == PackedCacheMode::written; }
  /// Whether a parameter lies in the file in this format, alone or with others.
  bool holds(std::string_view name, DType format) const;
  /// A view of the mapped bytes; empty when the file has no such matrix of `bytes` bytes.
  PackedMatrix find(std::span<const AnyTensor> sources, DType format, bool gated, std::size_t bytes) const;
  /// Notes what has been packed.
  void keep(std::span<const AnyTensor> sources, const PackedMatrix& matrix);
  /// Writes what was noted, atomically. throws as write_safetensors.
  void write(const Checkpoint& checkpoint) const;
  /// As Checkpoint::require_intact.
  void require_intact() const;
};

}  // namespace detail
}  // namespace m2lm
