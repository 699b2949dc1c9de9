// tokenizer.json of a byte-level BPE: any bytes are read or refused, and what was read encodes and decodes text. The input is one byte with
// the length of a text, the text, then the file. The mutator changes values of the JSON, because changes of bytes hardly leave it JSON.
#include "directory.hpp"

#include <m2lm/interop/json.hpp>
#include <m2lm/io/tokenizer.hpp>

#include <algorithm>
#include <cstring>
#include <random>
#include <vector>

extern "C" std::size_t LLVMFuzzerMutate(std::uint8_t* data, std::size_t size, std::size_t max_size);

namespace {

using Json = nlohmann::json;
using Random = std::minstd_rand;

std::size_t below(Random& random, std::size_t n) { return random() % n; }

/// Walks to a random value: deeper with each step, but often not into the large vocabulary.
Json* some_value(Json& root, Random& random) {
  Json* at = &root;
  while (at->is_structured() && !at->empty() && below(random, 5) != 0) {
    auto next = at->begin();
    std::advance(next, static_cast<std::ptrdiff_t>(below(random, at->size())));
    at = &*next;
  }
  return at;
}

Json some_json(Random& random) {
  static const char* const words[] = {"ByteLevel", "BPE", "NFC", "Sequence", "Split", "TemplateProcessing", "Isolated", "a", "", "\xc3\xa9", "<s>", "\xc4\xa0t", "WordPiece"};
  switch (below(random, 7)) {
    case 0: return nullptr;
    case 1: return below(random, 2) == 0;
    case 2: return static_cast<std::int64_t>(below(random, 600)) - 5;
    case 3: return std::uint64_t{1} << below(random, 64);
    case 4: return Json::array();
    case 5: return Json::object();
    default: return words[below(random, std::size(words))];
  }
}

void mutate(Json& root, Random& random) {
  Json* at = some_value(root, random);
  switch (below(random, 8)) {
    case 0: *at = some_json(random); break;
    case 1:
      if (at->is_object() && !at->empty()) at->erase(std::next(at->begin(), static_cast<std::ptrdiff_t>(below(random, at->size()))));
      if (at->is_array() && !at->empty()) at->erase(at->begin() + static_cast<std::ptrdiff_t>(below(random, at->size())));
      break;
    case 2: {
      const Json copy = *some_value(root, random);
      if (!copy.is_structured() || copy.size() < 40) *at = copy;
      break;
    }
    case 3:
      if (at->is_array()) at->push_back(at->empty() ? some_json(random) : (*at)[below(random, at->size())]);
      if (at->is_object()) (*at)[std::string(1 + below(random, 3), static_cast<char>('a' + below(random, 26)))] = some_json(random);
      break;
    case 4:
      if (at->is_number_integer()) *at = static_cast<std::int64_t>(at->get<std::uint64_t>() + below(random, 3) - 1);
      break;
    case 5:
      if (at->is_boolean()) *at = !at->get<bool>();
      break;
    case 6:
      if (at->is_string()) {
        std::uint8_t buffer[48] = {};
        const auto text = at->get<std::string>();
        const std::size_t n = std::min<std::size_t>(text.size(), 32);
        std::memcpy(buffer, text.data(), n);
        *at = std::string(reinterpret_cast<const char*>(buffer), LLVMFuzzerMutate(buffer, n, sizeof(buffer)));
      }
      break;
    default:  // a merge of two tokens that are there, with what it makes
      if (root.contains("model") && root["model"].is_object() && root["model"]["vocab"].is_object() && root["model"]["merges"].is_array()) {
        Json& vocab = root["model"]["vocab"];
        if (vocab.empty() || vocab.size() > 700) break;
        const auto token = [&] { return std::next(vocab.begin(), static_cast<std::ptrdiff_t>(below(random, vocab.size()))).key(); };
        const std::string a = token(), b = token();
        if (a.size() + b.size() > 40) break;
        if (!vocab.contains(a + b)) vocab[a + b] = vocab.size();
        root["model"]["merges"].push_back({a, b});
      }
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static m2lm_fuzz::Directory directory("tokenizer.json");
  if (size == 0 || size < 1U + data[0]) return 0;
  const std::string_view text = m2lm_fuzz::text(data + 1, data[0]);
  directory.put(data + 1 + data[0], size - 1 - data[0]);
  m2lm::Tokenizer tokenizer;
  if (!m2lm_fuzz::accepted([&] { tokenizer = m2lm::Tokenizer::from_directory(directory.path()); })) return 0;
  m2lm_fuzz::accepted([&] {
    for (const bool lead : {false, true}) {
      const std::vector<std::int32_t> ids = tokenizer.encode(text, lead);
      for (const std::int32_t id : ids) m2lm_fuzz::check(tokenizer.contains(id), "ids are of the vocabulary");
      const std::string whole = tokenizer.decode(ids, false);
      std::string pieces;
      m2lm::TokenStream stream(tokenizer, false);
      for (const std::int32_t id : ids) pieces += stream.push(id);
      pieces += stream.finish();
      m2lm_fuzz::check(whole == pieces, "a stream decodes as the whole does");
    }
  });
  for (std::int32_t id = -1; id <= tokenizer.vocab_size() && id < 700; ++id) m2lm_fuzz::accepted([&] { (void)tokenizer.decode({&id, 1}); });
  return 0;
}

extern "C" std::size_t LLVMFuzzerCustomMutator(std::uint8_t* data, std::size_t size, std::size_t max_size, unsigned seed) {
  Random random(seed + 1);
  const std::size_t text = size == 0 ? 0 : 1U + data[0];
  if (size <= text || below(random, 8) == 0) return LLVMFuzzerMutate(data, size, max_size);
  Json root = Json::parse(data + text, data + size, nullptr, false);
  if (root.is_discarded()) return LLVMFuzzerMutate(data, size, max_size);
  for (std::size_t n = 1 + below(random, 4); n > 0; --n) mutate(root, random);
  const std::string json = root.dump(-1, ' ', false, Json::error_handler_t::replace);
  if (text + json.size() > max_size) return LLVMFuzzerMutate(data, size, max_size);
  std::memcpy(data + text, json.data(), json.size());
  return text + json.size();
}
