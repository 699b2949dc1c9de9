// Definitions of io/gguf.hpp.
// Floor: io. May include: core, interop.
#pragma once

#include <m2lm/io/config_impl.hpp>
#include <m2lm/io/file_impl.hpp>
#include <m2lm/io/gguf.hpp>
#include <m2lm/io/safetensors_impl.hpp>

#include <algorithm>
#include <array>
#include <bit>
#include <charconv>
#include <cstring>
#include <limits>
#include <new>
#include <unordered_map>
#include <utility>
#include <vector>

namespace m2lm::inline M2LM_ABI {

namespace detail {

inline constexpr std::array<GgufFormat, 18> gguf_formats{{
    {GgufType::f32, "F32", 1, 4, DType::f32, false},
    {GgufType::f16, "F16", 1, 2, DType::f16, false},
    {GgufType::bf16, "BF16", 1, 2, DType::bf16, false},
    {GgufType::f64, "F64", 1, 8, DType::f64, false},
    {GgufType::i8, "I8", 1, 1, DType::i8, false},
    {GgufType::i16, "I16", 1, 2, DType::i16, false},
    {GgufType::i32, "I32", 1, 4, DType::i32, false},
    {GgufType::i64, "I64", 1, 8, DType::i64, false},
    {GgufType::q4_0, "Q4_0", 32, 18, DType::q4, true},
    {GgufType::q4_1, "Q4_1", 32, 20, DType::f32, true},
    {GgufType::q5_0, "Q5_0", 32, 22, DType::f32, true},
    {GgufType::q5_1, "Q5_1", 32, 24, DType::f32, true},
    {GgufType::q8_0, "Q8_0", 32, 34, DType::q8, true},
    {GgufType::q2_k, "Q2_K", 256, 84, DType::f32, true},
    {GgufType::q3_k, "Q3_K", 256, 110, DType::f32, true},
    {GgufType::q4_k, "Q4_K", 256, 144, DType::f32, true},
    {GgufType::q5_k, "Q5_K", 256, 176, DType::f32, true},
    {GgufType::q6_k, "Q6_K", 256, 210, DType::f32, true},
}};

/// Reads a block from its beginning to its end.
class BlockReader {
  const std::byte* at_;

