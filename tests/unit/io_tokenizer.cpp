// Tokenizer and TokenStream against the ids and texts that transformers gave (tests/golden/README.md, "tokenizer").
#include <m2lm/io/config.hpp>
#include <m2lm/io/file.hpp>
#include <m2lm/io/tokenizer.hpp>

#include <doctest/doctest.h>

#include <support.hpp>

#include <algorithm>

using m2lm::CheckpointError;
using m2lm::ConfigValue;
using m2lm::InputError;
using m2lm::Tokenizer;
using m2lm_test::has;
using m2lm_test::message_of;
using Ids = std::vector<std::int32_t>;

namespace {

constexpr const char* special_entry = R"("lstrip": false, "normalized": false, "rstrip": false, "single_word": false, "special": true})";

std::string config_json(int n, std::string_view legacy) {
  const auto entry = [](int id, std::string_view content) {
    return "\"" + std::to_string(id) + "\": {\"content\": \"" + std::string(content) + "\", " + special_entry;
  };
  return "{\"added_tokens_decoder\": {" + entry(0, "<unk>") + ", " + entry(1, "<s>") + ", " + entry(2, "</s>") + ", " + entry(n, "<image>") +
         ", " + entry(n + 1, "<pad>") + R"(}, "bos_token": "<s>", "eos_token": {"content": "</s>"}, "unk_token": "<unk>", "pad_token": "<pad>", )" +
         std::string(legacy) + R"("tokenizer_class": "LlamaTokenizer"})";
}

std::string pipeline_json(std::string_view normalizer, std::string_view pre_tokenizer) {
  return "{\"normalizer\": " + std::string(normalizer) + ", \"pre_tokenizer\": " + std::string(pre_tokenizer) +
         R"(, "decoder": {"type": "Sequence", "decoders": [{"type": "Replace"}, {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "start": 1}]}})";
}

constexpr const char* prepend_normalizer =
    R"({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, {"type": "Replace", "content": "\u2581"}]})";
constexpr const char* metaspace_first = R"({"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": false})";

/// A directory with the model and one of the four combinations of files that give the two behaviours.
Tokenizer make(const m2lm_test::TemporaryDirectory& dir, const std::string& model, int n, std::string_view kind) {
  dir.write("tokenizer.model", model);
  if (kind == "prepend, no json") dir.write("tokenizer_config.json", config_json(n, ""));
  if (kind == "first, no json") dir.write("tokenizer_config.json", config_json(n, "\"legacy\": false, "));
  if (kind == "prepend, json") {  // tokenizer.json counts more than `legacy`
    dir.write("tokenizer_config.json", config_json(n, "\"legacy\": false, "));
    dir.write("tokenizer.json", pipeline_json(prepend_normalizer, "null"));
  }
  if (kind == "first, json") {
    dir.write("tokenizer_config.json", config_json(n, "\"legacy\": true, "));
    dir.write("tokenizer.json", pipeline_json("null", metaspace_first));
  }
  return Tokenizer::from_directory(dir.path());
}

void check_cases(const ConfigValue& golden, const std::string& model) {
  const int n = golden.get<int>("vocab");
  const ConfigValue cases = golden["cases"], decodes = golden["decode"];
  REQUIRE(cases.size() > 40);
  for (const std::string kind : {"prepend, no json", "first, no json", "prepend, json", "first, json"}) {
    CAPTURE(kind);
    const m2lm_test::TemporaryDirectory dir;
    const Tokenizer tokenizer = make(dir, model, n, kind);
    const std::string style = kind.substr(0, kind.find(','));
    CHECK(tokenizer.vocab_size() == n + 2);
    CHECK(tokenizer.bos() == 1);
    CHECK(tokenizer.eos() == 2);
    CHECK(tokenizer.unk() == 0);
    CHECK(tokenizer.pad() == n + 1);
    CHECK(tokenizer.token_id("<image>") == n);
    CHECK(tokenizer.piece(n) == "<image>");
    CHECK_FALSE(tokenizer.token_id("<imag>").has_value());
    std::size_t wrong = 0;
    for (std::size_t i = 0; i < cases.size(); ++i) {
      const ConfigValue c = cases.at(i);
      const std::string text = c.get<std::string>("text");
      CAPTURE(text);
      const Ids expected = c["ids"].get_list<std::int32_t>(style);
      CHECK(tokenizer.encode(text) == expected);
      CHECK(tokenizer.encode(text, false) == Ids(expected.begin() + 1, expected.end()));
      wrong += tokenizer.encode(text) != expected;
      if (style == "prepend" && c.contains("sentencepiece")) CHECK(tokenizer.encode(text, false) == c.get_list<std::int32_t>("sentencepiece"));
    }
    CHECK(wrong == 0);
    for (std::size_t i = 0; i < decodes.size(); ++i) {
      const ConfigValue d = decodes.at(i);
      const Ids ids = d.get_list<std::int32_t>("ids");
      CAPTURE(i);
      CHECK(tokenizer.decode(ids) == d.get<std::string>("text_skip_special"));
      CHECK(tokenizer.decode(ids, false) == d.get<std::string>("text"));
    }
  }
}

/// The last character, if any, is complete.
bool whole_characters(std::string_view s) {
  std::size_t i = 0;
  while (i < s.size()) {
    const auto lead = static_cast<unsigned char>(s[i]);
    const std::size_t length = lead < 0x80 ? 1 : lead < 0xc0 ? 9 : lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4;
    if (i + length > s.size()) return false;
    for (std::size_t k = 1; k < length; ++k)
      if ((static_cast<unsigned char>(s[i + k]) & 0xc0U) != 0x80) return false;
    i += length;
  }
  return true;
}

}  // namespace

