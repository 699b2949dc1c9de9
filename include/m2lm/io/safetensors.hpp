// The safetensors container: a strict, memory-mapped reader and an atomic writer.
// Floor: io. May include: core, interop.
#pragma once

#include <m2lm/core/tensor.hpp>
#include <m2lm/io/file.hpp>

#include <cstddef>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace m2lm::inline M2LM_ABI {

/// A tensor under the name that a file gives it.
struct NamedTensor {
  std::string name;
  AnyTensor tensor;
};

/// What is read of a header. A file beyond a limit is refused with an error that names the limit.
struct SafetensorsLimits {
  std::size_t max_header_bytes = 100'000'000;         ///< the format's own limit
  std::size_t max_tensors = std::size_t{1} << 20;     ///< in one file
  std::size_t max_name_bytes = std::size_t{1} << 16;  ///< of a tensor's name
};

/// One *.safetensors file. Source: the format description of the safetensors project: an 8-byte little-endian header length, a
/// JSON header, then the data, which the tensors cover without gap or overlap.
class Safetensors {
  struct File;
  std::shared_ptr<const File> file_;

 public:
  Safetensors() = default;
  /// Maps the file and checks the whole header. throws CheckpointError naming the file, the tensor and both sides of a
  /// contradiction. A dtype that the library does not know is an error only when that tensor is asked for.
  static Safetensors open(std::string_view path, const SafetensorsLimits& limits = {});

  /// As it was opened.
  const std::string& path() const { return mapping().path(); }
  /// In the order of their data in the file.
  std::span<const std::string> names() const;
  /// Whether the file has a tensor of that name.
  bool contains(std::string_view name) const;
  /// The tensor's shape and a view of the mapped bytes, which stay valid as long as the AnyTensor lives. The data may be
  /// unaligned: read it with AnyTensor's copies. throws CheckpointError for an unknown name (with the nearest one) or dtype.
  AnyTensor tensor(std::string_view name) const;
  /// Nothing when the dtype is one the library does not know. throws CheckpointError for an unknown name.
  std::optional<DType> dtype(std::string_view name) const;
  /// The "__metadata__" of the header.
  const std::map<std::string, std::string>& metadata() const;
  /// Size of the file.
  std::size_t bytes() const { return mapping().bytes().size(); }
  /// The file as it lies in memory.
  const MappedFile& mapping() const;
};

/// Writes the tensors in the given order, atomically; the data of the first begin on a multiple of `alignment` bytes (8 or more times 8).
/// requires distinct names, none "__metadata__".
/// throws CheckpointError on such a name, on a tensor without value, and as FileWriter does.
void write_safetensors(std::string_view path, std::span<const NamedTensor> tensors,
                       const std::map<std::string, std::string>& metadata = {}, std::size_t alignment = 8);

namespace detail {

/// The candidate that takes the fewest single-character changes to become `name`; empty when there is none.
std::string nearest_name(std::string_view name, std::span<const std::string> candidates);

}  // namespace detail

}  // namespace m2lm
