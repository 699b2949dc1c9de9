// Definitions of io/tokenizer.hpp.
// Floor: io. May include: core, interop.
#pragma once

#include <m2lm/interop/sentencepiece.hpp>
#include <m2lm/io/byte_bpe_impl.hpp>
#include <m2lm/io/config_impl.hpp>
#include <m2lm/io/file_impl.hpp>
#include <m2lm/core/tensor.hpp>
#include <m2lm/core/utf8.hpp>
#include <m2lm/io/tokenizer.hpp>

#include <algorithm>
#include <array>
#include <charconv>
#include <exception>
#include <map>
#include <new>
#include <unordered_map>

namespace m2lm::inline M2LM_ABI {

namespace detail {

/// The mark that sentencepiece writes for a space: U+2581.
inline constexpr std::string_view space_mark = "\xe2\x96\x81";

/// Where text gets a space in front before it is cut into pieces.
enum class PrefixRule : std::uint8_t {
  never,
  every_stretch,       ///< every stretch of text between added tokens
  stretch_unless_led,  ///< the same, unless it begins with a space already
  first_unless_led,    ///< the beginning of the whole text only, unless it begins with a space already
};

struct AddedToken {
  std::string content;
  std::int32_t id = -1;
  bool special = false, lstrip = false, rstrip = false, single_word = false;
  bool normalized = true;  ///< looked for in the normalised text, after the others (byte-level BPE)
};

struct TokenText {
  std::string text;   // as written in the vocabulary
  std::string plain;  // with spaces for space marks: what decoding appends
  int byte = -1;      // the value of a byte piece
  bool special = false;
};

M2LM_IMPL bool is_ascii_space(char c) { return c == ' ' || (c >= '\t' && c <= '\r'); }
M2LM_IMPL bool is_word_byte(char c) {
  return c == '_' || (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || static_cast<unsigned char>(c) >= 0x80;
}

/// Replaces every occurrence of `from`.
M2LM_IMPL std::string replace_all(std::string_view text, std::string_view from, std::string_view to) {
  std::string out;
  out.reserve(text.size());
  for (;;) {
    const std::size_t at = text.find(from);
    out += text.substr(0, at);
    if (at == std::string_view::npos) return out;
    out += to;
    text.remove_prefix(at + from.size());
  }
}

}  // namespace detail

struct Tokenizer::State {
  sentencepiece::SentencePieceProcessor processor;
  std::string model_path;
  std::vector<detail::TokenText> tokens;  // by id
  std::unordered_map<std::string, std::int32_t> ids;
  std::array<std::vector<detail::AddedToken>, 256> added;  // by first byte, longest first
  detail::PrefixRule prefix = detail::PrefixRule::every_stretch;
  bool model_adds_prefix = true;  // with every_stretch and no tokenizer.json, sentencepiece itself does it
  bool strip_first_space = true, adds_bos = true;
  std::optional<std::int32_t> bos, eos, pad, unk;
  std::unique_ptr<const detail::ByteBpe> bpe;  // instead of the processor
  void add_tokens(detail::TokenizerFiles& files, std::size_t pieces, const std::string& path);
  std::string_view own_file() const { return bpe ? "model.vocab" : "tokenizer.model"; }
  std::vector<std::int32_t> lead;              // with bpe: what the post-processor puts first

  void encode_stretch(std::string_view text, bool at_start, std::vector<std::int32_t>& out) const {
    if (text.empty()) return;
    const bool led = text.front() == ' ' || text.starts_with(detail::space_mark);
    bool prefix_wanted = false;
    switch (prefix) {
      case detail::PrefixRule::never: break;
      case detail::PrefixRule::every_stretch: prefix_wanted = !model_adds_prefix; break;
      case detail::PrefixRule::stretch_unless_led: prefix_wanted = !led; break;
      case detail::PrefixRule::first_unless_led: prefix_wanted = !led && (at_start || M2LM_FAULT(5)); break;
    }
    if (M2LM_FAULT(5) && prefix == detail::PrefixRule::every_stretch && !model_adds_prefix) prefix_wanted = at_start;
    std::string marked;
    if (prefix_wanted) {
      marked.reserve(text.size() + detail::space_mark.size());
      marked += detail::space_mark;
      marked += text;
      text = marked;
    }
    std::vector<int> pieces;
    const auto status = processor.Encode(text, &pieces);
    if (!status.ok()) throw InputError(concat(model_path, ": sentencepiece cannot encode the text: ", status.ToString()));
    out.insert(out.end(), pieces.begin(), pieces.end());
  }

