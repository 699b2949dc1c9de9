// Models in GGUF form against the same models as transformers has them, and llama.cpp's text from real quantised weights.
#include "models_support.hpp"

#include <cstdio>

namespace {

using namespace m2lm_test;
namespace t = m2lm::testing;

template <class M>
double tolerance_of(const M& model) {
  const auto& c = model.decoder_config();
  return t::network_tolerance(t::epsilon_f32, t::epsilon_f32, std::max(c.hidden_size, c.intermediate_size), c.num_layers);
}

}  // namespace

TEST_CASE("decoders in GGUF: hidden states, logits and greedy tokens equal transformers'") {
  for (const std::string name : {"gqa_llama3_tied_f16", "mqa_llama3_hd10", "mqa_linear_tied_hd6", "mha_wide_heads_bf16"}) {
    CAPTURE(name);
    const Safetensors record = Safetensors::open(golden("llama/" + name + "/golden.safetensors"));
    const Lm model = Lm::from_pretrained(golden("gguf/" + name + ".gguf")), twin = Lm::from_pretrained(golden("llama/" + name));
    CHECK_MESSAGE(model.load_report().string().empty(), model.load_report().string());
    const auto prompt = model.prompt(ids_of(record.tensor("input_ids")));
    const auto states = model.hidden_states(prompt);
    for (std::size_t i = 0; i < states.size(); ++i)
      M2LM_CHECK_CLOSE(states[i], record.tensor("hidden_states." + std::to_string(i)), tolerance_of(model),
                       name + " hidden_states." + std::to_string(i));
    const auto logits = model.logits(prompt);
    M2LM_CHECK_CLOSE(logits, record.tensor("logits"), tolerance_of(model), name + " logits");
    const std::vector<std::int32_t> greedy = ids_of(record.tensor("greedy"));
    CHECK(model.generate(prompt, {.max_new_tokens = static_cast<std::int64_t>(greedy.size()), .ignore_eos = true}).tokens == greedy);
    // The same weights in the same order. (LLaMA 3's rule is stored as its factors, rounded to f32.)
    if (!has(name, "llama3")) CHECK(same_bits(logits, twin.logits(twin.prompt(ids_of(record.tensor("input_ids"))))));
    const auto &a = model.decoder_config(), &b = twin.decoder_config();
    CHECK(a.num_kv_heads == b.num_kv_heads);
    CHECK(a.head_dim == b.head_dim);
    CHECK(a.rms_norm_eps == doctest::Approx(b.rms_norm_eps));
    CHECK(a.max_position_embeddings == b.max_position_embeddings);
    CHECK(a.tie_word_embeddings == b.tie_word_embeddings);
  }
}

TEST_CASE("a LLaVA in GGUF answers a picture as its Hugging Face directory does") {
  const std::string source = golden("llava/with_tokenizer");
  const m2lm::ConfigValue record = m2lm::ConfigValue::parse_file(source + "/golden.json");
  const Safetensors tensors = Safetensors::open(source + "/golden.safetensors");
  const m2lm::Image picture = m2lm::load_image(source + "/picture.png");
  const Vlm twin = Vlm::from_pretrained(source);

  const TemporaryDirectory legacy;  // older names of fc1 and fc2, and only the blocks that are run
  std::filesystem::copy_file(golden("gguf/llava/text.gguf"), legacy / "text.gguf");
  std::filesystem::copy_file(golden("gguf/legacy/mmproj.gguf"), legacy / "tiny-mmproj-f32.gguf");
  for (const std::string& path : {golden("gguf/llava"), golden("gguf/llava/text.gguf"), legacy.path(), legacy / "text.gguf"}) {
    CAPTURE(path);
    const Vlm model = Vlm::from_pretrained(path);
    CHECK_MESSAGE(model.load_report().string().empty(), model.load_report().string());
    CHECK(&model.chat_template() == &twin.chat_template());
    const auto ask = [&](const Vlm& m) {
      auto prompt = m.prompt("<image>\n" + record.get<std::string>("question"));
      prompt.attach<"image">(picture);
      return prompt;
    };
    const auto prompt = ask(model);
    CHECK(model.input_ids(prompt) == record.get_list<std::int32_t>("input_ids"));
    M2LM_CHECK_CLOSE(model.logits(prompt), tensors.tensor("logits"), 2 * tolerance_of(model), path);
    // Mean and deviation of the pixels are f32 in the file, so features may differ in the last bits; given the same ones, nothing does.
    const auto features = twin.encode<"image">(picture);
    M2LM_CHECK_CLOSE(model.encode<"image">(picture), features, 1e-6, path + " features");
    auto with_features = model.prompt("<image>\n" + record.get<std::string>("question"));
    with_features.attach_embeddings<"image">(AnyTensor(features.clone()));
    CHECK(same_bits(model.logits(with_features), twin.logits(ask(twin))));
    const auto greedy = record.get_list<std::int32_t>("greedy_ids");
    const m2lm::Generation answer = model.generate(prompt, {.max_new_tokens = static_cast<std::int64_t>(greedy.size()), .ignore_eos = true});
    CHECK(answer.tokens == greedy);
    CHECK(answer.text == record.get<std::string>("greedy_text"));
  }
}

