// Definitions of Tokenizer::from_gguf and GgufModel::tokenizer: the vocabulary in a GGUF file's metadata as the models that the tokenizer reads.
// Floor: io. May include: core, interop.
#pragma once

#include <m2lm/io/gguf_model_impl.hpp>
#include <m2lm/io/tokenizer_impl.hpp>

#include <bit>
#include <cmath>

namespace m2lm::inline M2LM_ABI {

namespace detail {

/// tokenizer.ggml.token_type; the numbers are sentencepiece's, too.
enum class GgufTokenKind : std::int64_t { normal = 1, unknown = 2, control = 3, user_defined = 4, unused = 5, byte = 6 };

struct GgufVocabulary {
  std::vector<std::string> tokens;
  std::vector<GgufTokenKind> kinds;
};

M2LM_IMPL GgufVocabulary read_gguf_vocabulary(const ConfigValue& meta) {
  GgufVocabulary out;
  out.tokens = meta.get_list<std::string>("tokenizer.ggml.tokens");
  const ConfigValue types = meta["tokenizer.ggml.token_type"];
  if (types.size() != out.tokens.size()) types.fail(concat("has ", types.size(), " entries, tokenizer.ggml.tokens has ", out.tokens.size()));
  out.kinds.reserve(out.tokens.size());
  for (std::size_t i = 0; i < out.tokens.size(); ++i) {
    const auto kind = types.at(i).as<std::int64_t>();
    if (kind < 0 || kind > 6) types.at(i).fail(concat("token type ", kind, " is none of 1 to 6"));
    out.kinds.push_back(static_cast<GgufTokenKind>(kind));
  }
  return out;
}

/// The tokens that are cut out of the text, and those with a role.
M2LM_IMPL TokenizerFiles read_gguf_added(const ConfigValue& meta, const GgufVocabulary& vocabulary, std::string_view placeholder) {
  TokenizerFiles files;
  files.adds_bos = meta.get_or("tokenizer.ggml.add_bos_token", true);
  files.add_prefix_space = meta.get_or("tokenizer.ggml.add_space_prefix", true);
  for (std::size_t i = 0; i < vocabulary.tokens.size(); ++i) {
    const bool control = vocabulary.kinds[i] == GgufTokenKind::control;
    if (control || vocabulary.kinds[i] == GgufTokenKind::user_defined)
      add_token(files, {vocabulary.tokens[i], static_cast<std::int32_t>(i), control, false, false, false, false}, meta.file());
  }
  for (const auto& [name, role] :
       {std::pair("bos_token", "bos"), std::pair("eos_token", "eos"), std::pair("unk_token", "unknown"), std::pair("pad_token", "padding")}) {
    const std::string key = concat("tokenizer.ggml.", role, "_token_id");
    const std::optional<std::int32_t> id = gguf_token(meta, key);
    if (!id) continue;
    if (static_cast<std::size_t>(*id) >= vocabulary.tokens.size())
      meta[key].fail(concat("the token id ", *id, " is outside the vocabulary of ", vocabulary.tokens.size(), " tokens"));
    const std::string& content = vocabulary.tokens[static_cast<std::size_t>(*id)];
    add_token(files, {content, *id, true, false, false, false, false}, meta.file());
    files.named.try_emplace(name, content);
  }
  if (!placeholder.empty()) {
    const auto known = std::find(vocabulary.tokens.begin(), vocabulary.tokens.end(), placeholder);
    add_token(files, {std::string(placeholder), static_cast<std::int32_t>(known - vocabulary.tokens.begin()), true, false, false, false, false},
              meta.file());
  }
  return files;
}

/// Writes protocol buffers.
class ProtoWriter {
  std::string text_;

  void varint(std::uint64_t n) {
    for (; n >= 0x80; n >>= 7U) text_ += static_cast<char>(static_cast<unsigned char>(n | 0x80U));
    text_ += static_cast<char>(static_cast<unsigned char>(n));
  }

