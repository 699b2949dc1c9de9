// Probe: the tokenizer against transformers' ids, and its stream.
#include <m2lm/io/config.hpp>
#include <m2lm/io/file.hpp>
#include <m2lm/io/tokenizer.hpp>

#include <doctest/doctest.h>

#include <support.hpp>

TEST_CASE("text behind an added token gets its space by the checkpoint's rule") {
  const std::string directory = m2lm_test::golden("llava/with_tokenizer");
  const m2lm::ConfigValue golden = m2lm::ConfigValue::parse_file(directory + "/golden.json");
  const std::string text = golden.get<std::string>("rendered");
  const m2lm::ConfigValue styles = golden["ids_before_expansion_by_style"];
  CHECK(m2lm::Tokenizer::from_directory(directory).encode(text) == styles.get_list<std::int32_t>("prepend"));
  // Only tokenizer.model, and legacy false: the rule of vicuna-7b-v1.5.
  const m2lm_test::TemporaryDirectory other;
  for (const char* name : {"tokenizer.model", "added_tokens.json"}) other.write(name, m2lm::read_file(directory + "/" + name));
  other.write("tokenizer_config.json", R"({"legacy": false, "tokenizer_class": "LlamaTokenizer"})");
  CHECK(m2lm::Tokenizer::from_directory(other.path()).encode(text) == styles.get_list<std::int32_t>("first"));
}

TEST_CASE("a byte waits for its character") {
  const m2lm::Tokenizer tokenizer = m2lm::Tokenizer::from_directory(m2lm_test::golden("llava/with_tokenizer"));
  m2lm::TokenStream stream(tokenizer);
  for (const char* byte : {"<0xF0>", "<0x9F>", "<0x98>", "<0x80>"}) CHECK(stream.push(tokenizer.token_id(byte).value()).empty());
  CHECK(stream.finish() == "\xf0\x9f\x98\x80");
}