 public:
  explicit BlockReader(const std::byte* block) : at_(block) {}
  float half() {
    std::uint16_t bits = 0;
    std::memcpy(&bits, std::exchange(at_, at_ + 2), 2);
    return to_float(Half{bits});
  }
  const std::uint8_t* array(std::size_t n) { return reinterpret_cast<const std::uint8_t*>(std::exchange(at_, at_ + n)); }
};

// In all formats a product of the scales and a quantised value has at most 24 significant bits. So it is exact in f32, each element is
// rounded once (where a minimum is added), and it makes no difference whether the compiler contracts the sum into an fma.

/// Q4_1, Q5_0, Q5_1: 32 values, of which byte j of `quants` has number j in its low half and number j + 16 in its high half; a
/// fifth bit comes from a word. With a minimum, or around the middle.
template <bool fifth_bit, bool minimum>
void dequantise_pairs(BlockReader in, float* out) {
  const float scale = in.half();
  const float least = minimum ? in.half() : 0.0F;
  const auto value = [&](unsigned q) {
    return minimum ? scale * static_cast<float>(q) + least : scale * static_cast<float>(static_cast<int>(q) - (fifth_bit ? 16 : 8));
  };
  std::uint32_t high = 0;
  if constexpr (fifth_bit) std::memcpy(&high, in.array(4), 4);
  const std::uint8_t* quants = in.array(16);
  for (unsigned j = 0; j < 16; ++j) {
    const unsigned low_value = (quants[j] & 15U) | (high >> j & 1U) << 4U;
    const unsigned high_value = static_cast<unsigned>(M2LM_FAULT(46) ? quants[j] & 15U : quants[j] >> 4U) | (high >> (j + 16) & 1U) << 4U;
    out[j] = value(low_value);
    out[j + 16] = value(high_value);
  }
}

/// Q8_0, Q4_0: the library's own blocks.
template <class Block>
void dequantise_own(BlockReader in, float* out) {
  dequantise<Block>(reinterpret_cast<const std::byte*>(in.array(sizeof(Block))), 0, block_values, out);
}

/// The 6-bit scale and minimum of stretch j of 8, packed in 12 bytes (Q4_K, Q5_K).
inline std::pair<float, float> packed_scale(const std::uint8_t* packed, std::size_t j) {
  unsigned scale = 0, minimum = 0;
  if (j < 4) {
    scale = packed[j] & 63U;
    minimum = packed[j + 4] & 63U;
  } else {
    scale = (packed[j + 4] & 15U) | static_cast<unsigned>(packed[j - 4] >> 6U) << 4U;
    minimum = static_cast<unsigned>(packed[j + 4] >> 4U) | static_cast<unsigned>(packed[j] >> 6U) << 4U;
  }
  return {static_cast<float>(scale), static_cast<float>(M2LM_FAULT(47) ? minimum & 15U : minimum)};
}

/// Q4_K, Q5_K: 8 stretches of 32 values with a scale and a minimum each.
template <bool fifth_bit>
void dequantise_k_pairs(BlockReader in, float* out) {
  const float scale = in.half(), least = in.half();
  const std::uint8_t* packed = in.array(12);
  const std::uint8_t* high = fifth_bit ? in.array(32) : nullptr;
  const std::uint8_t* quants = in.array(128);
  for (std::size_t stretch = 0; stretch < 8; ++stretch) {
    const auto [s, m] = packed_scale(packed, stretch);
    const float d = scale * s, minimum = least * m;
    const std::uint8_t* bytes = quants + 32 * (stretch / 2);
    for (std::size_t i = 0; i < 32; ++i) {
      unsigned q = stretch % 2 == 0 ? bytes[i] & 15U : static_cast<unsigned>(bytes[i] >> 4U);
      if constexpr (fifth_bit) q |= (static_cast<unsigned>(high[i]) >> stretch & 1U) << 4U;
      *out++ = d * static_cast<float>(q) - minimum;
    }
  }
}

/// Q2_K: 16 stretches of 16 values of 2 bits, with 4 bits of scale and of minimum each.
inline void dequantise_q2_k(BlockReader in, float* out) {
  const std::uint8_t* scales = in.array(16);
  const std::uint8_t* quants = in.array(64);
  const float scale = in.half(), least = in.half();
  for (std::size_t stretch = 0; stretch < 16; ++stretch) {
    const float d = scale * static_cast<float>(scales[stretch] & 15U), minimum = least * static_cast<float>(scales[stretch] >> 4U);
    const std::uint8_t* bytes = quants + 32 * (stretch / 8) + 16 * (stretch % 2);
    const auto shift = static_cast<unsigned>(stretch % 8 / 2 * 2);
    for (std::size_t i = 0; i < 16; ++i) *out++ = d * static_cast<float>(static_cast<unsigned>(bytes[i]) >> shift & 3U) - minimum;
  }
}

/// Q3_K: 16 stretches of 16 values of 2 + 1 bits with a signed 6-bit scale; the third bit is set where 4 is not subtracted.
inline void dequantise_q3_k(BlockReader in, float* out) {
  const std::uint8_t* high = in.array(32);
  const std::uint8_t* quants = in.array(64);
  const std::uint8_t* packed = in.array(12);
  const float scale = in.half();
  for (std::size_t stretch = 0; stretch < 16; ++stretch) {
    const unsigned low_bits = stretch < 8 ? packed[stretch] & 15U : static_cast<unsigned>(packed[stretch - 8] >> 4U);
    const unsigned high_bits = static_cast<unsigned>(packed[8 + stretch % 4]) >> (stretch / 4 * 2) & 3U;
    const float d = scale * static_cast<float>(static_cast<int>(low_bits | high_bits << 4U) - 32);
    const std::size_t first = 16 * (stretch % 2);
    const std::uint8_t* bytes = quants + 32 * (stretch / 8) + first;
    const auto shift = static_cast<unsigned>(stretch % 8 / 2 * 2), bit = static_cast<unsigned>(stretch / 2);
    for (std::size_t i = 0; i < 16; ++i) {
      const int q = static_cast<int>(static_cast<unsigned>(bytes[i]) >> shift & 3U) - (static_cast<unsigned>(high[first + i]) >> bit & 1U ? 0 : 4);
      *out++ = d * static_cast<float>(q);
    }
  }
}

/// Q6_K: two halves of 128 values of 4 + 2 bits; 16 stretches of 16 with a signed 8-bit scale.
inline void dequantise_q6_k(BlockReader in, float* out) {
  const std::uint8_t* low = in.array(128);
  const std::uint8_t* high = in.array(64);
  const std::uint8_t* scales = in.array(16);
  const float scale = in.half();
  for (std::size_t part = 0; part < 8; ++part) {  // 32 values: two stretches
    const std::size_t half = part / 4, quarter = part % 4;
    const std::uint8_t* low_bytes = low + 64 * half + 32 * (quarter % 2);
    const std::uint8_t* high_bytes = high + 32 * half;
    for (std::size_t i = 0; i < 32; ++i) {
      const unsigned nibble = quarter < 2 ? low_bytes[i] & 15U : static_cast<unsigned>(low_bytes[i] >> 4U);
      const unsigned q = nibble | (static_cast<unsigned>(high_bytes[i]) >> (2 * quarter) & 3U) << 4U;
      const float d = scale * static_cast<float>(static_cast<std::int8_t>(scales[2 * part + i / 16]));
      *out++ = d * static_cast<float>(static_cast<int>(q) - 32);
    }
  }
}

}  // namespace detail

M2LM_IMPL const GgufFormat* find_gguf_format(std::uint32_t type) {
  for (const GgufFormat& format : detail::gguf_formats)
    if (static_cast<std::uint32_t>(format.type) == type) return &format;
  return nullptr;
}

M2LM_IMPL void dequantise_gguf(GgufType type, const std::byte* blocks, std::span<float> out) {
  void (*block)(detail::BlockReader, float*) = nullptr;
  switch (type) {
    case GgufType::q4_0: block = detail::dequantise_own<Q4Block>; break;
    case GgufType::q4_1: block = detail::dequantise_pairs<false, true>; break;
    case GgufType::q5_0: block = detail::dequantise_pairs<true, false>; break;
    case GgufType::q5_1: block = detail::dequantise_pairs<true, true>; break;
    case GgufType::q8_0: block = detail::dequantise_own<Q8Block>; break;
    case GgufType::q2_k: block = detail::dequantise_q2_k; break;
    case GgufType::q3_k: block = detail::dequantise_q3_k; break;
    case GgufType::q4_k: block = detail::dequantise_k_pairs<false>; break;
    case GgufType::q5_k: block = detail::dequantise_k_pairs<true>; break;
    case GgufType::q6_k: block = detail::dequantise_q6_k; break;
    case GgufType::f32:
    case GgufType::f16:
    case GgufType::bf16:
    case GgufType::f64:
    case GgufType::i8:
    case GgufType::i16:
    case GgufType::i32:
    case GgufType::i64: break;
  }
  require(block != nullptr, "m2lm::dequantise_gguf: type ", static_cast<std::uint32_t>(type), " is not quantised");
  const GgufFormat& format = *find_gguf_format(static_cast<std::uint32_t>(type));
  require(out.size() % format.block == 0, "m2lm::dequantise_gguf: ", out.size(), " elements are no whole blocks of ", format.block);
  for (std::size_t i = 0; i < out.size() / format.block; ++i) block(detail::BlockReader(blocks + i * format.bytes), out.data() + i * format.block);
}

struct Gguf::File {
  struct Entry {
    std::uint32_t type = 0;
    const GgufFormat* format = nullptr;
    Shape shape;
    std::size_t begin = 0, bytes = 0;  // in the file; 0 bytes when the type is not known
  };
  MappedFile mapping;
  std::uint32_t version = 0;
  ConfigValue metadata;
  std::vector<std::string> names;
  std::unordered_map<std::string, Entry> entries;

