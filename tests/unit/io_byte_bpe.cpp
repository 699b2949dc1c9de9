// Byte-level BPE against the ids and texts that transformers gave (tests/golden/README.md, "bpe").
#include <m2lm/io/config.hpp>
#include <m2lm/io/file.hpp>
#include <m2lm/io/tokenizer.hpp>

#include <doctest/doctest.h>

#include <support.hpp>

#include <cstdio>
#include <fstream>
#include <sstream>

using m2lm::CheckpointError;
using m2lm::ConfigValue;
using m2lm::Tokenizer;
using m2lm::TokenStream;
using m2lm_test::has;
using m2lm_test::message_of;
using Ids = std::vector<std::int32_t>;

namespace {

void append_utf8(std::string& out, std::uint32_t c) {
  const auto put = [&](std::uint32_t byte) { out += static_cast<char>(static_cast<unsigned char>(byte)); };
  if (c < 0x80) return put(c);
  if (c < 0x800) {
    put(0xc0 | c >> 6U);
  } else if (c < 0x10000) {
    put(0xe0 | c >> 12U);
    put(0x80 | (c >> 6U & 0x3fU));
  } else {
    put(0xf0 | c >> 18U);
    put(0x80 | (c >> 12U & 0x3fU));
    put(0x80 | (c >> 6U & 0x3fU));
  }
  put(0x80 | (c & 0x3fU));
}

/// fuzz_text of tests/golden/bpe/make_bpe_goldens.py.
std::string fuzz_text(std::uint64_t number) {
  std::uint64_t state = number * 0x9E3779B97F4A7C15U + 12345;
  const auto draw = [&](std::uint32_t n) {
    state = state * 6364136223846793005U + 1442695040888963407U;
    return static_cast<std::uint32_t>((state >> 33U) % n);
  };
  constexpr std::uint32_t odd[] = {9, 10, 13, 32, 32, 0xA0, 0x85, 0x2003, 0x3000, 0x27, 0x17F, 0x73};
  std::string out;
  const std::uint32_t n = 1 + draw(40);
  for (std::uint32_t i = 0; i < n; ++i) {
    const std::uint32_t kind = draw(12);
    std::uint32_t c = 0;
    if (kind < 3) {
      c = 0x20 + draw(0x5F);
    } else if (kind == 3) {
      c = odd[draw(12)];
    } else if (kind == 4) {
      out += '\'';
      c = static_cast<std::uint32_t>("stmdrvlSTMDRVLe"[draw(15)]);
    } else if (kind == 5) {
      c = 0x300 + draw(0x70);
    } else if (kind == 6) {
      c = 0xA0 + draw(0x560);
    } else if (kind == 7) {
      c = 0x600 + draw(0x1C00);
    } else if (kind == 8) {
      const bool jamo = draw(2) != 0;
      c = jamo ? 0x1100 + draw(0x100) : 0xAC00 + draw(11172);
    } else if (kind == 9) {
      c = 0x30 + draw(10);
    } else {
      c = 1 + draw(0x10FFFF);
    }
    if (c < 0xD800 || c > 0xDFFF) append_utf8(out, c);
  }
  return out;
}

std::uint64_t mix(std::uint64_t hash, std::uint64_t value) { return (hash ^ value) * 0x100000001B3U; }

std::uint64_t fuzz_hash(const Tokenizer& t, std::uint64_t block) {
  std::uint64_t hash = 0xCBF29CE484222325U;
  for (std::uint64_t k = 0; k < 100; ++k) {
    for (const std::int32_t id : t.encode(fuzz_text(block * 100 + k), false)) hash = mix(hash, static_cast<std::uint64_t>(id));
    hash = mix(hash, 0x7FFFFFFF);
  }
  return hash;
}

std::string hex(std::uint64_t value) {
  char text[17];
  std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(value));
  return text;
}

std::string streamed(const Tokenizer& t, const Ids& ids, bool skip) {
  TokenStream stream(t, skip);
  std::string out;
  for (const std::int32_t id : ids) out += stream.push(id);
  return out + stream.finish();
}

std::string read_text(const std::string& path) {
  std::ostringstream out;
  out << std::ifstream(path, std::ios::binary).rdbuf();
  return out.str();
}

}  // namespace

TEST_CASE("byte-level BPE: ids and texts of transformers") {
  for (const std::string name : {"gpt2", "llama3", "qwen2"}) {
    CAPTURE(name);
    const Tokenizer t = Tokenizer::from_directory(m2lm_test::golden("bpe/" + name));
    const ConfigValue golden = ConfigValue::parse_file(m2lm_test::golden("bpe/" + name + "/cases.json"));
    CHECK(t.vocab_size() == golden.get<std::int32_t>("vocab"));
    const ConfigValue cases = golden["cases"];
    REQUIRE(cases.size() > 100);
    for (std::size_t i = 0; i < cases.size(); ++i) {
      const auto text = cases.at(i).get<std::string>("text");
      CAPTURE(text);
      CHECK(t.encode(text) == cases.at(i).get_list<std::int32_t>("ids"));
    }
    const ConfigValue decodes = golden["decode"];
    for (std::size_t i = 0; i < decodes.size(); ++i) {
      const Ids ids = decodes.at(i).get_list<std::int32_t>("ids");
      CAPTURE(i);
      CHECK(t.decode(ids, false) == decodes.at(i).get<std::string>("text"));
      CHECK(t.decode(ids, true) == decodes.at(i).get<std::string>("skipped"));
      CHECK(streamed(t, ids, false) == decodes.at(i).get<std::string>("text"));
    }
    const auto fuzz = golden.get_list<std::string>("fuzz");
    REQUIRE(fuzz.size() == 100);
    for (std::size_t block = 0; block < fuzz.size(); ++block) {
      CAPTURE(block);
      CHECK(hex(fuzz_hash(t, block)) == fuzz[block]);
    }
  }
}