  /// The longest added token that stands at text[at], or nullptr.
  const detail::AddedToken* added_at(std::string_view text, std::size_t at) const {
    for (const detail::AddedToken& token : added[static_cast<unsigned char>(text[at])]) {
      if (!text.substr(at).starts_with(token.content)) continue;
      const std::size_t end = at + token.content.size();
      if (token.single_word && ((at > 0 && detail::is_word_byte(text[at - 1])) || (end < text.size() && detail::is_word_byte(text[end]))))
        continue;
      return &token;
    }
    return nullptr;
  }

  /// As transformers does it: the added tokens that are not normalized are cut out of the text, what is between is normalised, then
  /// the others are cut out of that.
  void encode_bpe(std::string_view text, bool normalized, std::vector<std::int32_t>& out) const {
    const auto stretch = [&](std::string_view part) {
      if (part.empty()) return;
      if (normalized) return bpe->encode(part, out);
      if (bpe->normalizes()) return encode_bpe(bpe->normalize(part), true, out);
      encode_bpe(part, true, out);
    };
    std::size_t begin = 0;  // of the stretch that is not encoded yet
    for (std::size_t i = 0; i < text.size();) {
      const auto& bucket = added[static_cast<unsigned char>(text[i])];
      const auto found = std::find_if(bucket.begin(), bucket.end(), [&](const detail::AddedToken& token) {
        return token.normalized == normalized && text.substr(i).starts_with(token.content);
      });
      if (found == bucket.end()) {
        ++i;
        continue;
      }
      const std::size_t after = i + found->content.size();
      const auto word_at = [&](std::size_t at) { return detail::is_word_point(detail::code_point(text.substr(at)).value); };
      if (found->single_word && ((i > 0 && word_at(detail::last_character(text.substr(0, i)))) || (after < text.size() && word_at(after)))) {
        i = after;
        continue;
      }
      std::size_t first = i, end = after;
      if (found->lstrip) first = std::max(begin, i - detail::trailing_space(text.substr(0, i)));
      if (found->rstrip) end += detail::leading_space(text.substr(after));
      if (begin < first) stretch(text.substr(begin, first - begin));
      out.push_back(found->id);
      begin = end;
      i = after;
    }
    if (begin < text.size()) stretch(text.substr(begin));
  }