  const Entry& entry(std::string_view name) const {
    const auto found = entries.find(std::string(name));
    if (found == entries.end()) {
      const std::string nearest = detail::nearest_name(name, names);
      throw CheckpointError(concat(mapping.path(), ": has no tensor \"", name, "\"", nearest.empty() ? "" : "; the nearest name is \"", nearest,
                                   nearest.empty() ? "" : "\""));
    }
    return found->second;
  }
};

namespace detail {

/// Walks over the bytes before the data; every step is checked against the end of the file.
class GgufCursor {
  std::span<const std::byte> bytes_;
  std::string_view path_;
  const GgufLimits& limits_;
  std::size_t at_ = 0, elements_ = 0;  // elements of all arrays so far

 public:
  // Numbers of the value types.
  enum Value : std::uint32_t { u8, i8, u16, i16, u32, i32, f32, boolean, string, array, u64, i64, f64 };

  GgufCursor(std::span<const std::byte> bytes, std::string_view path, const GgufLimits& limits) : bytes_(bytes), path_(path), limits_(limits) {}

  std::size_t position() const { return at_; }
  std::size_t rest() const { return bytes_.size() - at_; }

  template <class... What>
  [[noreturn]] void fail(const What&... what) const {
    throw CheckpointError(concat(path_, ": ", what...));
  }