// llama.cpp rounds what enters a product with quantised weights to 8 bits. tests/golden/judge_gguf_story.py followed its text with
// transformers: in f32 one token of 100 is another one, by 0.01; with that rounding none is.
TEST_CASE("stories15M in Q4_0 tells llama.cpp's story, up to the token where its rounding decides") {
  const std::string path = asset_file("llama/stories15M-Q4_0.gguf");
  M2LM_SKIP_WITHOUT(path);
  M2LM_SKIP_WITHOUT(asset_file("golden/llama.cpp/stories15M_greedy.txt"));
  const m2lm::ConfigValue judge = m2lm::ConfigValue::parse_file(golden("gguf/story.json"));
  const auto ids = judge.get_list<std::int32_t>("ids"), best = judge.get_list<std::int32_t>("best");
  const auto begin = judge.get<std::size_t>("prompt");
  REQUIRE(ids.size() == begin + best.size());
  CHECK(judge["leads_with_rounded_activations"].keys().empty());
  REQUIRE(judge["leads"].keys().size() == 1);
  const std::string parting = judge["leads"].keys().front();
  const double lead = judge["leads"].get<double>(parting);

  const Lm model = Lm::from_pretrained(path, Cpu({.threads = 2}));
  CHECK_MESSAGE(model.load_report().string().empty(), model.load_report().string());
  CHECK(model.decoder_config().max_position_embeddings == 128);
  const std::string stories = m2lm::read_file(asset_file("golden/llama.cpp/stories15M_greedy.txt"));
  CHECK(model.tokenizer().encode(model.tokenizer().decode(ids)) == ids);
  CHECK(has(stories, "== stories15M-Q4_0\n " + model.tokenizer().decode(ids)));

  // Along llama.cpp's text, the best token is the judge's everywhere, and llama.cpp's everywhere but there.
  const auto logits = model.logits(model.prompt(ids));
  const std::int64_t vocab = logits.shape()[1];
  for (std::size_t t = begin; t < ids.size(); ++t) {
    CAPTURE(t);
    const float* row = logits.data() + static_cast<std::int64_t>(t - 1) * vocab;
    const auto chosen = static_cast<std::int32_t>(std::max_element(row, row + vocab) - row);
    CHECK(chosen == best[t - begin]);
    const bool parts = std::to_string(t) == parting;
    CHECK((chosen == ids[t]) == !parts);
    if (parts) CHECK(static_cast<double>(row[chosen] - row[ids[t]]) == doctest::Approx(lead).epsilon(0.02));
  }
  // And told from its beginning it is the same story up to there.
  const auto same = static_cast<std::size_t>(std::stoi(parting));
  const m2lm::Generation told = model.generate(model.raw_prompt("Once upon a time"), {.max_new_tokens = 110, .ignore_eos = true});
  std::vector<std::int32_t> expected(ids.begin() + static_cast<std::ptrdiff_t>(begin), ids.begin() + static_cast<std::ptrdiff_t>(same));
  expected.push_back(best[same - begin]);
  CHECK(std::vector<std::int32_t>(told.tokens.begin(), told.tokens.begin() + static_cast<std::ptrdiff_t>(expected.size())) == expected);
  const std::string text = " Once upon a time" + told.text;
  const std::size_t at = stories.find("== stories15M-Q4_0\n") + 19;
  std::size_t characters = 0;
  while (characters < text.size() && text[characters] == stories[at + characters]) ++characters;
  std::printf("stories15M-Q4_0: %zu characters of llama.cpp's text, then its rounding decides (lead %.4f)\n", characters, lead);
  CHECK(characters > 380);
}

