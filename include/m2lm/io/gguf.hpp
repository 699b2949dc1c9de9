// The GGUF container: a strict, memory-mapped reader, and the block formats of its tensors.
// Floor: io. May include: core, interop.
#pragma once

#include <m2lm/core/tensor.hpp>
#include <m2lm/io/config.hpp>
#include <m2lm/io/file.hpp>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>

namespace m2lm::inline M2LM_ABI {

/// Element types of GGUF tensors, by their numbers in the file. Those that are not plain numbers come in blocks.
enum class GgufType : std::uint32_t {
  f32 = 0,
  f16 = 1,
  q4_0 = 2,
  q4_1 = 3,
  q5_0 = 6,
  q5_1 = 7,
  q8_0 = 8,
  q2_k = 10,
  q3_k = 11,
  q4_k = 12,
  q5_k = 13,
  q6_k = 14,
  i8 = 24,
  i16 = 25,
  i32 = 26,
  i64 = 27,
  f64 = 28,
  bf16 = 30,
};

/// How a type is stored.
struct GgufFormat {
  GgufType type;
  std::string_view name;     ///< as llama.cpp prints it
  std::size_t block = 1;     ///< elements of a block
  std::size_t bytes = 0;     ///< bytes of a block
  DType dtype = DType::f32;  ///< what `Gguf::tensor` gives; f32 for blocks that DType has not
  bool quantised = false;

  /// Whether a tensor of the type is read where it is in the file.
  constexpr bool in_place() const { return !quantised || is_block_format(dtype); }
};

/// nullptr for a number that stands for no type we read.
const GgufFormat* find_gguf_format(std::uint32_t type);

/// The elements of whole blocks as f32, each rounded once. requires a quantised type, blocks of `out.size()` elements: a multiple of the
/// format's block. source: the block layouts of ggml-quants (ggml, MIT), checked against PyPI's `gguf`.
void dequantise_gguf(GgufType type, const std::byte* blocks, std::span<float> out);

/// What a file may ask for; more is refused before anything is allocated for it.
struct GgufLimits {
  std::size_t max_keys = std::size_t{1} << 16;            ///< metadata entries
  std::size_t max_tensors = std::size_t{1} << 16;         ///< in one file
  std::size_t max_name_bytes = std::size_t{1} << 16;      ///< of a key or a tensor's name; the format's own limit for keys
  std::size_t max_string_bytes = std::size_t{1} << 24;    ///< of a value
  std::size_t max_array_elements = std::size_t{1} << 22;  ///< of all arrays together
  int max_array_nesting = 4;                              ///< arrays of arrays
};

/// One *.gguf file of version 2 or 3, little-endian. source: the format description of the ggml project: a header, metadata as typed
/// key-value pairs, descriptions of tensors, then their data, aligned.
class Gguf {
  struct File;
  std::shared_ptr<const File> file_;

 public:
  Gguf() = default;
  /// Maps the file and checks everything before the data. throws CheckpointError naming the file, the key or tensor and both sides of
  /// a contradiction. A type that the library does not know is an error only when that tensor is asked for.
  static Gguf open(std::string_view path, const GgufLimits& limits = {});

  /// As it was opened.
  const std::string& path() const;
  /// Of the format: 2 or 3.
  std::uint32_t version() const;
  /// An object of all keys as they are written, "llama.block_count": metadata().get<int>("llama.block_count"). An f32 is the shortest
  /// decimal number that stands for it.
  const ConfigValue& metadata() const;
  /// In the order of their data in the file.
  std::span<const std::string> names() const;
  /// Whether the file has a tensor of that name.
  bool contains(std::string_view name) const;
  /// The extents, the slowest first (the file has them the other way round). throws CheckpointError for an unknown name.
  const Shape& shape(std::string_view name) const;
  /// nullptr for a type we do not read. throws CheckpointError for an unknown name.
  const GgufFormat* format(std::string_view name) const;
  /// Plain numbers, and blocks that DType has (Q8_0 and Q4_0 as q8 and q4): a view of the mapped bytes, which stay valid as long as the
  /// AnyTensor lives. Other blocks: a new f32 tensor.
  /// throws CheckpointError for an unknown name (with the nearest one) or type.
  AnyTensor tensor(std::string_view name) const;
  /// The file itself.
  const MappedFile& mapping() const;
};

}  // namespace m2lm