  const std::byte* take(std::uint64_t n, std::string_view what) {
    if (n > rest()) fail(what, " takes ", n, " bytes at byte ", at_, ", the file has ", rest(), " left: it is truncated or damaged");
    const std::byte* begin = bytes_.data() + at_;
    at_ += static_cast<std::size_t>(n);
    return begin;
  }
  template <class T>
  T number(std::string_view what) {
    T value{};
    std::memcpy(&value, take(sizeof(T), what), sizeof(T));
    return value;
  }
  std::string text(std::size_t most, std::string_view what) {
    const auto length = number<std::uint64_t>(what);
    if (length > most) fail(what, " has ", length, " bytes, more than the ", most, " allowed: damaged, or raise the limit");
    return std::string(reinterpret_cast<const char*>(take(length, what)), static_cast<std::size_t>(length));
  }
  /// How many of a thing there are, of which each takes at least `least` bytes.
  std::size_t count(std::size_t most, std::size_t least, std::string_view what) {
    const auto n = number<std::uint64_t>(what);
    if (n > most) fail("claims ", n, " ", what, ", more than the ", most, " allowed: damaged, or raise the limit");
    if (n > rest() / least) fail("claims ", n, " ", what, ", the ", rest(), " bytes that are left cannot hold them: it is truncated or damaged");
    return static_cast<std::size_t>(n);
  }

  /// What was a decimal number before it was written as f32: 1e-5, not 9.99999974e-06. So constants are those of the model's own files.
  static double shortest(float stored) {
    char digits[40];
    const auto end = std::to_chars(digits, digits + sizeof(digits), stored).ptr;
    double value = 0;
    const auto read = std::from_chars(digits, end, value);
    return read.ec == std::errc() && static_cast<float>(value) == stored ? value : static_cast<double>(stored);
  }