 public:
  ProtoWriter& number(unsigned field, std::uint64_t value) {
    varint(std::uint64_t{field} << 3U);
    varint(value);
    return *this;
  }
  ProtoWriter& real(unsigned field, float value) {
    varint(std::uint64_t{field} << 3U | 5U);
    const auto bits = std::bit_cast<std::uint32_t>(value);
    for (unsigned i = 0; i < 32; i += 8) text_ += static_cast<char>(static_cast<unsigned char>(bits >> i));
    return *this;
  }
  ProtoWriter& bytes(unsigned field, std::string_view value) {
    varint(std::uint64_t{field} << 3U | 2U);
    varint(value.size());
    text_ += value;
    return *this;
  }
  const std::string& text() const { return text_; }
};

/// A sentencepiece model of the vocabulary. Fields: ModelProto 1 pieces (1 piece, 2 score, 3 type), 2 TrainerSpec (3 model_type: 2 is BPE,
/// 35 byte_fallback), 3 NormalizerSpec (1 name, 3 add_dummy_prefix, 4 remove_extra_whitespaces). source: sentencepiece_model.proto.
M2LM_IMPL std::string sentencepiece_model(const ConfigValue& meta, const GgufVocabulary& vocabulary) {
  const ConfigValue scores = meta["tokenizer.ggml.scores"];
  if (scores.size() != vocabulary.tokens.size())
    scores.fail(concat("has ", scores.size(), " entries, tokenizer.ggml.tokens has ", vocabulary.tokens.size()));
  ProtoWriter model;
  bool has_bytes = false;
  for (std::size_t i = 0; i < vocabulary.tokens.size(); ++i) {
    const auto score = scores.at(i).as<float>();
    if (!std::isfinite(score)) scores.at(i).fail("must be finite");
    const GgufTokenKind kind = vocabulary.kinds[i];
    has_bytes = has_bytes || kind == GgufTokenKind::byte;
    model.bytes(1, ProtoWriter().bytes(1, vocabulary.tokens[i]).real(2, score).number(3, static_cast<std::uint64_t>(kind)).text());
  }
  model.bytes(2, ProtoWriter().number(3, 2).number(35, has_bytes ? 1 : 0).text());
  model.bytes(3, ProtoWriter()
                     .bytes(1, "identity")
                     .number(3, meta.get_or("tokenizer.ggml.add_space_prefix", true) ? 1 : 0)
                     .number(4, meta.get_or("tokenizer.ggml.remove_extra_whitespaces", false) ? 1 : 0)
                     .text());
  return model.text();
}

/// The vocabulary as a tokenizer.json of byte-level BPE.
M2LM_IMPL ConfigValue bpe_json(const ConfigValue& meta, const GgufVocabulary& vocabulary, SplitRule rule) {
  JsonWriter w;
  w.begin_object();
  if (rule == SplitRule::qwen2) w.key("normalizer").begin_object().member("type", "NFC").end_object();
  w.key("pre_tokenizer").begin_object();
  if (rule == SplitRule::gpt2) {
    w.member("type", "ByteLevel").member("add_prefix_space", meta.get_or("tokenizer.ggml.add_space_prefix", false));
  } else {
    const auto* regex = std::find_if(std::begin(known_regexes), std::end(known_regexes), [&](const KnownRegex& known) { return known.rule == rule; });
    w.member("type", "Sequence").key("pretokenizers").begin_array();
    w.begin_object().member("type", "Split").key("pattern").begin_object().member("Regex", regex->text).end_object().end_object();
    w.begin_object().member("type", "ByteLevel").member("add_prefix_space", false).member("use_regex", false).end_object();
    w.end_array();
  }
  w.end_object();
  const std::optional<std::int32_t> bos = gguf_token(meta, "tokenizer.ggml.bos_token_id");
  if (bos && meta.get_or("tokenizer.ggml.add_bos_token", rule == SplitRule::llama3)) {
    w.key("post_processor").begin_object().member("type", "TemplateProcessing");
    w.key("single").begin_array().begin_object().key("SpecialToken").begin_object().member("id", "bos").end_object().end_object().end_array();
    w.key("special_tokens").begin_object().key("bos").begin_object().key("ids").begin_array().value(*bos).end_array().end_object().end_object();
    w.end_object();
  }
  w.key("model").begin_object().member("type", "BPE").member("ignore_merges", rule == SplitRule::llama3);
  w.key("vocab").begin_object();
  for (std::size_t i = 0; i < vocabulary.tokens.size(); ++i)
    if (vocabulary.kinds[i] == GgufTokenKind::normal) w.member(vocabulary.tokens[i], i);
  w.end_object().key("merges").begin_array();
  const ConfigValue merges = meta["tokenizer.ggml.merges"];
  const std::size_t n = merges.size();
  for (std::size_t i = 0; i < n; ++i) w.value(merges.at(i).as<std::string>());
  w.end_array().end_object().end_object();
  return ConfigValue::parse_text(w.text(), concat(meta.file(), " (as tokenizer.json)"));
}

}  // namespace detail

M2LM_IMPL Tokenizer GgufModel::tokenizer() const { return Tokenizer::from_gguf(text, vision ? "<image>" : ""); }

M2LM_IMPL Tokenizer Tokenizer::from_gguf(const Gguf& file, std::string_view placeholder) try {
  const ConfigValue& meta = file.metadata();
  const auto kind = meta.get<std::string>("tokenizer.ggml.model");
  if (kind != "llama" && kind != "gpt2") meta["tokenizer.ggml.model"].fail(concat("\"", kind, "\" is not supported; llama and gpt2 are"));
  const detail::GgufVocabulary vocabulary = detail::read_gguf_vocabulary(meta);
  detail::TokenizerFiles files = detail::read_gguf_added(meta, vocabulary, placeholder);
  if (kind == "llama") return of_sentencepiece(detail::sentencepiece_model(meta, vocabulary), std::move(files), file.path());

  const auto pre = meta.get<std::string>("tokenizer.ggml.pre");
  detail::SplitRule rule{};
  if (pre == "llama-bpe" || pre == "llama-v3" || pre == "llama3") {
    rule = detail::SplitRule::llama3;
  } else if (pre == "qwen2") {
    rule = detail::SplitRule::qwen2;
  } else if (pre == "gpt-2" || pre == "gpt2") {
    rule = detail::SplitRule::gpt2;
  } else {
    meta["tokenizer.ggml.pre"].fail(concat("the pre-tokeniser \"", pre, "\" is not supported; llama-bpe, qwen2 and gpt-2 are"));
  }
  return of_bpe(detail::bpe_json(meta, vocabulary, rule), std::move(files), file.path());
} catch (const std::bad_alloc&) {
  detail::throw_out_of_memory("reading a tokenizer");
}

}  // namespace m2lm
