// ByteBpe: the byte-level BPE of a tokenizer.json (GPT-2, LLaMA 3, Qwen2): normaliser, pre-tokeniser and merges.
// Floor: io. May include: core, interop.
#pragma once

#include <m2lm/core/utf8.hpp>
#include <m2lm/io/config_impl.hpp>
#include <m2lm/io/unicode_tables_impl.hpp>

#include <algorithm>
#include <array>
#include <limits>
#include <queue>
#include <span>
#include <string>
#include <string_view>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

namespace m2lm::inline M2LM_ABI::detail {

// ---- code points ---------------------------------------------------------------------------------------------------------------------

enum class CharKind : std::uint8_t { other, letter, number, space };

M2LM_IMPL bool in_ranges(std::span<const UnicodeRange> ranges, std::uint32_t c) {
  const auto after = std::upper_bound(ranges.begin(), ranges.end(), c, [](std::uint32_t value, const UnicodeRange& r) { return value < r.first; });
  return after != ranges.begin() && c <= (after - 1)->last;
}

M2LM_IMPL CharKind char_kind(std::uint32_t c) {
  if (c < 0x80) {
    if ((c | 0x20U) >= 'a' && (c | 0x20U) <= 'z') return CharKind::letter;
    if (c >= '0' && c <= '9') return CharKind::number;
    return c == ' ' || (c >= '\t' && c <= '\r') ? CharKind::space : CharKind::other;
  }
  if (in_ranges(unicode_letters, c)) return CharKind::letter;
  if (in_ranges(unicode_numbers, c)) return CharKind::number;
  return in_ranges(unicode_spaces, c) ? CharKind::space : CharKind::other;
}

M2LM_IMPL void append_utf8(std::string& out, std::uint32_t c) {
  const auto put = [&](std::uint32_t byte) { out += static_cast<char>(static_cast<unsigned char>(byte)); };
  if (c < 0x80) return put(c);
  if (c < 0x800) {
    put(0xc0 | c >> 6U);
  } else {
    if (c < 0x10000) {
      put(0xe0 | c >> 12U);
    } else {
      put(0xf0 | c >> 18U);
      put(0x80 | (c >> 12U & 0x3fU));
    }
    put(0x80 | (c >> 6U & 0x3fU));
  }
  put(0x80 | (c & 0x3fU));
}

/// The length of the white space at the beginning, or at the end, of well-formed text.
M2LM_IMPL std::size_t leading_space(std::string_view text) {
  std::size_t at = 0;
  while (at < text.size()) {
    const CodePoint c = code_point(text.substr(at));
    if (char_kind(c.value) != CharKind::space) break;
    at += c.length;
  }
  return at;
}
M2LM_IMPL std::size_t last_character(std::string_view text) {
  std::size_t at = text.size() - 1;
  while (at > 0 && (static_cast<unsigned char>(text[at]) & 0xc0U) == 0x80) --at;
  return at;
}
M2LM_IMPL std::size_t trailing_space(std::string_view text) {
  std::size_t end = text.size();
  while (end > 0) {
    const std::size_t at = last_character(text.substr(0, end));
    if (char_kind(code_point(text.substr(at)).value) != CharKind::space) break;
    end = at;
  }
  return text.size() - end;
}
M2LM_IMPL bool is_word_point(std::uint32_t c) { return in_ranges(unicode_word, c); }

// ---- NFC -----------------------------------------------------------------------------------------------------------------------------

M2LM_IMPL std::uint8_t combining_class(std::uint32_t c) {
  if (c < 0x300) return 0;
  const auto* after = std::upper_bound(std::begin(unicode_combining), std::end(unicode_combining), c,
                                       [](std::uint32_t value, const CombiningRange& r) { return value < r.first; });
  return after != std::begin(unicode_combining) && c <= (after - 1)->last ? (after - 1)->combining_class : std::uint8_t{0};
}

inline constexpr std::uint32_t hangul_syllable = 0xac00, hangul_l = 0x1100, hangul_v = 0x1161, hangul_t = 0x11a7;
inline constexpr std::uint32_t hangul_vs = 21, hangul_ts = 28, hangul_syllables = 19 * hangul_vs * hangul_ts;

M2LM_IMPL void decompose(std::uint32_t c, std::vector<std::uint32_t>& out) {
  if (c >= hangul_syllable && c < hangul_syllable + hangul_syllables) {
    const std::uint32_t s = c - hangul_syllable;
    out.push_back(hangul_l + s / (hangul_vs * hangul_ts));
    out.push_back(hangul_v + s / hangul_ts % hangul_vs);
    if (s % hangul_ts != 0) out.push_back(hangul_t + s % hangul_ts);
    return;
  }
  const auto* found = std::lower_bound(std::begin(unicode_decompositions), std::end(unicode_decompositions), c,
                                       [](const Decomposition& d, std::uint32_t value) { return d.whole < value; });
  if (c < 0xc0 || found == std::end(unicode_decompositions) || found->whole != c) return out.push_back(c);
  decompose(found->first, out);
  if (found->second) out.push_back(found->second);
}

/// 0 when the two do not compose.
M2LM_IMPL std::uint32_t compose(std::uint32_t first, std::uint32_t second) {
  if (first >= hangul_l && first < hangul_l + 19 && second >= hangul_v && second < hangul_v + hangul_vs)
    return hangul_syllable + ((first - hangul_l) * hangul_vs + (second - hangul_v)) * hangul_ts;
  if (first >= hangul_syllable && first < hangul_syllable + hangul_syllables && (first - hangul_syllable) % hangul_ts == 0 && second > hangul_t &&
      second < hangul_t + hangul_ts)
    return first + (second - hangul_t);
  static const std::unordered_map<std::uint64_t, std::uint32_t> pairs = [] {
    std::unordered_map<std::uint64_t, std::uint32_t> out;
    for (const Decomposition& d : unicode_decompositions)
      if (d.composes) out.emplace(std::uint64_t{d.first} << 32U | d.second, d.whole);
    return out;
  }();
  const auto found = pairs.find(std::uint64_t{first} << 32U | second);
  return found == pairs.end() ? 0 : found->second;
}

/// Normalization form C of well-formed UTF-8.
M2LM_IMPL std::string to_nfc(std::string_view text) {
  std::vector<std::uint32_t> points;
  points.reserve(text.size());
  bool plain = true;  // nothing below U+0300 changes
  for (std::size_t at = 0; at < text.size();) {
    const CodePoint c = code_point(text.substr(at));
    points.push_back(c.value);
    plain = plain && c.value < 0x300;
    at += c.length;
  }
  if (plain) return std::string(text);
  std::vector<std::uint32_t> parts;
  parts.reserve(points.size());
  for (const std::uint32_t c : points) decompose(c, parts);
  std::vector<std::uint8_t> classes(parts.size());
  for (std::size_t i = 0; i < parts.size(); ++i) classes[i] = combining_class(parts[i]);
  for (std::size_t i = 0; i < parts.size();) {
    if (classes[i] == 0) {
      ++i;
      continue;
    }
    std::size_t end = i;
    while (end < parts.size() && classes[end] != 0) ++end;
    std::vector<std::pair<std::uint8_t, std::uint32_t>> run;
    for (std::size_t k = i; k < end; ++k) run.emplace_back(classes[k], parts[k]);
    std::stable_sort(run.begin(), run.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
    for (std::size_t k = i; k < end; ++k) std::tie(classes[k], parts[k]) = run[k - i];
    i = end;
  }
  // A character joins the last starter unless one of its own class, or of a higher one, stands between.
  constexpr std::size_t none = std::numeric_limits<std::size_t>::max();
  std::size_t starter = none, n = 0;
  int between = -1;  // the class of the last character kept after the starter
  for (std::size_t i = 0; i < parts.size(); ++i) {
    if (starter != none && between < static_cast<int>(classes[i])) {
      if (const std::uint32_t whole = compose(parts[starter], parts[i])) {
        parts[starter] = whole;
        continue;
      }
    }
    if (classes[i] == 0) {
      starter = n;
      between = -1;
    } else {
      between = classes[i];
    }
    parts[n++] = parts[i];
  }
  std::string out;
  out.reserve(text.size());
  for (std::size_t i = 0; i < n; ++i) append_utf8(out, parts[i]);
  return out;
}

// ---- pre-tokenisers ------------------------------------------------------------------------------------------------------------------

enum class SplitRule : std::uint8_t { gpt2, llama3, qwen2 };

struct KnownRegex {
  std::string_view text;
  SplitRule rule;
};
/// The regular expressions of tokenizer.json that a scanner stands for.
inline constexpr KnownRegex known_regexes[] = {
    {R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)", SplitRule::gpt2},
    {R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)", SplitRule::llama3},
    {R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)", SplitRule::qwen2},
};

/// Cuts well-formed text into the matches of a known regular expression, one at a time.
class PieceScanner {
  std::string_view text_;
  std::size_t at_ = 0;
  SplitRule rule_;

  struct Seen {
    CharKind kind = CharKind::other;
    std::uint32_t value = 0;
    std::size_t length = 0;  // 0 at the end of the text
  };
  Seen see(std::size_t at) const {
    if (at >= text_.size()) return {};
    const CodePoint c = code_point(text_.substr(at));
    return {char_kind(c.value), c.value, c.length};
  }
  std::size_t run(std::size_t at, CharKind kind, std::size_t most = std::numeric_limits<std::size_t>::max()) const {
    for (; most > 0; --most) {
      const Seen c = see(at);
      if (c.length == 0 || c.kind != kind) break;
      at += c.length;
    }
    return at;
  }
  static bool is_newline(const Seen& c) { return c.length != 0 && (c.value == '\r' || c.value == '\n'); }

  /// The length of 's, 't, 're, 've, 'm, 'll or 'd at `at`, 0 when none is there.
  std::size_t contraction(std::size_t at) const {
    if (text_[at] != '\'') return 0;
    const bool any_case = rule_ != SplitRule::gpt2;
    const auto letter = [&](std::size_t i) {
      if (i >= text_.size()) return '\0';
      return any_case && text_[i] >= 'A' && text_[i] <= 'Z' ? static_cast<char>(text_[i] - 'A' + 'a') : text_[i];
    };
    const char a = letter(at + 1), b = a == '\0' ? '\0' : letter(at + 2);
    if (a == 's' || a == 't' || a == 'm' || a == 'd') return 2;
    if ((a == 'r' && b == 'e') || (a == 'v' && b == 'e') || (a == 'l' && b == 'l')) return 3;
    return any_case && text_.substr(at + 1).starts_with("\xc5\xbf") ? 3 : 0;  // U+017F is another small s
  }

  std::size_t white_space(std::size_t at) const {
    const std::size_t end = run(at, CharKind::space);
    if (rule_ != SplitRule::gpt2) {  // \s*[\r\n]+: up to the last line end
      for (std::size_t i = end; i > at; --i)
        if (text_[i - 1] == '\r' || text_[i - 1] == '\n') return i;
    }
    if (end == text_.size()) return end;
    const std::size_t before = at + last_character(text_.substr(at, end - at));  // \s+(?!\S): the last one is left
    return before > at ? before : end;
  }

  std::size_t next_end() const {
    if (const std::size_t n = contraction(at_)) return at_ + n;
    const Seen c = see(at_), next = see(at_ + c.length);
    const bool led = c.value == ' ' && next.length != 0;
    const std::size_t body = led ? at_ + 1 : at_;
    const CharKind kind = led ? next.kind : c.kind;
    if (rule_ == SplitRule::gpt2) return kind == CharKind::space ? white_space(at_) : run(body, kind);
    if (c.kind == CharKind::letter) return run(at_, CharKind::letter);
    if (c.kind != CharKind::number && !is_newline(c) && next.length != 0 && next.kind == CharKind::letter)
      return run(at_ + c.length, CharKind::letter);
    if (c.kind == CharKind::number) return run(at_, CharKind::number, rule_ == SplitRule::llama3 ? 3 : 1);
    if (kind == CharKind::other) {
      std::size_t end = run(body, CharKind::other);
      while (is_newline(see(end))) ++end;
      return end;
    }
    return white_space(at_);
  }

 public:
  PieceScanner(std::string_view text, SplitRule rule) : text_(text), rule_(rule) {}
  /// Empty at the end.
  std::string_view next() {
    if (at_ >= text_.size()) return {};
    const std::size_t begin = at_;
    at_ = next_end();
    return text_.substr(begin, at_ - begin);
  }
};

// ---- bytes as characters -------------------------------------------------------------------------------------------------------------

/// The character that stands for a byte in the vocabulary: printable Latin-1 for itself, the others from U+0100 on.
M2LM_IMPL std::array<std::uint32_t, 256> byte_characters() {
  std::array<std::uint32_t, 256> out{};
  std::uint32_t next = 0x100;
  for (std::uint32_t b = 0; b < 256; ++b) out[b] = (b >= 0x21 && b <= 0x7e) || (b >= 0xa1 && b != 0xad) ? b : next++;
  return out;
}

/// The bytes that a token of the vocabulary stands for. A token with any other character stands for its own UTF-8.
M2LM_IMPL std::string token_bytes(std::string_view token) {
  static const std::unordered_map<std::uint32_t, char> bytes = [] {
    std::unordered_map<std::uint32_t, char> out;
    const auto characters = byte_characters();
    for (std::size_t b = 0; b < 256; ++b) out.emplace(characters[b], static_cast<char>(static_cast<unsigned char>(b)));
    return out;
  }();
  std::string out;
  for (std::size_t at = 0; at < token.size();) {
    const CodePoint c = code_point(token.substr(at));
    const auto found = bytes.find(c.value);
    if (!c.valid || found == bytes.end()) return std::string(token);
    out += found->second;
    at += c.length;
  }
  return out;
}

// ---- merges --------------------------------------------------------------------------------------------------------------------------

/// What a merge makes of two neighbours. Ranks count from 0, the lowest goes first.
struct Merge {
  std::uint32_t rank = std::numeric_limits<std::uint32_t>::max();
  std::int32_t id = -1;
};

/// Hash table with open addressing: two neighbours are looked up for nearly every byte of the text.
class MergeTable {
  struct Slot {
    std::uint64_t key = empty;
    Merge merge;
  };
  static constexpr std::uint64_t empty = ~std::uint64_t{0};
  std::vector<Slot> slots_{16};
  std::size_t mask_ = 15;

  static std::uint64_t key_of(std::int32_t a, std::int32_t b) {
    return std::uint64_t{static_cast<std::uint32_t>(a)} << 32U | static_cast<std::uint32_t>(b);
  }
  std::size_t slot_of(std::uint64_t key) const {
    std::size_t i = static_cast<std::size_t>((key * 0x9e3779b97f4a7c15U) >> 20U) & mask_;
    while (slots_[i].key != empty && slots_[i].key != key) i = (i + 1) & mask_;
    return i;
  }

 public:
  void reserve(std::size_t n) {
    std::size_t size = 16;
    while (size < 2 * n) size *= 2;
    slots_.assign(size, {});
    mask_ = size - 1;
  }
  /// requires: no more pairs than were reserved. Of equal pairs the last one counts.
  void insert(std::int32_t a, std::int32_t b, Merge merge) {
    const std::uint64_t key = key_of(a, b);
    slots_[slot_of(key)] = {key, merge};
  }
  const Merge& find(std::int32_t a, std::int32_t b) const { return slots_[slot_of(key_of(a, b))].merge; }
};

class ByteBpe {
  std::array<std::int32_t, 256> byte_ids_{};
  MergeTable merges_;
  std::unordered_map<std::string, std::int32_t> whole_;  // by bytes, with ignore_merges
  SplitRule rule_ = SplitRule::gpt2;
  bool ignore_merges_ = false, nfc_ = false, add_prefix_space_ = false, split_ = true;

  static constexpr std::size_t short_piece = 64;

  void merge_short(std::vector<std::int32_t>& ids) const {
    std::array<Merge, short_piece> found;
    std::size_t n = ids.size();
    for (std::size_t i = 0; i + 1 < n; ++i) found[i] = merges_.find(ids[i], ids[i + 1]);
    while (n > 1) {
      std::size_t best = 0;
      for (std::size_t i = 1; i + 1 < n; ++i)
        if (found[i].rank < found[best].rank) best = i;
      if (found[best].id < 0) break;
      ids[best] = found[best].id;
      for (std::size_t i = best + 1; i + 1 < n; ++i) {
        ids[i] = ids[i + 1];
        found[i - 1] = found[i];
      }
      --n;
      if (best + 1 < n) found[best] = merges_.find(ids[best], ids[best + 1]);
      if (best > 0) found[best - 1] = merges_.find(ids[best - 1], ids[best]);
    }
    ids.resize(n);
  }

  void merge_long(std::vector<std::int32_t>& ids) const {
    constexpr std::size_t none = std::numeric_limits<std::size_t>::max();
    struct Wanted {
      std::uint32_t rank;
      std::size_t at;
      std::int32_t id;
      bool operator<(const Wanted& other) const { return rank != other.rank ? rank > other.rank : at > other.at; }
    };
    std::vector<std::size_t> next(ids.size()), before(ids.size());
    std::priority_queue<Wanted> queue;
    const auto want = [&](std::size_t at) {
      if (at == none || next[at] == none) return;
      const Merge& merge = merges_.find(ids[at], ids[next[at]]);
      if (merge.id >= 0) queue.push({merge.rank, at, merge.id});
    };
    for (std::size_t i = 0; i < ids.size(); ++i) {
      before[i] = i == 0 ? none : i - 1;
      next[i] = i + 1 == ids.size() ? none : i + 1;
    }
    for (std::size_t i = 0; i < ids.size(); ++i) want(i);
    while (!queue.empty()) {
      const Wanted top = queue.top();
      queue.pop();
      // What stands there may have changed since: then this entry is of the past.
      if (ids[top.at] < 0 || next[top.at] == none || merges_.find(ids[top.at], ids[next[top.at]]).rank != top.rank) continue;
      const std::size_t gone = next[top.at];
      ids[top.at] = top.id;
      ids[gone] = -1;
      next[top.at] = next[gone];
      if (next[gone] != none) before[next[gone]] = top.at;
      want(top.at);
      want(before[top.at]);
    }
    std::erase(ids, -1);
  }

  void encode_piece(std::string_view piece, std::vector<std::int32_t>& work, std::vector<std::int32_t>& out) const {
    if (ignore_merges_) {
      if (const auto known = whole_.find(std::string(piece)); known != whole_.end()) return out.push_back(known->second);
    }
    work.clear();
    for (const char c : piece) work.push_back(byte_ids_[static_cast<unsigned char>(c)]);
    if (work.size() > short_piece) {
      merge_long(work);
    } else if (work.size() > 1) {
      merge_short(work);
    }
    out.insert(out.end(), work.begin(), work.end());
  }

  static void no_more_than(const ConfigValue& step, std::string_view key, std::string_view value, std::string_view what) {
    if (step.get_or<std::string>(key, std::string(value)) != value) step[key].fail(what);
  }

  void read_normalizer(const ConfigValue& step) {
    const std::string type = step.get<std::string>("type");
    if (type == "Sequence") {
      const ConfigValue list = step["normalizers"];
      for (std::size_t i = 0; i < list.size(); ++i) read_normalizer(list.at(i));
    } else if (type == "NFC") {
      nfc_ = true;
    } else {
      step["type"].fail(concat("the normalizer ", type, " is not supported with byte-level BPE; none and NFC are"));
    }
  }

  void read_pre_tokenizer(const ConfigValue& json) {
    if (!json.has_value("pre_tokenizer"))
      json.fail(
          "pre_tokenizer is missing: without a ByteLevel pre-tokenizer, reading a tokenizer.json alone is not supported; the sentencepiece file "
          "tokenizer.model is needed beside it");
    const ConfigValue step = json["pre_tokenizer"];
    const std::string type = step.get<std::string>("type");
    if (type == "ByteLevel") {
      add_prefix_space_ = step.get_or("add_prefix_space", true);
      split_ = step.get_or("use_regex", true);
      return;
    }
    if (type != "Sequence")
      step["type"].fail(concat("the pre-tokenizer ", type,
                               " is not supported in a tokenizer.json alone; ByteLevel, and Split with ByteLevel, are. With the sentencepiece file "
                               "tokenizer.model beside it, that is read"));
    const ConfigValue list = step["pretokenizers"];
    if (list.size() != 2 || list.at(0).get<std::string>("type") != "Split" || list.at(1).get<std::string>("type") != "ByteLevel")
      list.fail("this sequence of pre-tokenizers is not supported; Split followed by ByteLevel is");
    const ConfigValue cut = list.at(0), bytes = list.at(1);
    const ConfigValue pattern = cut["pattern"];
    const std::string regex = pattern.get<std::string>("Regex");
    const auto* known = std::find_if(std::begin(known_regexes), std::end(known_regexes), [&](const KnownRegex& r) { return r.text == regex; });
    if (known == std::end(known_regexes))
      pattern["Regex"].fail(concat("the regular expression ", regex, " is not supported; those of GPT-2, LLaMA 3 and Qwen2 are, to the letter"));
    rule_ = known->rule;
    no_more_than(cut, "behavior", "Isolated", "only the behavior Isolated is supported");
    if (cut.get_or("invert", false)) cut["invert"].fail("an inverted Split is not supported");
    if (bytes.get_or("add_prefix_space", true)) bytes.fail("add_prefix_space after a Split is not supported");
    if (bytes.get_or("use_regex", true)) bytes.fail("use_regex after a Split is not supported");
  }

 public:
  /// The vocabulary as written, by text.
  std::unordered_map<std::string, std::int32_t> vocabulary;

  /// Reads tokenizer.json. throws CheckpointError naming file and key: damaged, contradictory or not supported.
  explicit ByteBpe(const ConfigValue& json, std::int32_t max_id) {
    const ConfigValue model = json["model"];
    const std::string type = model.get_or<std::string>("type", model.contains("merges") ? "BPE" : "WordPiece");
    if (type != "BPE") model.fail(concat("a model of type ", type, " is not supported; byte-level BPE is"));
    read_pre_tokenizer(json);
    if (json.has_value("normalizer")) read_normalizer(json["normalizer"]);
    if (json.has_value("decoder") && json["decoder"].get<std::string>("type") != "ByteLevel")
      json["decoder"].fail("this decoder is not supported with byte-level BPE; ByteLevel is");
    for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"}) no_more_than(model, key, "", "is not supported with byte-level BPE");
    if (model.has_value("dropout") && model.get<double>("dropout") != 0) model["dropout"].fail("dropout is not supported");
    ignore_merges_ = model.get_or("ignore_merges", false);

    const ConfigValue vocab = model["vocab"];
    for (const std::string& key : vocab.keys()) {
      const auto id = vocab.get<std::int32_t>(key);
      if (id < 0 || id > max_id) vocab.fail(concat("token \"", key, "\" has id ", id, "; ids lie between 0 and ", max_id));
      vocabulary.emplace(key, id);
      if (ignore_merges_) whole_.emplace(token_bytes(key), id);
    }
    const auto id_of = [&](const std::string& token) {
      const auto found = vocabulary.find(token);
      return found == vocabulary.end() ? -1 : found->second;
    };
    const auto characters = byte_characters();
    for (std::size_t b = 0; b < 256; ++b) {
      std::string token;
      append_utf8(token, characters[b]);
      byte_ids_[b] = id_of(token);
      if (byte_ids_[b] < 0)
        vocab.fail(concat("has no token \"", token, "\" for the byte ", b, "; a byte-level vocabulary without all 256 bytes is not supported"));
    }
    const ConfigValue merges = model["merges"];
    const std::size_t n = merges.size();
    if (n > std::numeric_limits<std::uint32_t>::max() / 4) merges.fail("has too many entries");
    merges_.reserve(n);
    for (std::size_t i = 0; i < n; ++i) {
      const ConfigValue entry = merges.at(i);
      std::string a, b;
      if (entry.is_array()) {
        if (entry.size() != 2) entry.fail("a merge joins two tokens");
        a = entry.at(0).as<std::string>();
        b = entry.at(1).as<std::string>();
      } else {
        const std::string both = entry.as<std::string>();
        const std::size_t space = both.find(' ');
        if (space == std::string::npos || both.find(' ', space + 1) != std::string::npos) entry.fail("a merge is two tokens with a space between");
        a = both.substr(0, space);
        b = both.substr(space + 1);
      }
      const std::int32_t left = id_of(a), right = id_of(b), whole = id_of(a + b);
      if (left < 0 || right < 0 || whole < 0)
        entry.fail(concat("merges \"", a, "\" and \"", b, "\", but \"", left < 0 ? a : right < 0 ? b : a + b, "\" is not in the vocabulary"));
      merges_.insert(left, right, {static_cast<std::uint32_t>(i), whole});
    }
  }

  bool normalizes() const { return nfc_; }
  std::string normalize(std::string_view text) const { return nfc_ ? to_nfc(text) : std::string(text); }

  /// Appends the ids of well-formed, normalised text without added tokens.
  void encode(std::string_view text, std::vector<std::int32_t>& out) const {
    if (text.empty()) return;
    std::string led;
    if (add_prefix_space_ && text.front() != ' ') {
      led.reserve(text.size() + 1);
      led += ' ';
      led += text;
      text = led;
    }
    std::vector<std::int32_t> work;
    if (!split_) return encode_piece(text, work, out);
    PieceScanner scanner(text, rule_);
    for (std::string_view piece = scanner.next(); !piece.empty(); piece = scanner.next()) encode_piece(piece, work, out);
  }
};

/// The ids that a post-processor puts before the text: the special tokens in front of the first sequence. What comes after the text
/// is left out, since a prompt goes on.
M2LM_IMPL void read_template(const ConfigValue& step, std::vector<std::int32_t>& out) {
  const std::string type = step.get<std::string>("type");
  if (type == "ByteLevel") return;
  if (type == "Sequence") {
    const ConfigValue list = step["processors"];
    for (std::size_t i = 0; i < list.size(); ++i) read_template(list.at(i), out);
    return;
  }
  if (type != "TemplateProcessing")
    step["type"].fail(concat("the post-processor ", type, " is not supported with byte-level BPE; TemplateProcessing is"));
  const ConfigValue single = step["single"];
  for (std::size_t i = 0; i < single.size(); ++i) {
    const ConfigValue part = single.at(i);
    if (!part.contains("SpecialToken")) return;
    const std::string name = part["SpecialToken"].get<std::string>("id");
    for (const std::int32_t id : step["special_tokens"][name].get_list<std::int32_t>("ids")) out.push_back(id);
  }
}

}  // namespace m2lm::detail
