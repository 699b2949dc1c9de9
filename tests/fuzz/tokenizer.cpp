// tokenizer.model: any bytes are read or refused, and what was read encodes and decodes text. The input is one byte with the length
// of a text, the text, then the model.
#include "directory.hpp"

#include <m2lm/io/tokenizer.hpp>

#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static m2lm_fuzz::Directory directory("tokenizer.model");
  if (size == 0 || size < 1U + data[0]) return 0;
  const std::string_view text = m2lm_fuzz::text(data + 1, data[0]);
  directory.put(data + 1 + data[0], size - 1 - data[0]);
  m2lm::Tokenizer tokenizer;
  if (!m2lm_fuzz::accepted([&] { tokenizer = m2lm::Tokenizer::from_directory(directory.path()); })) return 0;
  m2lm_fuzz::accepted([&] {
    const std::vector<std::int32_t> ids = tokenizer.encode(text);
    for (const std::int32_t id : ids) m2lm_fuzz::check(id >= 0 && id < tokenizer.vocab_size(), "ids are of the vocabulary");
    const std::string whole = tokenizer.decode(ids, false);
    std::string pieces;
    m2lm::TokenStream stream(tokenizer, false);
    for (const std::int32_t id : ids) pieces += stream.push(id);
    pieces += stream.finish();
    m2lm_fuzz::check(whole == pieces, "a stream decodes as the whole does");
  });
  for (std::int32_t id = -1; id <= tokenizer.vocab_size() && id < 1000; ++id) m2lm_fuzz::accepted([&] { (void)tokenizer.decode({&id, 1}); });
  return 0;
}
