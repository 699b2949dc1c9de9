// GGUF: any bytes are read or refused, and what was read lies inside the file; so are the configuration and the tokenizer in it.
// The mutator works on keys, values and tensors, because changes of bytes hardly ever leave the counts and lengths right.
#include "fuzz.hpp"

#include <m2lm/io/gguf_model.hpp>
#include <m2lm/models/hf_config.hpp>

#include <algorithm>
#include <array>
#include <cstring>
#include <optional>
#include <random>
#include <string>
#include <vector>

extern "C" std::size_t LLVMFuzzerMutate(std::uint8_t* data, std::size_t size, std::size_t max_size);

namespace {

using m2lm_fuzz::accepted;
using m2lm_fuzz::check;

/// Everything that loading asks a model for.
void read_model(const m2lm::GgufModel& model) {
  accepted([&] {
    const m2lm::ConfigValue config = model.config();
    accepted([&] {
      m2lm::LlamaConfig decoder;
      read_config(config, decoder);
      check(decoder.head_dim > 0 && decoder.num_heads % decoder.num_kv_heads == 0, "an accepted decoder is consistent");
    });
    accepted([&] {
      m2lm::ClipVisionConfig encoder;
      if (model.vision) read_config(config, encoder);
    });
  });
  accepted([&] {
    std::size_t unpacked = 0;
    for (const m2lm::GgufModel::Source& source : model.sources())
      accepted([&] {
        const m2lm::AnyTensor tensor = m2lm::GgufModel::read(source);
        check(tensor.shape() == source.file.shape(source.stored), "the order of rows changes no shape");
        const m2lm::GgufFormat* format = source.file.format(source.stored);
        if (!format->in_place() || source.heads != 0) unpacked += tensor.bytes();
      });
    check(unpacked <= model.unpacked_bytes(), "no more is unpacked than was said before");
  });
  accepted([&] {
    for (const std::int32_t id : model.stop_tokens()) check(id >= 0, "ids count from 0");
  });
  accepted([&] { (void)model.chat_template(); });
  accepted([&] {
    if (model.vision) (void)model.image_processor();
  });
  accepted([&] {
    const m2lm::Tokenizer tokenizer = model.tokenizer();
    const auto ids = tokenizer.encode("ab a<image>\n \u00e9");
    for (const std::int32_t id : ids) check(id >= 0 && id < tokenizer.vocab_size(), "ids are of the vocabulary");
    (void)tokenizer.decode(ids, false);
  });
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static m2lm_fuzz::MemoryFile input;
  input.put(data, size);
  m2lm::Gguf file;
  if (!accepted([&] { file = m2lm::Gguf::open(input.path()); })) return 0;
  check(file.mapping().bytes().size() == size, "the file has the size it has");
  std::size_t plain = 0, made = 0;
  for (const std::string& name : file.names()) {
    check(file.contains(name), "names are of tensors");
    accepted([&] {
      const m2lm::AnyTensor tensor = file.tensor(name);
      std::size_t sum = 0;
      for (std::size_t i = 0; i < tensor.bytes(); ++i) sum += std::to_integer<std::size_t>(tensor.data()[i]);
      check(sum <= 255 * tensor.bytes(), "every byte of a tensor can be read");
      (file.format(name)->in_place() ? plain : made) += tensor.bytes();
    });
  }
  accepted([&] { (void)file.tensor("blk.1.attn_q.weight?"); });  // looks for the nearest name
  check(plain <= size, "tensors are no larger than the file");
  check(made <= 13 * size, "unpacked tensors are no larger than the densest format allows");  // Q2_K: 256 values in 84 bytes
  (void)file.metadata().text();
  const bool clip = file.metadata().has_value("general.architecture") && file.metadata()["general.architecture"].is_string() &&
                    file.metadata().get<std::string>("general.architecture") == "clip";
  if (!clip) {
    read_model({file, std::nullopt});
    return 0;
  }
  // A companion needs a text model: the same each time.
  static const std::optional<m2lm::Gguf> text = [] {
    std::optional<m2lm::Gguf> out;
    accepted([&] { out = m2lm::Gguf::open("tests/fuzz/corpus/gguf/model"); });
    return out;
  }();
  if (text) read_model({*text, file});
  return 0;
}

namespace {

struct Value {
  std::uint32_t type = 0;
  std::string bytes;          // of a number or a text
  std::uint32_t element = 0;  // of a list
  std::vector<Value> elements;
};

struct Key {
  std::string name;
  Value value;
};

struct Description {
  std::string name;
  std::vector<std::uint64_t> extents;
  std::uint32_t type = 0;
  std::uint64_t offset = 0;
};

struct Container {
  std::uint32_t version = 3;
  std::vector<Key> keys;
  std::vector<Description> tensors;
  std::string data;
};

constexpr std::uint32_t text_type = 8, list_type = 9;
constexpr std::array<std::size_t, 13> widths = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};

constexpr std::array<const char*, 47> known_keys = {"general.architecture",
                                                    "general.alignment",
                                                    "split.count",
                                                    "llama.context_length",
                                                    "llama.embedding_length",
                                                    "llama.block_count",
                                                    "llama.feed_forward_length",
                                                    "llama.attention.head_count",
                                                    "llama.attention.head_count_kv",
                                                    "llama.attention.key_length",
                                                    "llama.attention.value_length",
                                                    "llama.attention.layer_norm_rms_epsilon",
                                                    "llama.attention.sliding_window",
                                                    "llama.expert_count",
                                                    "llama.rope.dimension_count",
                                                    "llama.rope.freq_base",
                                                    "llama.rope.scaling.type",
                                                    "llama.rope.scaling.factor",
                                                    "llama.rope.scale_linear",
                                                    "tokenizer.ggml.model",
                                                    "tokenizer.ggml.pre",
                                                    "tokenizer.ggml.tokens",
                                                    "tokenizer.ggml.scores",
                                                    "tokenizer.ggml.token_type",
                                                    "tokenizer.ggml.merges",
                                                    "tokenizer.ggml.bos_token_id",
                                                    "tokenizer.ggml.eos_token_id",
                                                    "tokenizer.ggml.unknown_token_id",
                                                    "tokenizer.ggml.padding_token_id",
                                                    "tokenizer.ggml.eot_token_id",
                                                    "tokenizer.ggml.add_bos_token",
                                                    "tokenizer.ggml.add_space_prefix",
                                                    "tokenizer.ggml.remove_extra_whitespaces",
                                                    "tokenizer.chat_template",
                                                    "clip.projector_type",
                                                    "clip.vision.image_size",
                                                    "clip.vision.patch_size",
                                                    "clip.vision.embedding_length",
                                                    "clip.vision.feed_forward_length",
                                                    "clip.vision.block_count",
                                                    "clip.vision.attention.head_count",
                                                    "clip.vision.attention.layer_norm_epsilon",
                                                    "clip.vision.feature_layer",
                                                    "clip.vision.image_mean",
                                                    "clip.vision.image_std",
                                                    "clip.use_gelu",
                                                    "clip.vision.projection_dim"};
constexpr std::array<const char*, 12> known_texts = {"llama",  "clip", "gpt2",    "llama-bpe",    "qwen2",  "gpt-2",
                                                     "linear", "none", "<image>", "\xe2\x96\x81", "<0x0A>", ""};
constexpr std::array<const char*, 14> known_tensors = {
    "token_embd.weight",     "output.weight",     "output_norm.weight",  "rope_freqs.weight",  "blk.0.attn_q.weight",
    "blk.0.attn_k.weight",   "blk.0.attn_q.bias", "blk.0.ffn_gate.bias", "blk..attn_q.weight", "v.blk.0.ffn_down.weight",
    "v.blk.0.ffn_up.weight", "mm.0.bias",         "mm.2.weight",         "blk.0.attn_q."};
struct Block {
  std::uint32_t type;
  std::uint64_t elements, bytes;
};
constexpr std::array<Block, 20> blocks = {{{0, 1, 4},     {1, 1, 2},      {2, 32, 18},    {3, 32, 20},    {6, 32, 22},    {7, 32, 24}, {8, 32, 34},
                                           {10, 256, 84}, {11, 256, 110}, {12, 256, 144}, {13, 256, 176}, {14, 256, 210}, {24, 1, 1},  {25, 1, 2},
                                           {26, 1, 4},    {27, 1, 8},     {28, 1, 8},     {30, 1, 2},     {16, 256, 66},  {40, 1, 1}}};

using Random = std::minstd_rand;
std::size_t below(Random& random, std::size_t n) { return n ? random() % n : 0; }

/// What can be understood of the bytes; the rest is left out.
class Parser {
  const std::uint8_t* at_;
  std::size_t rest_;