  Json value(std::uint32_t type, const std::string& key, int nesting = 0) {
    switch (type) {
      case u8: return number<std::uint8_t>(key);
      case i8: return number<std::int8_t>(key);
      case u16: return number<std::uint16_t>(key);
      case i16: return number<std::int16_t>(key);
      case u32: return number<std::uint32_t>(key);
      case i32: return number<std::int32_t>(key);
      case u64: return number<std::uint64_t>(key);
      case i64: return number<std::int64_t>(key);
      case f32: return shortest(number<float>(key));
      case f64: return number<double>(key);
      case boolean: {
        const auto byte = number<std::uint8_t>(key);
        if (byte > 1) fail(key, ": a truth value must be 0 or 1, found ", static_cast<unsigned>(byte));
        return byte == 1;
      }
      case string: return text(limits_.max_string_bytes, key);
      case array: break;
      default: fail(key, ": type ", type, " is none of the value types, 0 to 12");
    }
    if (nesting >= limits_.max_array_nesting) fail(key, ": arrays are nested deeper than ", limits_.max_array_nesting, " levels");
    const auto element = number<std::uint32_t>(key);
    constexpr std::array<std::size_t, 13> least{1, 1, 2, 2, 4, 4, 4, 1, 8, 12, 8, 8, 8};
    if (element >= least.size()) fail(key, ": type ", element, " is none of the value types, 0 to 12");
    const std::size_t n = count(limits_.max_array_elements - elements_, least[element], concat("elements of ", key));
    elements_ += n;
    Json::array_t out;
    out.reserve(n);
    for (std::size_t i = 0; i < n; ++i) out.push_back(value(element, key, nesting + 1));
    return out;
  }
};

}  // namespace detail

M2LM_IMPL Gguf Gguf::open(std::string_view path, const GgufLimits& limits) try {
  auto file = std::make_shared<File>();
  file->mapping = MappedFile::open(path);
  const auto bytes = file->mapping.bytes();
  detail::GgufCursor in(bytes, path, limits);

  if (bytes.size() < 24) in.fail("a GGUF file begins with 24 bytes of header, the file has ", bytes.size(), ": it is truncated or not a GGUF file");
  if (std::memcmp(in.take(4, "the header"), "GGUF", 4) != 0) in.fail("does not begin with \"GGUF\": damaged or not a GGUF file");
  file->version = in.number<std::uint32_t>("the version");
  if (file->version != 0 && (file->version & 0xffffU) == 0) in.fail("is big-endian, which is not supported; convert it again on this machine");
  if (file->version < 2 || file->version > 3) in.fail("is of GGUF version ", file->version, "; versions 2 and 3 are supported");
  const std::size_t tensor_count = in.count(limits.max_tensors, 24, "tensors");
  const std::size_t key_count = in.count(limits.max_keys, 13, "keys");

  auto document = std::make_shared<ConfigValue::Document>();
  document->file = std::string(path);
  document->root = detail::Json::object();
  for (std::size_t i = 0; i < key_count; ++i) {
    const std::string key = in.text(limits.max_name_bytes, concat("the name of key ", i));
    const auto type = in.number<std::uint32_t>(key);
    if (document->root.contains(key)) in.fail("the key \"", key, "\" is there twice");
    document->root[key] = in.value(type, key);
  }
  file->metadata.value_ = &document->root;
  file->metadata.document_ = std::move(document);
  const auto alignment = file->metadata.get_or<std::uint32_t>("general.alignment", 32);
  if (!std::has_single_bit(alignment) || alignment > (1U << 20U)) in.fail("general.alignment = ", alignment, " is not a power of two up to 2^20");

  for (std::size_t i = 0; i < tensor_count; ++i) {
    const std::string name = in.text(limits.max_name_bytes, concat("the name of tensor ", i));
    const auto fail = [&](const auto&... what) { in.fail("tensor \"", name, "\": ", what...); };
    if (file->entries.contains(name)) fail("is there twice");
    const std::string what = concat("the description of tensor \"", name, "\"");
    const auto rank = in.number<std::uint32_t>(what);
    if (rank > 4) fail("has ", rank, " dimensions, at most 4 are possible");
    std::array<std::int64_t, 4> extents{};
    std::uint64_t elements = 1, product = 1;  // the product of all but zeros: in whatever order they are multiplied, it is the largest
    for (std::size_t d = rank; d-- > 0;) {
      const auto extent = in.number<std::uint64_t>(what);
      if (__builtin_mul_overflow(product, std::max<std::uint64_t>(extent, 1), &product) ||
          product > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max()))
        fail("has more elements than can be counted");
      elements *= extent;
      extents[d] = static_cast<std::int64_t>(extent);
    }
    File::Entry entry;
    entry.shape = Shape(std::span<const std::int64_t>(extents.data(), rank));
    entry.type = in.number<std::uint32_t>(what);
    entry.format = find_gguf_format(entry.type);
    const auto offset = in.number<std::uint64_t>(what);
    if (offset % alignment != 0) fail("its data begin at byte ", offset, " of the data, which is no multiple of the alignment ", alignment);
    if (offset > bytes.size()) fail("its data begin at byte ", offset, " of the data, the file has ", bytes.size(), " bytes");
    entry.begin = static_cast<std::size_t>(offset);  // of the data, whose place is known only behind the last description
    if (entry.format != nullptr) {
      const std::size_t row = rank == 0 ? 1 : static_cast<std::size_t>(extents[rank - 1]);
      if (row % entry.format->block != 0)
        fail("rows of ", row, " elements are no whole blocks of ", entry.format->block, ", which ", entry.format->name, " comes in");
      std::uint64_t size = 0;
      if (__builtin_mul_overflow(elements / entry.format->block, static_cast<std::uint64_t>(entry.format->bytes), &size) || size > bytes.size())
        fail("shape ", entry.shape.string(), " of ", entry.format->name, " takes more bytes than the ", bytes.size(),
             " of the file: it is truncated");
      entry.bytes = static_cast<std::size_t>(size);
    }
    file->names.push_back(name);
    file->entries.emplace(name, entry);
  }