TEST_CASE("ids and texts of a small model equal transformers'") {
  check_cases(ConfigValue::parse_file(m2lm_test::golden("tokenizer/cases_small.json")),
              m2lm::read_file(m2lm_test::golden("llava/with_tokenizer/tokenizer.model")));
}

TEST_CASE("ids and texts of the LLaMA vocabulary equal transformers'") {
  const auto assets = m2lm_test::assets();
  if (!assets) return m2lm_test::skip("LLaMA vocabulary", "no shared assets");
  check_cases(ConfigValue::parse_file(m2lm_test::golden("tokenizer/cases.json")), m2lm::read_file(*assets + "/llama/tokenizer.model"));
}

TEST_CASE("a directory as transformers writes it") {
  const std::string dir = m2lm_test::golden("llava/with_tokenizer");
  const auto golden = ConfigValue::parse_file(dir + "/golden.json");
  const Tokenizer tokenizer = Tokenizer::from_directory(dir);
  CHECK(tokenizer.encode(golden.get<std::string>("rendered")) == golden.get_list<std::int32_t>("ids_before_expansion"));
  CHECK(tokenizer.decode(golden.get_list<std::int32_t>("greedy_ids")) == golden.get<std::string>("greedy_text"));
  CHECK(tokenizer.is_special(340));
  CHECK_FALSE(tokenizer.is_special(300));
}

TEST_CASE("a stream of tokens, joined, is the decoded text, in whole characters") {
  const Tokenizer tokenizer = Tokenizer::from_directory(m2lm_test::golden("llava/with_tokenizer"));
  std::uint32_t state = 7;
  const auto next = [&](std::uint32_t n) { return state = state * 1664525U + 1013904223U, static_cast<std::int32_t>((state >> 8) % n); };
  std::vector<Ids> sequences{{}, tokenizer.encode("caf\xc3\xa9 \xf0\x9f\x98\x80\xf0\x9f\x98\x80 x"), tokenizer.encode(" a  b <image> c</s>", false)};
  for (int i = 0; i < 500; ++i) {
    Ids ids;
    for (std::int32_t n = next(20); n > 0; --n) ids.push_back(next(4) ? next(static_cast<std::uint32_t>(tokenizer.vocab_size())) : 3 + next(256));
    sequences.push_back(ids);
  }
  for (const bool skip : {true, false})
    for (const Ids& ids : sequences) {
      m2lm::TokenStream stream(tokenizer, skip);
      for (int round = 0; round < 2; ++round) {  // the second time: finish starts it anew
        std::string joined;
        for (const std::int32_t id : ids) {
          const std::string piece = stream.push(id);
          CHECK(whole_characters(piece));
          joined += piece;
        }
        const std::string last = stream.finish();
        CHECK(whole_characters(last));
        CHECK(joined + last == tokenizer.decode(ids, skip));
      }
    }
  // A character of several byte pieces appears when it is complete.
  m2lm::TokenStream stream(tokenizer);
  std::string shown;
  const auto id = [&](const char* piece) { return tokenizer.token_id(piece).value(); };
  for (const char* piece : {"<0xF0>", "<0x9F>", "<0x98>", "<0x80>"}) CHECK(stream.push(id(piece)).empty());
  CHECK(stream.push(tokenizer.encode("a", false)[0]) == "\xf0\x9f\x98\x80 a");
  CHECK(stream.push(id("<0xF0>")).empty());
  CHECK(stream.finish() == "\xef\xbf\xbd");
}