  const detail::TokenText& token(std::int32_t id) const {
    require<InputError>(id >= 0 && id < static_cast<std::int64_t>(tokens.size()), model_path, ": token id ", id,
                        " is outside the vocabulary of ", tokens.size(), " tokens");
    const detail::TokenText& found = tokens[static_cast<std::size_t>(id)];
    require<InputError>(!found.text.empty(), model_path, ": token id ", id, " has no text; the vocabulary of ", tokens.size(),
                        " tokens leaves it out");
    return found;
  }
};

namespace detail {

/// What tokenizer.json, the other files and the model say, gathered before the ids are laid out.
struct TokenizerFiles {
  std::map<std::int32_t, std::pair<AddedToken, std::string>> added;  // by id, with the file that said so
  std::unordered_map<std::string, std::int32_t> added_ids;           // by content
  std::map<std::string, std::string> named;                          // "bos_token" -> content
  std::vector<std::string> extra_special;
  std::optional<PrefixRule> json_rule;
  bool json_strips = true, json_keeps_charsmap = false;
  bool legacy = true, add_prefix_space = true, adds_bos = true;
};

inline constexpr std::int32_t max_token_id = 1 << 24;

/// Vocabularies have holes, but an id far behind the number of tokens would only take memory: a table has a place for each id.
inline void require_dense_ids(std::string_view file, std::string_view content, std::int64_t id, std::size_t tokens) {
  const std::int64_t most = 2 * static_cast<std::int64_t>(tokens) + (1 << 16);
  require<CheckpointError>(id <= most || M2LM_FAULT(58), file, ": token \"", content, "\" has id ", id, ", far behind the vocabulary of ", tokens,
                           " tokens; ids up to ", most, " are read");
}

M2LM_IMPL void add_token(TokenizerFiles& files, AddedToken token, const std::string& file) {
  if (token.content.empty()) throw CheckpointError(concat(file, ": an added token with id ", token.id, " has no text"));
  if (token.id < 0 || token.id > max_token_id)
    throw CheckpointError(concat(file, ": added token \"", token.content, "\" has id ", token.id, "; ids lie between 0 and ", max_token_id));
  const auto same = files.added_ids.try_emplace(token.content, token.id).first;
  if (same->second != token.id)
    throw CheckpointError(concat(file, ": added token \"", token.content, "\" has id ", token.id, ", in ", files.added.at(same->second).second, " it has id ",
                                 same->second));
  const auto [known, inserted] = files.added.try_emplace(token.id, token, file);
  if (!inserted && known->second.first.content != token.content)
    throw CheckpointError(concat(file, ": id ", token.id, " is \"", token.content, "\", in ", known->second.second, " it is \"",
                                 known->second.first.content, "\""));
}

/// A special token is given as "<s>", {"content": "<s>", …} or null.
M2LM_IMPL std::optional<std::string> special_content(const ConfigValue& value) {
  if (value.is_null()) return std::nullopt;
  std::string content = value.is_object() ? value.get<std::string>("content") : value.as<std::string>();
  if (content.empty()) return std::nullopt;
  return content;
}

M2LM_IMPL void read_special_names(TokenizerFiles& files, const ConfigValue& config) {
  for (const char* name : {"bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"})
    if (config.contains(name))
      if (const auto content = special_content(config[name])) files.named.try_emplace(name, *content);
  for (const char* name : {"additional_special_tokens", "extra_special_tokens"}) {
    if (!config.has_value(name)) continue;
    const ConfigValue list = config[name];
    if (list.is_array()) {
      for (std::size_t i = 0; i < list.size(); ++i)
        if (const auto content = special_content(list.at(i))) files.extra_special.push_back(*content);
    } else {
      for (const std::string& key : list.keys())
        if (const auto content = special_content(list[key])) files.extra_special.push_back(*content);
    }
  }
}

/// The "type" of each step of a normalizer, pre-tokenizer or decoder, with its own object.
M2LM_IMPL std::vector<std::pair<std::string, ConfigValue>> pipeline(const ConfigValue& config, std::string_view key, std::string_view list) {
  std::vector<std::pair<std::string, ConfigValue>> out;
  if (!config.has_value(key)) return out;
  const ConfigValue step = config[key];
  const std::string type = step.get<std::string>("type");
  if (type != "Sequence") return {{type, step}};
  const ConfigValue steps = step[list];
  for (std::size_t i = 0; i < steps.size(); ++i) out.emplace_back(steps.at(i).get<std::string>("type"), steps.at(i));
  return out;
}

/// Reads from tokenizer.json how text is prepared. The pieces themselves come from tokenizer.model.
M2LM_IMPL void read_tokenizer_json(TokenizerFiles& files, const ConfigValue& json) {
  PrefixRule rule = PrefixRule::never;
  const auto scheme = [](const ConfigValue& metaspace) {
    const std::string name = metaspace.get_or("prepend_scheme", metaspace.get_or("add_prefix_space", true) ? "always" : "never");
    if (name == "first") return PrefixRule::first_unless_led;
    return name == "always" ? PrefixRule::stretch_unless_led : PrefixRule::never;
  };
  for (const auto& [type, step] : pipeline(json, "normalizer", "normalizers")) {
    if (type == "Prepend") rule = PrefixRule::every_stretch;
    if (type == "Precompiled") files.json_keeps_charsmap = true;
  }
  for (const auto& [type, step] : pipeline(json, "pre_tokenizer", "pretokenizers"))
    if (type == "Metaspace") rule = scheme(step);
  files.json_rule = rule;
  files.json_strips = false;
  for (const auto& [type, step] : pipeline(json, "decoder", "decoders"))
    if (type == "Strip" || (type == "Metaspace" && scheme(step) != PrefixRule::never)) files.json_strips = true;
  if (!json.has_value("added_tokens")) return;
  const ConfigValue added = json["added_tokens"];
  for (std::size_t i = 0; i < added.size(); ++i) {
    const ConfigValue token = added.at(i);
    add_token(files, {token.get<std::string>("content"), token.get<std::int32_t>("id"), token.get_or("special", false),
                      token.get_or("lstrip", false), token.get_or("rstrip", false), token.get_or("single_word", false),
                      token.get_or("normalized", !token.get_or("special", false))}, json.file());
  }
}

M2LM_IMPL TokenizerFiles read_tokenizer_files(std::string_view directory) {
  TokenizerFiles files;
  const std::string config_path = join_path(directory, "tokenizer_config.json"), json_path = join_path(directory, "tokenizer.json");
  if (file_exists(config_path)) {
    const ConfigValue config = ConfigValue::parse_file(config_path);
    if (config.has_value("added_tokens_decoder")) {
      const ConfigValue decoder = config["added_tokens_decoder"];
      for (const std::string& key : decoder.keys()) {
        std::int32_t id = -1;
        const auto parsed = std::from_chars(key.data(), key.data() + key.size(), id);
        if (parsed.ec != std::errc() || parsed.ptr != key.data() + key.size()) decoder[key].fail("the key must be a token id");
        const ConfigValue token = decoder[key];
        add_token(files, {token.get<std::string>("content"), id, token.get_or("special", false), token.get_or("lstrip", false),
                          token.get_or("rstrip", false), token.get_or("single_word", false),
                          token.get_or("normalized", !token.get_or("special", false))}, config_path);
      }
    }
    read_special_names(files, config);
    files.legacy = config.get_or("legacy", true);
    files.add_prefix_space = config.get_or("add_prefix_space", true);
    files.adds_bos = config.get_or("add_bos_token", true);
  }
  if (file_exists(json_path)) read_tokenizer_json(files, ConfigValue::parse_file(json_path));
  const std::string map_path = join_path(directory, "special_tokens_map.json");
  if (file_exists(map_path)) read_special_names(files, ConfigValue::parse_file(map_path));
  const std::string added_path = join_path(directory, "added_tokens.json");
  if (file_exists(added_path)) {
    const ConfigValue added = ConfigValue::parse_file(added_path);
    for (const std::string& content : added.keys()) add_token(files, {content, added.get<std::int32_t>(content)}, added_path);
  }
  return files;
}

/// A serialized sentencepiece model whose normaliser settings are overridden: protocol buffers merge what is appended, and of
/// equal scalar fields the last one counts. Field 3 of a ModelProto is its NormalizerSpec: 2 precompiled_charsmap,
/// 3 add_dummy_prefix, 4 remove_extra_whitespaces.
M2LM_IMPL void override_normalizer(std::string& model, bool clear_charsmap, bool keep_spaces) {
  std::string spec("\x18\x00", 2);
  if (clear_charsmap) spec.append("\x12\x00", 2);
  if (keep_spaces) spec.append("\x20\x00", 2);
  model += '\x1a';
  model += static_cast<char>(spec.size());
  model += spec;
}

}  // namespace detail

/// Lays the added and the special tokens over the `pieces` of the vocabulary.
M2LM_IMPL void Tokenizer::State::add_tokens(detail::TokenizerFiles& files, std::size_t pieces, const std::string& path) {
  // Special tokens that no file gives an id: in the vocabulary, or appended in the order of their roles, as transformers does.
  std::vector<std::string> special;
  for (const char* name : {"bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"})
    if (files.named.contains(name)) special.push_back(files.named[name]);
  special.insert(special.end(), files.extra_special.begin(), files.extra_special.end());
  for (const std::string& content : special) {
    if (const auto known = files.added_ids.find(content); known != files.added_ids.end()) {
      files.added.at(known->second).first.special = true;
      continue;
    }
    const auto piece = ids.find(content);
    std::int32_t id = static_cast<std::int32_t>(pieces);
    if (piece != ids.end()) {
      id = piece->second;
    } else if (!files.added.empty()) {
      id = std::max(id, files.added.rbegin()->first + 1);
    }
    detail::add_token(files, {content, id, true, false, false, false, false}, path);
  }

  for (const auto& [id, entry] : files.added) {
    const detail::AddedToken& token = entry.first;
    const auto known = ids.find(token.content);
    require<CheckpointError>(known == ids.end() || known->second == id, entry.second, ": added token \"", token.content, "\" has id ", id,
                             ", in ", own_file(), " it has id ", known == ids.end() ? -1 : known->second);
    const auto index = static_cast<std::size_t>(id);
    detail::require_dense_ids(entry.second, token.content, id, pieces + files.added.size());
    if (index >= tokens.size()) tokens.resize(index + 1);
    tokens[index] = {token.content, bpe ? detail::token_bytes(token.content) : detail::replace_all(token.content, detail::space_mark, " "), -1, token.special};
    ids[token.content] = id;
    added[static_cast<unsigned char>(token.content[0])].push_back(token);
  }
  for (auto& bucket : added)
    std::stable_sort(bucket.begin(), bucket.end(), [](const auto& a, const auto& b) { return a.content.size() > b.content.size(); });
  const auto named_id = [&](const char* name) -> std::optional<std::int32_t> {
    const auto found = files.named.find(name);
    if (found == files.named.end()) return std::nullopt;
    return ids.at(found->second);
  };
  bos = named_id("bos_token");
  eos = named_id("eos_token");
  pad = named_id("pad_token");
  unk = named_id("unk_token");
}

M2LM_IMPL Tokenizer Tokenizer::from_tokenizer_json(std::string_view directory) {
  const std::string path = join_path(directory, "tokenizer.json");
  return of_bpe(ConfigValue::parse_file(path), detail::read_tokenizer_files(directory), path);
}

/// `json` is as tokenizer.json has it; `path` is the file it came from.
M2LM_IMPL Tokenizer Tokenizer::of_bpe(const ConfigValue& json, detail::TokenizerFiles files, std::string path) {
  auto state = std::make_shared<State>();
  state->model_path = path;
  state->strip_first_space = false;
  auto bpe = std::make_unique<detail::ByteBpe>(json, detail::max_token_id);
  std::size_t pieces = 0;
  for (const auto& [text, id] : bpe->vocabulary) {
    detail::require_dense_ids(path, text, id, bpe->vocabulary.size());
    pieces = std::max(pieces, static_cast<std::size_t>(id) + 1);
  }
  state->tokens.resize(pieces);
  for (const auto& [text, id] : bpe->vocabulary) {
    detail::TokenText& token = state->tokens[static_cast<std::size_t>(id)];
    if (!token.text.empty()) json["model"]["vocab"].fail(concat("tokens \"", token.text, "\" and \"", text, "\" have the same id ", id));
    token.text = text;
    token.plain = detail::token_bytes(text);
  }
  state->ids = std::move(bpe->vocabulary);
  bpe->vocabulary.clear();
  state->bpe = std::move(bpe);
  state->add_tokens(files, pieces, path);
  if (json.has_value("post_processor")) detail::read_template(json["post_processor"], state->lead);
  for (const std::int32_t id : state->lead)
    if (id < 0 || id >= static_cast<std::int64_t>(state->tokens.size()) || state->tokens[static_cast<std::size_t>(id)].text.empty())
      json["post_processor"].fail(concat("puts token id ", id, " first, which is not in the vocabulary of ", state->tokens.size(), " tokens"));
  Tokenizer out;
  out.state_ = std::move(state);
  return out;
}

M2LM_IMPL Tokenizer Tokenizer::from_directory(std::string_view directory) try {
  const std::string path = join_path(directory, "tokenizer.model");
  if (!file_exists(path)) {
    if (file_exists(join_path(directory, "tokenizer.json"))) return from_tokenizer_json(directory);
    throw CheckpointError(concat(path, ": the tokenizer is missing; a checkpoint directory needs the sentencepiece file tokenizer.model, or the "
                                       "tokenizer.json of a byte-level BPE"));
  }
  detail::TokenizerFiles files = detail::read_tokenizer_files(directory);
  std::string model;
  const std::string problem = detail::try_read_file(path, std::size_t{1} << 28, model);
  require<CheckpointError>(problem.empty(), problem);
  require<CheckpointError>(!model.empty(), path, ": the file is empty; a sentencepiece model is needed");
  return of_sentencepiece(std::move(model), std::move(files), path);
} catch (const std::bad_alloc&) {
  detail::throw_out_of_memory("reading a tokenizer");
}

/// `model` is a serialized sentencepiece model; `path` is the file it came from.
M2LM_IMPL Tokenizer Tokenizer::of_sentencepiece(std::string model, detail::TokenizerFiles files, std::string path) {
  auto state = std::make_shared<State>();
  state->model_path = path;
  const auto load = [&](const std::string& bytes) {
    // protobuf does not survive a failing allocation, so memory is asked for before: its objects take several times the file's size.
    (void)detail::aligned_bytes(8 * bytes.size() + (std::size_t{1} << 20));
    // sentencepiece answers most damage with a status; the trie that it builds throws, on a piece without text for example.
    const auto status = [&] {
      try {
        return state->processor.LoadFromSerializedProto(bytes);
      } catch (const std::bad_alloc&) {
        throw;
      } catch (const std::exception& error) {
        throw CheckpointError(concat(path, ": is not a sentencepiece model, or damaged: ", error.what()));
      }
    }();
    require<CheckpointError>(status.ok() && state->processor.GetPieceSize() > 0, path, ": is not a sentencepiece model, or damaged: ",
                             status.ok() ? std::string("it has no pieces") : status.ToString());
  };
  load(model);
  std::vector<std::string> probe;
  const bool model_prefixes = state->processor.Encode("a", &probe).ok() && !probe.empty() && probe[0].starts_with(detail::space_mark);

  // tokenizer.json says how its author's text was prepared; without it, `legacy` of tokenizer_config.json does.
  if (files.json_rule) {
    state->prefix = *files.json_rule;
    state->strip_first_space = files.json_strips;
    detail::override_normalizer(model, !files.json_keeps_charsmap, true);
    state->model_adds_prefix = false;
    load(model);
  } else if (!files.add_prefix_space || !files.legacy) {
    state->prefix = files.add_prefix_space ? detail::PrefixRule::first_unless_led : detail::PrefixRule::never;
    state->strip_first_space = files.add_prefix_space;
    detail::override_normalizer(model, false, false);
    state->model_adds_prefix = false;
    load(model);
  } else {
    state->prefix = detail::PrefixRule::every_stretch;
    state->strip_first_space = state->model_adds_prefix = model_prefixes;
    if (!model_prefixes) state->prefix = detail::PrefixRule::never;
  }
  state->adds_bos = files.adds_bos;

  const auto pieces = static_cast<std::size_t>(state->processor.GetPieceSize());
  state->tokens.resize(pieces);
  for (std::size_t i = 0; i < pieces; ++i) {
    const int id = static_cast<int>(i);
    detail::TokenText& token = state->tokens[i];
    token.text = state->processor.IdToPiece(id);
    token.plain = detail::replace_all(token.text, detail::space_mark, " ");
    token.special = state->processor.IsControl(id) || state->processor.IsUnknown(id);
    if (state->processor.IsByte(id) && token.text.size() == 6)  // "<0x0A>"
      (void)std::from_chars(token.text.data() + 3, token.text.data() + 5, token.byte, 16);
    state->ids.emplace(token.text, static_cast<std::int32_t>(i));
  }

  const auto control = [&](const char* name, int id) {
    if (id >= 0) files.named.try_emplace(name, state->processor.IdToPiece(id));
  };
  control("bos_token", state->processor.bos_id());
  control("eos_token", state->processor.eos_id());
  control("unk_token", state->processor.unk_id());
  state->add_tokens(files, pieces, path);
  Tokenizer out;
  out.state_ = std::move(state);
  return out;
}

M2LM_IMPL std::vector<std::int32_t> Tokenizer::encode(std::string_view text, bool add_bos) const try {
  std::vector<std::int32_t> out;
  if (state_->bpe) {
    if (add_bos) out = state_->lead;
    if (detail::is_utf8(text)) {
      state_->encode_bpe(text, false, out);
    } else {
      std::string whole;
      (void)detail::append_well_formed(whole, text, true);
      state_->encode_bpe(whole, false, out);
    }
    return out;
  }
  if (add_bos && state_->adds_bos && state_->bos) out.push_back(*state_->bos);
  std::size_t begin = 0;  // of the stretch that is not encoded yet
  for (std::size_t i = 0; i < text.size();) {
    const detail::AddedToken* token = state_->added_at(text, i);
    if (!token) {
      ++i;
      continue;
    }
    std::size_t end = i;
    if (token->lstrip)
      while (end > begin && detail::is_ascii_space(text[end - 1])) --end;
    state_->encode_stretch(text.substr(begin, end - begin), begin == 0, out);
    out.push_back(token->id);
    i += token->content.size();
    if (token->rstrip)
      while (i < text.size() && detail::is_ascii_space(text[i])) ++i;
    begin = i;
  }
  state_->encode_stretch(text.substr(begin), begin == 0, out);
  return out;
} catch (const std::bad_alloc&) {
  detail::throw_out_of_memory("encoding a text");
}

M2LM_IMPL std::string Tokenizer::decode(std::span<const std::int32_t> ids, bool skip_special) const try {
  TokenStream stream(*this, skip_special);
  std::string out;
  for (const std::int32_t id : ids) out += stream.push(id);
  return out + stream.finish();
} catch (const std::bad_alloc&) {
  detail::throw_out_of_memory("decoding a text");
}

M2LM_IMPL std::optional<std::int32_t> Tokenizer::token_id(std::string_view piece) const {
  const auto found = state_->ids.find(std::string(piece));
  if (found == state_->ids.end()) return std::nullopt;
  return found->second;
}

M2LM_IMPL bool Tokenizer::contains(std::int32_t id) const {
  return id >= 0 && id < vocab_size() && !state_->tokens[static_cast<std::size_t>(id)].text.empty();
}
M2LM_IMPL const std::string& Tokenizer::piece(std::int32_t id) const { return state_->token(id).text; }
M2LM_IMPL bool Tokenizer::is_special(std::int32_t id) const { return state_->token(id).special; }
M2LM_IMPL std::optional<std::int32_t> Tokenizer::bos() const { return state_->bos; }
M2LM_IMPL std::optional<std::int32_t> Tokenizer::eos() const { return state_->eos; }
M2LM_IMPL std::optional<std::int32_t> Tokenizer::pad() const { return state_->pad; }
M2LM_IMPL std::optional<std::int32_t> Tokenizer::unk() const { return state_->unk; }
M2LM_IMPL std::int32_t Tokenizer::vocab_size() const { return static_cast<std::int32_t>(state_->tokens.size()); }

// A run of byte pieces is one UTF-8 string; when it is not well formed, each of its bytes becomes U+FFFD (so it is in transformers).
// That is known at the end of the run only, so the bytes wait for it.
M2LM_IMPL const std::string& TokenStream::push(std::int32_t id) {
  const detail::TokenText& token = tokenizer_.state_->token(id);
  text_.clear();
  if (skip_special_ && token.special) return text_;
  if (tokenizer_.state_->bpe) {
    bytes_ += token.plain;
    bytes_.erase(0, detail::append_well_formed(text_, bytes_, false));
    return text_;
  }
  if (token.byte >= 0) {
    bytes_ += static_cast<char>(token.byte);
    if (M2LM_FAULT(8)) text_.swap(bytes_);
    return text_;
  }
  flush();
  std::string_view text = token.plain;
  if (first_ && text_.empty() && tokenizer_.state_->strip_first_space && text.starts_with(' ')) text.remove_prefix(1);
  text_ += text;
  first_ = false;
  return text_;
}

M2LM_IMPL const std::string& TokenStream::finish() {
  text_.clear();
  flush();
  first_ = true;
  return text_;
}

M2LM_IMPL void TokenStream::flush() {
  if (bytes_.empty()) return;
  if (tokenizer_.state_->bpe) {
    (void)detail::append_well_formed(text_, bytes_, true);
    return bytes_.clear();
  }
  if (detail::is_utf8(bytes_)) {
    text_ += bytes_;
  } else {
    for (std::size_t i = 0; i < bytes_.size(); ++i) text_ += detail::replacement_character;
  }
  bytes_.clear();
  if (first_ && tokenizer_.state_->strip_first_space && text_.starts_with(' ')) text_.erase(0, 1);
  first_ = false;
}

}  // namespace m2lm