  const std::size_t data_begin = (in.position() + alignment - 1) / alignment * alignment;
  for (auto& [name, entry] : file->entries) {
    if (tensor_count != 0 &&
        (data_begin > bytes.size() || entry.begin > bytes.size() - data_begin || entry.bytes > bytes.size() - data_begin - entry.begin))
      in.fail("tensor \"", name, "\": its ", entry.bytes, " bytes begin at byte ", entry.begin, " of the data, the file holds ",
              bytes.size() - std::min(bytes.size(), data_begin), " bytes of data: it is truncated");
    entry.begin += data_begin;
  }
  const auto position = [&](const std::string& name) {
    const File::Entry& entry = file->entries.at(name);
    return std::pair(entry.begin, entry.bytes);
  };
  std::sort(file->names.begin(), file->names.end(),
            [&](const std::string& a, const std::string& b) { return position(a) != position(b) ? position(a) < position(b) : a < b; });
  // Tensors that share their bytes would let a small file ask for any amount of memory.
  std::size_t covered = 0;
  std::string_view before;
  for (const std::string& name : file->names) {
    const auto [begin, size] = position(name);
    if (size != 0 && begin < covered) in.fail("tensor \"", name, "\" begins inside tensor \"", before, "\"");
    if (size == 0) continue;
    covered = begin + size;
    before = name;
  }
  file->mapping.require_intact();
  Gguf out;
  out.file_ = std::move(file);
  return out;
} catch (const std::bad_alloc&) {
  detail::throw_out_of_memory("the description of a GGUF file");
}

M2LM_IMPL const std::string& Gguf::path() const { return file_->mapping.path(); }
M2LM_IMPL std::uint32_t Gguf::version() const { return file_->version; }
M2LM_IMPL const ConfigValue& Gguf::metadata() const { return file_->metadata; }
M2LM_IMPL std::span<const std::string> Gguf::names() const { return file_->names; }
M2LM_IMPL bool Gguf::contains(std::string_view name) const { return file_->entries.contains(std::string(name)); }
M2LM_IMPL const Shape& Gguf::shape(std::string_view name) const { return file_->entry(name).shape; }
M2LM_IMPL const GgufFormat* Gguf::format(std::string_view name) const { return file_->entry(name).format; }
M2LM_IMPL const MappedFile& Gguf::mapping() const { return file_->mapping; }

M2LM_IMPL AnyTensor Gguf::tensor(std::string_view name) const try {
  const File::Entry& entry = file_->entry(name);
  if (entry.format == nullptr) {
    std::string known;
    for (const GgufFormat& format : detail::gguf_formats) known += concat(known.empty() ? "" : ", ", format.name);
    throw CheckpointError(concat(path(), ": tensor \"", name, "\" is of GGUF type ", entry.type, ", which is not supported; supported are ", known));
  }
  const std::byte* data = file_->mapping.bytes().data() + entry.begin;
  if (entry.format->in_place()) return AnyTensor(entry.format->dtype, entry.shape, data, file_->mapping.owner());
  Tensor<float> out(entry.shape);
  dequantise_gguf(entry.format->type, data, out.span());
  file_->mapping.require_intact();
  return AnyTensor(std::move(out));
} catch (const std::bad_alloc&) {
  detail::throw_out_of_memory("unpacking a GGUF tensor");
}

}  // namespace m2lm