TEST_CASE("saved, a GGUF model is a Hugging Face directory with the same names and bits") {
  const TemporaryDirectory directory;
  const Vlm model = Vlm::from_pretrained(golden("gguf/llava"));
  model.save_pretrained(directory / "saved");
  const Vlm again = Vlm::from_pretrained(directory / "saved");
  const auto ask = [&](const Vlm& m) {
    auto prompt = m.prompt(ids_of(Safetensors::open(golden("llava/with_tokenizer/golden.safetensors")).tensor("input_ids")));
    prompt.attach<"image">(m2lm::load_image(golden("llava/with_tokenizer/picture.png")));
    return prompt;
  };
  M2LM_CHECK_CLOSE(again.logits(ask(again)), model.logits(ask(model)), 1e-5, "saved");  // CLIP's own mean and deviation, not in f32
  auto saved = m2lm::Checkpoint::open(directory / "saved").names(), original = m2lm::Checkpoint::open(golden("llava/with_tokenizer")).names();
  std::sort(saved.begin(), saved.end());
  std::sort(original.begin(), original.end());
  CHECK(saved == original);
  for (const std::string& name : original) {
    const m2lm::Checkpoint a = m2lm::Checkpoint::open(directory / "saved"), b = m2lm::Checkpoint::open(golden("llava/with_tokenizer"));
    const AnyTensor *x = a.find(name), *y = b.find(name);
    REQUIRE((x != nullptr && y != nullptr));
    CHECK_MESSAGE((x->shape() == y->shape() && std::equal(x->data(), x->data() + x->bytes(), y->data())), name);
  }
  // Factors of the frequencies survive, too.
  const Lm text = Lm::from_pretrained(golden("gguf/mqa_llama3_hd10.gguf"));
  text.save_pretrained(directory / "text");
  const Lm twin = Lm::from_pretrained(directory / "text");
  CHECK(same_bits(text.logits(text.prompt({1, 2, 3, 4})), twin.logits(twin.prompt({1, 2, 3, 4}))));
}