TEST_CASE("added tokens: the longest counts, and white space goes where the token says") {
  const m2lm_test::TemporaryDirectory dir;
  dir.write("tokenizer.model", m2lm::read_file(m2lm_test::golden("llava/with_tokenizer/tokenizer.model")));
  dir.write("tokenizer_config.json",
            R"({"legacy": false, "add_bos_token": false, "added_tokens_decoder": {
                  "340": {"content": "<im>", "special": true}, "341": {"content": "<im><x>", "lstrip": true, "rstrip": true},
                  "342": {"content": "word", "single_word": true}}})");
  const Tokenizer t = Tokenizer::from_directory(dir.path());
  const auto text = [&](std::string_view s) { return t.decode(t.encode(s), false); };
  CHECK(t.encode("<im><im><x><im>") == Ids{340, 341, 340});
  CHECK(t.encode("<im>  <im><x> \n<im>") == Ids{340, 341, 340});
  CHECK(t.encode("word") == Ids{342});
  const Ids inside = t.encode("swords");
  CHECK(std::find(inside.begin(), inside.end(), 342) == inside.end());
  CHECK(text("a word <im>b") == "a word <im>b");
  CHECK(t.bos() == 1);  // the model's own, though it is not added
  CHECK(t.encode("", true).empty());
  CHECK_FALSE(t.pad().has_value());
}

TEST_CASE("a tokenizer that is missing, damaged or contradicts itself") {
  const m2lm_test::TemporaryDirectory dir;
  const std::string model = m2lm::read_file(m2lm_test::golden("llava/with_tokenizer/tokenizer.model"));
  const auto message = [&] { return message_of<CheckpointError>([&] { (void)Tokenizer::from_directory(dir.path()); }); };
  CHECK(has(message(), "tokenizer.model: the tokenizer is missing"));
  dir.write("tokenizer.json", R"({"model": {"type": "BPE"}, "pre_tokenizer": {"type": "ByteLevel"}})");
  CHECK(has(message(), "tokenizer.json: model.vocab: is missing"));
  std::filesystem::remove(dir / "tokenizer.json");

  dir.write("tokenizer.model", "");
  CHECK(has(message(), "tokenizer.model: the file is empty"));
  dir.write("tokenizer.model", "not a model");
  CHECK(has(message(), "tokenizer.model: is not a sentencepiece model"));
  for (std::size_t n = 1; n < model.size(); n += 97) {  // a cut at a field's end may leave a smaller model: then it loads
    dir.write("tokenizer.model", std::string_view(model).substr(0, n));
    try {
      (void)Tokenizer::from_directory(dir.path());
    } catch (const CheckpointError& error) {
      CHECK(has(error.what(), "tokenizer.model"));
    }
  }

  dir.write("tokenizer.model", model);
  CHECK(message().empty());
  dir.write("tokenizer_config.json", "{");
  CHECK(has(message(), "tokenizer_config.json: is not valid JSON"));
  const auto decoder = [&](std::string_view entries) { dir.write("tokenizer_config.json", "{\"added_tokens_decoder\": {" + std::string(entries) + "}}"); };
  decoder(R"("x": {"content": "<a>"})");
  CHECK(has(message(), "added_tokens_decoder.x: the key must be a token id"));
  decoder(R"("340": {})");
  CHECK(has(message(), "added_tokens_decoder.340.content: is missing"));
  decoder(R"("340": {"content": ""})");
  CHECK(has(message(), "has no text"));
  decoder(R"("-1": {"content": "<a>"})");
  CHECK(has(message(), "has id -1; ids lie between 0 and"));
  decoder(R"("2000000000": {"content": "<a>"})");
  CHECK(has(message(), "has id 2000000000; ids lie between 0 and"));
  decoder(R"("340": {"content": "<a>"}, "341": {"content": "<a>"})");
  CHECK(has(message(), "added token \"<a>\" has id 341"));
  decoder(R"("340": {"content": "<s>"})");
  CHECK(has(message(), "added token \"<s>\" has id 340, in tokenizer.model it has id 1"));
  decoder(R"("340": {"content": "<a>"})");
  dir.write("added_tokens.json", R"({"<b>": 340})");
  CHECK(has(message(), "added_tokens.json: id 340 is \"<b>\", in "));
  dir.write("added_tokens.json", R"({"<b>": "340"})");
  CHECK(has(message(), "added_tokens.json: <b>: must be an integer"));
  dir.write("added_tokens.json", R"({"<b>": 345})");
  CHECK(message().empty());
  const Tokenizer t = Tokenizer::from_directory(dir.path());
  CHECK(t.vocab_size() == 346);

  const auto decode = [&](std::int32_t id) { return message_of<InputError>([&] { (void)t.decode(std::vector{id}); }); };
  CHECK(has(decode(346), "token id 346 is outside the vocabulary of 346 tokens"));
  CHECK(has(decode(-1), "token id -1 is outside the vocabulary of 346 tokens"));
  CHECK(has(decode(343), "token id 343 has no text"));
  CHECK(has(message_of<InputError>([&] { (void)t.piece(1 << 30); }), "outside the vocabulary"));
  m2lm::TokenStream stream(t);
  CHECK_THROWS_AS((void)stream.push(400), InputError);
}
