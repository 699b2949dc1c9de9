// Tokenizers from GGUF metadata: the ids of the tokenizer.model or tokenizer.json that they were made from.
#include <m2lm/io/config.hpp>
#include <m2lm/io/file.hpp>
#include <m2lm/io/gguf.hpp>
#include <m2lm/io/tokenizer.hpp>

#include <doctest/doctest.h>

#include <support.hpp>

#include <cstdio>
#include <sstream>

using m2lm::CheckpointError;
using m2lm::ConfigValue;
using m2lm::Gguf;
using m2lm::Tokenizer;
using m2lm_test::asset_file;
using m2lm_test::golden;
using m2lm_test::has;
using m2lm_test::message_of;
using Ids = std::vector<std::int32_t>;

TEST_CASE("sentencepiece: the recorded ids, texts and special tokens of the tokenizer.model") {
  const Tokenizer tokenizer = Tokenizer::from_gguf(Gguf::open(golden("gguf/llava/text.gguf")));
  const ConfigValue record = ConfigValue::parse_file(golden("tokenizer/cases_small.json"));
  const int n = record.get<int>("vocab");
  CHECK(tokenizer.vocab_size() == 352);
  CHECK(tokenizer.bos() == 1);
  CHECK(tokenizer.eos() == 2);
  CHECK(tokenizer.unk() == 0);
  CHECK(tokenizer.pad() == n + 1);
  CHECK(tokenizer.token_id("<image>") == n);
  const ConfigValue cases = record["cases"], decodes = record["decode"];
  REQUIRE(cases.size() > 40);
  for (std::size_t i = 0; i < cases.size(); ++i) {
    const std::string text = cases.at(i).get<std::string>("text");
    CAPTURE(text);
    CHECK(tokenizer.encode(text) == cases.at(i)["ids"].get_list<std::int32_t>("prepend"));
  }
  const Tokenizer twin = Tokenizer::from_directory(golden("llava/with_tokenizer"));
  for (std::size_t i = 0; i < decodes.size(); ++i) {
    const Ids ids = decodes.at(i).get_list<std::int32_t>("ids");
    for (const bool skip : {true, false}) CHECK(tokenizer.decode(ids, skip) == twin.decode(ids, skip));
  }
}

TEST_CASE("the 32,000 pieces of LLaMA from llama.cpp's own file: ids of its test set and of tokenizer.model") {
  M2LM_SKIP_WITHOUT(asset_file("llama/stories15M-Q4_0.gguf"));
  M2LM_SKIP_WITHOUT(asset_file("llama/tokenizer.model"));
  const Tokenizer tokenizer = Tokenizer::from_gguf(Gguf::open(asset_file("llama/stories15M-Q4_0.gguf")));
  const m2lm_test::TemporaryDirectory directory;
  std::filesystem::create_symlink(std::filesystem::absolute(asset_file("llama/tokenizer.model")), directory / "tokenizer.model");
  const Tokenizer twin = Tokenizer::from_directory(directory.path());
  REQUIRE(tokenizer.vocab_size() == twin.vocab_size());
  std::size_t pieces = 0;
  for (std::int32_t id = 0; id < twin.vocab_size(); ++id) pieces += tokenizer.piece(id) == twin.piece(id);
  CHECK(pieces == static_cast<std::size_t>(twin.vocab_size()));
  const ConfigValue cases = ConfigValue::parse_file(golden("tokenizer/cases.json"))["cases"];
  for (std::size_t i = 0; i < cases.size(); ++i) {
    const std::string text = cases.at(i).get<std::string>("text");
    CAPTURE(text);
    CHECK(tokenizer.encode(text) == twin.encode(text));
  }
}

TEST_CASE("byte-level BPE: the recorded ids of the tokenizer.json, LLaMA 3's and Qwen2's") {
  for (const std::string name : {"llama3", "qwen2"}) {
    CAPTURE(name);
    const Tokenizer tokenizer = Tokenizer::from_gguf(Gguf::open(golden("gguf/tokenizer-" + name + ".gguf")));
    const Tokenizer twin = Tokenizer::from_directory(golden("bpe/" + name));
    CHECK(tokenizer.bos() == tokenizer.token_id("<|begin|>"));
    CHECK(tokenizer.eos() == tokenizer.token_id("<|end|>"));
    CHECK(tokenizer.vocab_size() == twin.vocab_size());
    const ConfigValue cases = ConfigValue::parse_file(golden("bpe/" + name + "/cases.json"))["cases"];
    std::size_t checked = 0;
    for (std::size_t i = 0; i < cases.size(); ++i) {
      const std::string text = cases.at(i).get<std::string>("text");
      // GGUF has no place for the flags of added tokens (spaces around them, whole words only, normalised first).
      if (has(text, "<image>") || has(text, "<left>") || has(text, "<word>") || has(text, "rm>")) continue;
      CAPTURE(text);
      CHECK(tokenizer.encode(text) == cases.at(i).get_list<std::int32_t>("ids"));
      CHECK(tokenizer.decode(tokenizer.encode(text)) == twin.decode(twin.encode(text)));
      ++checked;
    }
    CHECK(checked > 30);
  }
}

TEST_CASE("vocabularies that contradict themselves, and kinds that are not supported") {
  const std::string whole = m2lm::read_file(golden("gguf/tokenizer-llama3.gguf")), pieces = m2lm::read_file(golden("gguf/llava/text.gguf"));
  const m2lm_test::TemporaryDirectory directory;
  const auto refused = [&](std::string bytes, std::string_view from, std::string_view to, std::initializer_list<std::string_view> said) {
    const std::size_t at = bytes.find(from);
    REQUIRE(at != std::string::npos);
    bytes.replace(at, to.size(), to);
    directory.write("t.gguf", bytes);
    const std::string message = message_of<CheckpointError>([&] { Tokenizer::from_gguf(Gguf::open(directory / "t.gguf")); });
    CHECK_MESSAGE(has(message, "t.gguf"), message);
    for (const std::string_view part : said) CHECK_MESSAGE(has(message, part), message, " / ", std::string(part));
  };
  refused(whole, "gpt2", "bert", {"tokenizer.ggml.model", "\"bert\"", "llama and gpt2"});
  refused(whole, "llama-bpe", "llama-xyz", {"tokenizer.ggml.pre", "llama-xyz", "qwen2"});
  refused(whole, "tokenizer.ggml.merges", "tokenizer.ggml.mergez", {"tokenizer.ggml.merges", "missing"});
  refused(whole, "tokenizer.ggml.token_type", "tokenizer.ggml.token_typo", {"tokenizer.ggml.token_type", "missing"});
  refused(pieces, "tokenizer.ggml.scores", "tokenizer.ggml.scorez", {"tokenizer.ggml.scores", "missing"});
  const std::string role = "tokenizer.ggml.bos_token_id";
  refused(pieces, role, role + std::string("\4\0\0\0\x60\1\0\0", 8), {role, "352", "vocabulary of 352"});
}