TEST_CASE("a companion without a token for pictures, and names of files that decide nothing or too much") {
  const TemporaryDirectory directory;
  std::filesystem::copy_file(golden("gguf/llava/mmproj.gguf"), directory / "mmproj.gguf");
  const std::string alone = message_of<m2lm::CheckpointError>([&] { Vlm::from_pretrained(directory.path()); });
  CHECK_MESSAGE((has(alone, directory.path()) && has(alone, "0 GGUF files")), alone);
  std::filesystem::copy_file(golden("gguf/llava/text.gguf"), directory / "text.gguf");
  CHECK(Vlm::from_pretrained(directory.path()).decoder_config().vocab_size == 352);

  // The text model renamed in place: "<image>" is no token of it any more, so one behind the vocabulary stands for the picture.
  std::string bytes = m2lm::read_file(directory / "text.gguf");
  bytes.replace(bytes.find("<image>"), 7, "<other>");
  directory.write("text.gguf", bytes);
  const Vlm model = Vlm::from_pretrained(directory / "text.gguf");
  auto prompt = model.raw_prompt("<image> What?");
  prompt.attach<"image">(m2lm::load_image(golden("llava/with_tokenizer/picture.png")));
  const auto ids = model.input_ids(prompt);
  CHECK(std::count(ids.begin(), ids.end(), 352) == 4);
  CHECK(model.generate(prompt, {.max_new_tokens = 2, .repetition_penalty = 1.5, .ignore_eos = true}).tokens.size() == 2);

  // A companion of another width: an error in a directory, not looked at beside a file that was named.
  const std::string narrow = golden("gguf/mha_wide_heads_bf16.gguf");
  std::filesystem::copy_file(narrow, directory / "text.gguf", std::filesystem::copy_options::overwrite_existing);
  const std::string mismatch = message_of<m2lm::CheckpointError>([&] { Lm::from_pretrained(directory.path()); });
  CHECK_MESSAGE((has(mismatch, "mmproj.gguf") && has(mismatch, "32") && has(mismatch, "36")), mismatch);
  CHECK(Lm::from_pretrained(directory / "text.gguf").decoder_config().head_dim == 18);

  std::filesystem::copy_file(narrow, directory / "more.gguf");
  const std::string several = message_of<m2lm::CheckpointError>([&] { Lm::from_pretrained(directory.path()); });
  CHECK_MESSAGE((has(several, "more.gguf, text.gguf") && has(several, "give the path")), several);
  std::filesystem::remove(directory / "more.gguf");
  std::filesystem::copy_file(golden("gguf/legacy/mmproj.gguf"), directory / "other-mmproj.gguf");
  CHECK(has(message_of<m2lm::CheckpointError>([&] { Lm::from_pretrained(directory.path()); }), "2 GGUF companions"));
  CHECK(has(message_of<m2lm::CheckpointError>([&] { Lm::from_pretrained(directory / "none.gguf"); }), "none.gguf"));
}

TEST_CASE("metadata that do not fit are errors that name file and key") {
  const TemporaryDirectory directory;
  const std::string whole = m2lm::read_file(golden("gguf/mqa_linear_tied_hd6.gguf"));
  const auto refused = [&](std::string_view key, std::string_view value, std::initializer_list<std::string_view> said) {
    std::string bytes = whole;
    const std::size_t at = bytes.find(key);
    REQUIRE(at != std::string::npos);
    bytes.replace(at + key.size(), value.size(), value);
    const std::string path = directory.write("changed.gguf", bytes);
    const std::string message = message_of<m2lm::CheckpointError>([&] { Lm::from_pretrained(path); });
    CHECK_MESSAGE(has(message, "changed.gguf"), message);
    for (const std::string_view part : said) CHECK_MESSAGE(has(message, part), message, " / ", std::string(part));
  };
  const auto number = [](std::uint32_t value) {
    std::string out = {4, 0, 0, 0};
    for (unsigned i = 0; i < 32; i += 8) out += static_cast<char>(static_cast<unsigned char>(value >> i));
    return out;
  };
  using namespace std::string_literals;
  refused("general.architecture", "\x08\0\0\0\x05\0\0\0\0\0\0\0qwen2"s, {"general.architecture", "\"qwen2\"", "llama is"});
  refused("llama.block_count", number(3), {"model.layers.2.", "missing"});
  refused("llama.block_count", number(0), {"num_hidden_layers = 0"});
  refused("llama.attention.head_count", number(0), {"llama.attention.head_count", "at least 1"});
  refused("llama.attention.head_count_kv", number(2), {"5 attention heads do not share 2"});
  refused("llama.attention.key_length", number(8), {"llama.attention.value_length", "which have 8"});
  refused("llama.rope.dimension_count", number(4), {"llama.rope.dimension_count", "6 values"});
  refused("llama.rope.scaling.type", "\x08\0\0\0\x06\0\0\0\0\0\0\0linexr"s, {"llama.rope.scaling.type", "linexr"});
  refused("llama.context_lengt", "g"s, {"llama.context_length", "is missing"});
  refused("token_embd.weigh", "s"s, {"token_embd.weight"});
  refused("blk.0.attn_", "z"s, {"is missing", "blk.0.attn_zorm.weight is unexpected"});
}