 public:
  Parser(const std::uint8_t* data, std::size_t size) : at_(data), rest_(size) {}

  bool take(void* to, std::size_t n) {
    if (n > rest_) return false;
    if (n != 0) std::memcpy(to, at_, n);
    at_ += n;
    rest_ -= n;
    return true;
  }
  bool text(std::string& out) {
    std::uint64_t n = 0;
    if (!take(&n, 8) || n > rest_) return false;
    out.resize(static_cast<std::size_t>(n));
    return take(out.data(), out.size());
  }
  bool value(Value& out, std::uint32_t type, int nesting = 0) {
    out.type = type;
    if (type == text_type) return text(out.bytes);
    if (type != list_type) {
      if (type >= widths.size()) return false;
      out.bytes.resize(widths[type]);
      return take(out.bytes.data(), out.bytes.size());
    }
    std::uint64_t n = 0;
    if (nesting > 8 || !take(&out.element, 4) || !take(&n, 8) || n > rest_) return false;
    for (std::uint64_t i = 0; i < n; ++i)
      if (!value(out.elements.emplace_back(), out.element, nesting + 1)) return false;
    return true;
  }
  Container container() {
    Container out;
    char magic[4];
    std::uint64_t tensors = 0, keys = 0;
    if (!take(magic, 4) || !take(&out.version, 4) || !take(&tensors, 8) || !take(&keys, 8)) return out;
    const std::size_t whole = rest_ + 24;
    for (; keys > 0; --keys) {
      Key key;
      std::uint32_t type = 0;
      if (!text(key.name) || !take(&type, 4) || !value(key.value, type)) return out;
      out.keys.push_back(std::move(key));
    }
    for (; tensors > 0; --tensors) {
      Description tensor;
      std::uint32_t rank = 0;
      if (!text(tensor.name) || !take(&rank, 4) || rank > 8) return out;
      tensor.extents.resize(rank);
      if (!take(tensor.extents.data(), rank * 8) || !take(&tensor.type, 4) || !take(&tensor.offset, 8)) return out;
      out.tensors.push_back(std::move(tensor));
    }
    const std::size_t padding = (32 - (whole - rest_) % 32) % 32;
    if (padding <= rest_) out.data.assign(reinterpret_cast<const char*>(at_) + padding, rest_ - padding);
    return out;
  }
};

std::uint64_t alignment_of(const Container& container) {
  std::uint32_t alignment = 32;
  for (const Key& key : container.keys)
    if (key.name == "general.alignment" && key.value.type == 4) std::memcpy(&alignment, key.value.bytes.data(), 4);
  return alignment == 0 || alignment > 4096 ? 32 : alignment;
}

/// Makes extents, offsets and data agree, one tensor behind the other.
void mend(Container& container) {
  constexpr std::uint64_t most = 1 << 11;
  const std::uint64_t alignment = alignment_of(container);
  std::uint64_t offset = 0;
  for (Description& tensor : container.tensors) {
    Block block{tensor.type, 1, 1};
    for (const Block& known : blocks)
      if (known.type == tensor.type) block = known;
    if (tensor.extents.size() > 4) tensor.extents.resize(4);
    if (tensor.extents.empty() && block.elements > 1) tensor.extents.push_back(block.elements);
    std::uint64_t elements = 1;
    for (std::size_t i = 0; i < tensor.extents.size(); ++i) {
      std::uint64_t& extent = tensor.extents[i];
      if (i == 0 && block.elements > 1)
        extent = extent > 2 * block.elements ? block.elements : (extent + block.elements - 1) / block.elements * block.elements;
      if (extent > most || elements * extent > most) extent = i == 0 ? block.elements : 1;
      elements *= extent;
    }
    tensor.offset = offset;
    offset += elements / block.elements * block.bytes;
    offset = (offset + alignment - 1) / alignment * alignment;
  }
  container.data.resize(static_cast<std::size_t>(offset), 'x');
}

std::uint64_t mutated(std::uint64_t number, Random& random) {
  switch (below(random, 8)) {
    case 0: return number + 1;
    case 1: return number - 1;
    case 2: return below(random, 9);
    case 3: return number << 1U;
    case 4: return number ^ std::uint64_t{1} << below(random, 64);
    case 5: return ~std::uint64_t{0} >> below(random, 34);
    case 6: return 32 * below(random, 9);
    default: return std::uint64_t{1} << below(random, 64);
  }
}

void mutate_text(std::string& text) {
  std::array<std::uint8_t, 64> buffer{};
  const std::size_t n = std::min(text.size(), buffer.size() / 2);
  std::copy_n(text.begin(), n, buffer.begin());
  const std::size_t m = LLVMFuzzerMutate(buffer.data(), n, buffer.size());
  text.assign(buffer.begin(), buffer.begin() + static_cast<std::ptrdiff_t>(m));
}

Value made_value(std::uint32_t type, Random& random, int nesting = 0) {
  Value out;
  out.type = type;
  if (type == text_type) {
    out.bytes = known_texts[below(random, known_texts.size())];
  } else if (type == list_type) {
    out.element = static_cast<std::uint32_t>(below(random, nesting < 5 ? widths.size() : 8));
    for (std::size_t i = below(random, 4); i > 0; --i) out.elements.push_back(made_value(out.element, random, nesting + 1));
  } else if (type < widths.size()) {
    const std::uint64_t number = below(random, 3) == 0 ? mutated(1, random) : below(random, 9);
    out.bytes.assign(reinterpret_cast<const char*>(&number), widths[type]);
  }
  return out;
}

void mutate_value(Value& value, Random& random) {
  if (below(random, 12) == 0) {
    value = made_value(static_cast<std::uint32_t>(below(random, 14)), random);
    return;
  }
  if (value.type == text_type) {
    if (below(random, 2)) return mutate_text(value.bytes);
    value.bytes = known_texts[below(random, known_texts.size())];
  } else if (value.type == list_type) {
    auto& elements = value.elements;
    switch (elements.empty() ? 0 : below(random, 6)) {
      case 0:
        elements.insert(elements.begin() + static_cast<std::ptrdiff_t>(below(random, elements.size() + 1)), made_value(value.element, random));
        break;
      case 1: elements.erase(elements.begin() + static_cast<std::ptrdiff_t>(below(random, elements.size()))); break;
      case 2: std::swap(elements[below(random, elements.size())], elements[below(random, elements.size())]); break;
      case 3: elements[below(random, elements.size())] = elements[below(random, elements.size())]; break;
      default: {
        Value& element = elements[below(random, elements.size())];
        mutate_value(element, random);
        if (element.type != value.element) element = made_value(value.element, random);  // a list is of one type
      }
    }
  } else if (!value.bytes.empty()) {
    std::uint64_t number = 0;
    std::memcpy(&number, value.bytes.data(), value.bytes.size());
    number = mutated(number, random);
    std::memcpy(value.bytes.data(), &number, value.bytes.size());
  }
}

void mutate_key(Container& container, Random& random) {
  auto& keys = container.keys;
  if (keys.empty() || (keys.size() < 48 && below(random, 6) == 0)) {
    keys.insert(keys.begin() + static_cast<std::ptrdiff_t>(below(random, keys.size() + 1)),
                {known_keys[below(random, known_keys.size())], made_value(static_cast<std::uint32_t>(below(random, widths.size())), random)});
    return;
  }
  const std::size_t at = below(random, keys.size());
  switch (below(random, 9)) {
    case 0: keys.erase(keys.begin() + static_cast<std::ptrdiff_t>(at)); break;
    case 1: keys[at].name = known_keys[below(random, known_keys.size())]; break;
    case 2: mutate_text(keys[at].name); break;
    case 3: std::swap(keys[at].value, keys[below(random, keys.size())].value); break;
    default: mutate_value(keys[at].value, random);
  }
}

void mutate_tensor(Container& container, Random& random) {
  auto& tensors = container.tensors;
  if (tensors.empty() || (tensors.size() < 24 && below(random, 8) == 0)) {
    Description added{.name = known_tensors[below(random, known_tensors.size())], .type = blocks[below(random, blocks.size())].type};
    for (std::size_t i = below(random, 4); i > 0; --i) added.extents.push_back(below(random, 9));
    tensors.insert(tensors.begin() + static_cast<std::ptrdiff_t>(below(random, tensors.size() + 1)), std::move(added));
    return;
  }
  const std::size_t at = below(random, tensors.size());
  Description& tensor = tensors[at];
  switch (below(random, 10)) {
    case 0: tensors.erase(tensors.begin() + static_cast<std::ptrdiff_t>(at)); break;
    case 1: std::swap(tensor, tensors[below(random, tensors.size())]); break;
    case 2: mutate_text(tensor.name); break;
    case 3: tensor.name = known_tensors[below(random, known_tensors.size())]; break;
    case 4: tensor.type = blocks[below(random, blocks.size())].type; break;
    case 5: tensor.extents.insert(tensor.extents.end(), below(random, 3) == 0 ? 5 : 1, below(random, 3)); break;
    case 6:
      if (!tensor.extents.empty()) tensor.extents.pop_back();
      break;
    case 7: tensor.offset = mutated(tensor.offset, random); break;
    default:
      if (!tensor.extents.empty()) {
        std::uint64_t& extent = tensor.extents[below(random, tensor.extents.size())];
        extent = mutated(extent, random);
      }
  }
}

void mutate(Container& container, Random& random) {
  switch (below(random, 16)) {
    case 0: container.version = static_cast<std::uint32_t>(below(random, 6)); break;
    case 1: container.data.resize(below(random, 2) ? container.data.size() / 2 : container.data.size() + below(random, 40) + 1); break;
    case 2:
      for (std::size_t i = below(random, 8) + 1; i > 0 && !container.data.empty(); --i)
        container.data[below(random, container.data.size())] = static_cast<char>(random());
      break;
    default: below(random, 2) ? mutate_key(container, random) : mutate_tensor(container, random);
  }
}

void put(std::string& out, const void* value, std::size_t n) { out.append(static_cast<const char*>(value), n); }
void put_text(std::string& out, const std::string& text) {
  const std::uint64_t n = text.size();
  put(out, &n, 8);
  out += text;
}
void put_value(std::string& out, const Value& value, Random& random) {
  if (value.type == text_type) return put_text(out, value.bytes);
  if (value.type != list_type) return put(out, value.bytes.data(), value.bytes.size());
  std::uint64_t n = value.elements.size();
  if (below(random, 256) == 0) n = mutated(n, random);
  put(out, &value.element, 4);
  put(out, &n, 8);
  for (const Value& element : value.elements) put_value(out, element, random);
}

std::string serialise(const Container& container, Random& random) {
  std::string out = "GGUF";
  std::uint64_t tensors = container.tensors.size(), keys = container.keys.size();
  if (below(random, 64) == 0) tensors = mutated(tensors, random);
  if (below(random, 64) == 0) keys = mutated(keys, random);
  put(out, &container.version, 4);
  put(out, &tensors, 8);
  put(out, &keys, 8);
  for (const Key& key : container.keys) {
    put_text(out, key.name);
    put(out, &key.value.type, 4);
    put_value(out, key.value, random);
  }
  for (const Description& tensor : container.tensors) {
    put_text(out, tensor.name);
    const auto rank = static_cast<std::uint32_t>(tensor.extents.size());
    put(out, &rank, 4);
    put(out, tensor.extents.data(), tensor.extents.size() * 8);
    put(out, &tensor.type, 4);
    put(out, &tensor.offset, 8);
  }
  const std::size_t alignment = static_cast<std::size_t>(alignment_of(container));
  out.append((alignment - out.size() % alignment) % alignment, '\0');
  return out + container.data;
}

}  // namespace

extern "C" std::size_t LLVMFuzzerCustomMutator(std::uint8_t* data, std::size_t size, std::size_t max_size, unsigned seed) {
  Random random(seed + 1);
  if (below(random, 10) == 0) return LLVMFuzzerMutate(data, size, max_size);
  Container container = Parser(data, size).container();
  for (std::size_t n = 1 + below(random, 4); n > 0; --n) {
    mutate(container, random);
    // After most changes all else follows, so that only one thing is wrong, or nothing.
    if (below(random, 3) != 0 && n > 1) mend(container);
  }
  if (below(random, 2) == 0) mend(container);
  const std::string out = serialise(container, random);
  if (out.size() > max_size) return LLVMFuzzerMutate(data, size, max_size);
  std::memcpy(data, out.data(), out.size());
  return out.size();
}
