// Tokenizer: sentencepiece or byte-level BPE, with the added tokens of a Hugging Face directory. TokenStream: its decoder, token by token.
// Floor: io. May include: core, interop.
#pragma once

#include <m2lm/core/error.hpp>

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace m2lm::inline M2LM_ABI {

class ConfigValue;
class Gguf;
namespace detail {
struct TokenizerFiles;
}

/// Text to ids and back. Immutable; copies share the vocabulary, several threads may use it.
/// Ids equal those of transformers for the same directory: added tokens are cut out of the text first, what is between them goes
/// through sentencepiece, or through the byte-level BPE of a tokenizer.json (GPT-2, LLaMA 3, Qwen2).
class Tokenizer {
  struct State;
  std::shared_ptr<const State> state_;
  friend class TokenStream;
  static Tokenizer from_tokenizer_json(std::string_view directory);
  static Tokenizer of_sentencepiece(std::string model, detail::TokenizerFiles files, std::string path);
  static Tokenizer of_bpe(const ConfigValue& json, detail::TokenizerFiles files, std::string path);

 public:
  Tokenizer() = default;
  /// Reads tokenizer.model, then added_tokens.json, special_tokens_map.json and tokenizer_config.json where they are.
  /// Without a tokenizer.model, a tokenizer.json with byte-level BPE takes its place: the pre-tokenisers of GPT-2, LLaMA 3 and Qwen2,
  /// no normaliser or NFC.
  /// throws CheckpointError naming the file: missing, damaged, contradictory, or of a kind that is not supported yet.
  static Tokenizer from_directory(std::string_view directory);
  /// The vocabulary that a GGUF file has below `tokenizer.ggml`: "llama" (BPE of sentencepiece, with scores) gives the ids of the tokenizer.model
  /// that it was made from, "gpt2" (byte-level BPE) those of the tokenizer.json; `pre` must be llama-bpe, qwen2 or gpt-2. Control and
  /// user-defined tokens are cut out of the text first. `placeholder` gets the id behind the vocabulary unless it is in it.
  /// throws CheckpointError naming file and key.
  static Tokenizer from_gguf(const Gguf& file, std::string_view placeholder = {});

  /// Ids of the text. With `add_bos` the beginning-of-sequence token comes first, if the checkpoint has one;
  /// with byte-level BPE: what the post-processor of tokenizer.json puts in front. Bytes that are not UTF-8 then count as U+FFFD.
  std::vector<std::int32_t> encode(std::string_view text, bool add_bos = true) const;
  /// Text of the ids; `skip_special` leaves out bos, eos, padding and the other special tokens.
  /// throws InputError naming the id and the vocabulary's size.
  std::string decode(std::span<const std::int32_t> ids, bool skip_special = true) const;

  /// Id of a piece or an added token, exactly as written in the vocabulary.
  std::optional<std::int32_t> token_id(std::string_view piece) const;
  /// True when the vocabulary has text for the id.
  bool contains(std::int32_t id) const;
  /// throws InputError naming the id and the vocabulary's size.
  const std::string& piece(std::int32_t id) const;
  /// Whether `decode` leaves the id out: bos, eos, padding, control tokens and what the checkpoint lists as special.
  bool is_special(std::int32_t id) const;

  /// Begins a sequence; nothing when the checkpoint has no such token. So for the other three.
  std::optional<std::int32_t> bos() const;
  /// Ends an answer.
  std::optional<std::int32_t> eos() const;
  /// Fills up a batch elsewhere; this library does not pad.
  std::optional<std::int32_t> pad() const;
  /// Stands for what the vocabulary has no piece for.
  std::optional<std::int32_t> unk() const;
  /// One more than the largest id.
  std::int32_t vocab_size() const;
};

/// Decodes one token at a time: everything `push` and `finish` returned, joined, equals Tokenizer::decode of all ids, and each
/// piece is whole UTF-8 characters. Bytes that never become a character appear as U+FFFD.
class TokenStream {
  Tokenizer tokenizer_;
  bool skip_special_;
  bool first_ = true;
  std::string bytes_;  // of an unfinished run of byte pieces
  std::string text_;   // what the last call returned

 public:
  /// `skip_special` as in Tokenizer::decode. Shares the tokenizer.
  explicit TokenStream(const Tokenizer& tokenizer, bool skip_special = true) : tokenizer_(tokenizer), skip_special_(skip_special) {
    bytes_.reserve(usual_bytes);
    text_.reserve(3 * usual_bytes);
  }
  /// The text that became certain with this token, valid until the next call; often empty in the middle of a character.
  const std::string& push(std::int32_t id);
  /// The rest, at the end of the text, valid until the next call. The stream then starts anew.
  const std::string& finish();

 private:
  static constexpr std::size_t usual_bytes = 128;  // so much text in one call allocates nothing
  void flush();
};

}  // namespace m2lm