TEST_CASE("byte-level BPE: special tokens, round trips, malformed text") {
  const Tokenizer llama = Tokenizer::from_directory(m2lm_test::golden("bpe/llama3")),
                  qwen = Tokenizer::from_directory(m2lm_test::golden("bpe/qwen2"));
  const auto begin = llama.token_id("<|begin|>");
  REQUIRE(begin);
  CHECK(llama.is_special(*begin));
  CHECK(llama.encode("").size() == 1);
  CHECK(llama.encode("").front() == *begin);
  CHECK(llama.encode("", false).empty());
  CHECK(qwen.encode("").empty());
  CHECK(llama.piece(*begin) == "<|begin|>");
  CHECK_FALSE(llama.token_id("<nothing>"));
  for (std::uint64_t k = 0; k < 300; ++k) {
    const std::string text = fuzz_text(k);
    CHECK(llama.decode(llama.encode(text)) == text);
    std::string bytes;  // any bytes at all: as if each malformed part were U+FFFD
    for (std::size_t i = 0; i < text.size(); ++i) bytes += static_cast<char>(static_cast<unsigned char>(text[i]) ^ (i % 5 == 0 ? 0x81U : 0U));
    const std::string repaired = llama.decode(llama.encode(bytes));
    CHECK(llama.encode(repaired) == llama.encode(bytes));
  }
  CHECK(llama.decode(llama.encode("a\xff\xe2\x82z")) == "a\xef\xbf\xbd\xef\xbf\xbdz");
}

TEST_CASE("byte-level BPE: a real vocabulary") {
  const auto assets = m2lm_test::assets();
  if (!assets || !m2lm::file_exists(*assets + "/whisper/whisper-tiny-hf/tokenizer.json"))
    return m2lm_test::skip("byte-level BPE: a real vocabulary", "no assets");
  const Tokenizer t = Tokenizer::from_directory(*assets + "/whisper/whisper-tiny-hf");
  CHECK(t.encode("<|en|> Hello  world's 12345 <|endoftext|> 'S na\xc3\xafve\n\n x") == Ids{50258, 50363, 50259, 2425, 220, 1002, 311, 34466, 8465,
                                                                                           220, 50257, 922, 50, 1667, 15487, 303, 198, 198,
                                                                                           2031});  // without the end's 50257
  std::uint64_t all = 0xCBF29CE484222325U;
  for (std::uint64_t block = 0; block < 100; ++block) all = mix(all, fuzz_hash(t, block));
  CHECK(hex(all) == "e389385aa7821273");
}

TEST_CASE("byte-level BPE: what is not supported says so") {
  const m2lm_test::TemporaryDirectory dir;
  const std::string json = read_text(m2lm_test::golden("bpe/qwen2/tokenizer.json"));
  const auto with = [&](std::string_view from, std::string_view to) {
    std::string text = json;
    const std::size_t at = text.find(from);
    REQUIRE(at != std::string::npos);
    dir.write("tokenizer.json", text.replace(at, from.size(), to));
    return message_of<CheckpointError>([&] { (void)Tokenizer::from_directory(dir.path()); });
  };
  CHECK(with("\"NFC\"", "\"NFC\"").empty());
  std::string message = with("\"NFC\"", "\"NFKC\"");
  CHECK(has(message, "tokenizer.json: normalizer.type"));
  CHECK(has(message, "NFKC is not supported"));
  message = with("\\\\p{N}|", "\\\\p{N}{1,2}|");
  CHECK(has(message, "tokenizer.json: pre_tokenizer.pretokenizers.0.pattern.Regex"));
  CHECK(has(message, "is not supported; those of GPT-2, LLaMA 3 and Qwen2 are"));
  message = with("\"type\":\"BPE\"", "\"type\":\"Unigram\"");
  CHECK(has(message, "tokenizer.json: model"));
  CHECK(has(message, "type Unigram is not supported"));
  message = with("\"pre_tokenizer\":{\"type\":\"Sequence\"", "\"pre_tokenizer\":{\"type\":\"Metaspace\"");
  CHECK(has(message, "the pre-tokenizer Metaspace is not supported"));
  CHECK(has(message, "tokenizer.model"));
  message = with("\"Isolated\"", "\"Removed\"");
  CHECK(has(message, "behavior"));
  message = with("\"merges\":[", "\"merges\":[[\"no such\",\"a\"],");
  CHECK(has(message, "model.merges.0: merges \"no such\" and \"a\", but \"no such\" is not in the vocabulary"));
  message = with("\"merges\":[", "\"merges\":[\"abc\",");
  CHECK(has(message, "model.merges.0: a merge is two tokens"));
  message = with("\"!\":", "\"!!!!!!!!\":");
  CHECK(has(message, "no token \"!\" for the byte 33"));
  message = with("\"decoder\":{\"type\":\"ByteLevel\"", "\"decoder\":{\"type\":\"WordPiece\"");
  CHECK(has(message, "decoder: this decoder is not supported"));
}
