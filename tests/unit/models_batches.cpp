// Several prompts in one call, scoring, forks, whole prompts in a session that knows their beginning, and media kept by content.
#include "models_support.hpp"

#include <cmath>
#include <map>
#include <set>

namespace {

using namespace m2lm_test;
using m2lm::FinishReason;
using m2lm::GenerateOptions;
using m2lm::Generation;
using m2lm::Image;

constexpr const char* folder = "llava/with_tokenizer";

Vlm talker(int threads = 2, const m2lm::LoadOptions& options = {}) { return Vlm::from_pretrained(golden(folder), Cpu({.threads = threads}), options); }

const Image& picture() {
  static const Image image = m2lm::load_image(golden(std::string(folder) + "/picture.png"));
  return image;
}
Image other_picture() {
  Image image = picture();
  for (std::uint8_t& x : image.pixels) x = static_cast<std::uint8_t>(255 - x);
  return image;
}

/// Of every kind: text, one picture, two of them, ids; none as long as another.
std::vector<Vlm::PromptType> mixed(const Vlm& model) {
  std::vector<Vlm::PromptType> out;
  out.push_back(model.prompt("Hello"));
  out.push_back(model.prompt("<image>\nWhat is it?"));
  out.back().attach<"image">(picture());
  out.push_back(model.raw_prompt("One, two, three, and then some more words to make it long: "));
  out.push_back(model.prompt("<image> and <image>: are they alike?"));
  out.back().attach<"image">(picture()).attach<"image">(other_picture());
  out.push_back(model.prompt(std::vector<std::int32_t>{1, 5, 9, 12}));
  return out;
}

}  // namespace

TEST_CASE("prompts answered together get the answers they get alone") {
  for (const int threads : {1, 2})
    for (const DType weights : {DType::f32, DType::bf16, DType::q4}) {
      const Vlm model = talker(threads, {.precision = Precision{.weights = weights}});
      const std::vector<Vlm::PromptType> prompts = mixed(model);
      for (const double temperature : {0.0, 1.0}) {
        const GenerateOptions options{.max_new_tokens = 24, .temperature = temperature, .seed = 11};
        std::map<std::size_t, std::string> streamed;
        const std::vector<Generation> together =
            model.generate(prompts, options, [&](std::size_t prompt, std::string_view text) { streamed[prompt] += text; });
        REQUIRE(together.size() == prompts.size());
        for (std::size_t i = 0; i < prompts.size(); ++i) {
          CAPTURE(i);
          const Generation alone = model.generate(prompts[i], options);
          CHECK(together[i].tokens == alone.tokens);
          CHECK(together[i].text == alone.text);
          CHECK(together[i].finish_reason == alone.finish_reason);
          CHECK(streamed[i] == alone.text);
          CHECK(together[i].timings.prefill_tokens == alone.timings.prefill_tokens);
          CHECK(together[i].timings.decode_tokens == alone.timings.decode_tokens);
        }
      }
    }
}

TEST_CASE("answers of a batch end one by one") {
  const Vlm model = talker();
  const std::vector<Vlm::PromptType> prompts = mixed(model);
  // Each answer stops at another of its tokens.
  const GenerateOptions all{.max_new_tokens = 30, .temperature = 1, .seed = 5, .ignore_eos = true};
  const std::vector<Generation> whole = model.generate(prompts, all);
  GenerateOptions some = all;
  for (std::size_t i = 0; i + 1 < whole.size(); ++i) some.stop_tokens.push_back(whole[i].tokens[3 * i + 1]);
  const std::vector<Generation> cut = model.generate(prompts, some);
  std::set<std::size_t> lengths;
  for (std::size_t i = 0; i < cut.size(); ++i) {
    CHECK(std::equal(cut[i].tokens.begin(), cut[i].tokens.end(), whole[i].tokens.begin()));
    CHECK(cut[i].tokens == model.generate(prompts[i], some).tokens);
    lengths.insert(cut[i].tokens.size());
  }
  CHECK(lengths.size() > 2);
}

TEST_CASE("a batch refuses what it cannot do, and gives no answer when one prompt does not fit") {
  const Vlm model = talker();
  std::vector<Vlm::PromptType> prompts = mixed(model);
  CHECK(model.generate(std::span<const Vlm::PromptType>()).empty());
  const auto ignore = [](std::string_view) {};
  CHECK_THROWS_WITH_AS(model.generate(prompts, {.max_new_tokens = 2, .on_text = ignore}), doctest::Contains("cannot say whose text it gets"), m2lm::OptionError);
  const std::vector<Generation> none = model.generate(prompts, {.max_new_tokens = 0});
  for (const Generation& g : none) CHECK((g.tokens.empty() && g.finish_reason == FinishReason::length));
  prompts.push_back(model.prompt(some_ids(model.decoder_config().max_position_embeddings + 1, 90)));
  CHECK_THROWS_AS(model.generate(prompts, {.max_new_tokens = 2}), m2lm::CapacityError);
}

TEST_CASE("a score is the sum of the logarithms of the probabilities that the logits give") {
  const Vlm model = talker();
  auto prompt = model.prompt("<image>\nWhat is it?");
  prompt.attach<"image">(picture());
  const std::vector<std::vector<std::int32_t>> continuations{{7}, {9, 11, 13, 40, 8}, {}, {30, 31}, model.generate(prompt, {.max_new_tokens = 4, .ignore_eos = true}).tokens};
  const std::vector<m2lm::Score> scores = model.score(prompt, continuations);
  REQUIRE(scores.size() == continuations.size());
  const std::vector<std::int32_t> ids = model.input_ids(prompt);
  const std::int64_t vocabulary = model.decoder_config().vocab_size;
  for (std::size_t i = 0; i < continuations.size(); ++i) {
    CAPTURE(i);
    auto whole = model.prompt(ids);
    whole.ids.insert(whole.ids.end(), continuations[i].begin(), continuations[i].end());
    whole.attach<"image">(picture());
    const Tensor<float> logits = model.logits(whole);
    double expected = 0;
    bool greedy = true;
    for (std::size_t t = 0; t < continuations[i].size(); ++t) {
      const float* row = logits.data() + static_cast<std::int64_t>(ids.size() + t - 1) * vocabulary;
      double sum = 0;
      for (std::int64_t j = 0; j < vocabulary; ++j) sum += std::exp(static_cast<double>(row[j]));
      expected += static_cast<double>(row[continuations[i][t]]) - std::log(sum);
      greedy = greedy && row[continuations[i][t]] == *std::max_element(row, row + vocabulary);
    }
    CHECK(scores[i].log_probability == doctest::Approx(expected).epsilon(1e-12));
    CHECK(scores[i].tokens == static_cast<std::int64_t>(continuations[i].size()));
    CHECK(scores[i].greedy == greedy);
  }
  CHECK(scores.back().greedy);
  CHECK_FALSE(scores[1].greedy);
  const std::vector<std::vector<std::int32_t>> outside{{5}, {static_cast<std::int32_t>(vocabulary)}};
  CHECK_THROWS_WITH_AS(model.score(prompt, outside), doctest::Contains("of continuation 1 is outside the vocabulary"), m2lm::InputError);
}

TEST_CASE("no way leads beyond the positions of the model") {
  const Vlm model = talker();
  const std::int64_t most = model.decoder_config().max_position_embeddings;
  CHECK_THROWS_AS(model.logits(model.prompt(some_ids(most + 1, 90))), m2lm::CapacityError);
  CHECK_THROWS_AS(model.hidden_states(model.prompt(some_ids(most + 1, 90))), m2lm::CapacityError);
  CHECK_NOTHROW(model.logits(model.prompt(some_ids(most, 90))));
  const auto prompt = model.prompt(some_ids(most - 3, 90));
  const std::vector<std::vector<std::int32_t>> fits{{5, 6, 7, 8}}, too_long{{5}, {5, 6, 7, 8, 9}};  // the last token needs no position
  CHECK(model.score(prompt, fits).front().tokens == 4);
  CHECK_THROWS_WITH_AS(model.score(prompt, too_long), doctest::Contains("a continuation of 5 tokens"), m2lm::CapacityError);
}

TEST_CASE("hidden states that are asked for twice are given twice") {
  const Vlm model = talker();
  const auto prompt = model.prompt(some_ids(5, 90));
  const std::vector<int> layers{1, 0, 1};
  const auto states = model.hidden_states(prompt, layers);
  REQUIRE(states.size() == 3);
  CHECK(same_bits(states[0], states[2]));
  CHECK_FALSE(same_bits(states[0], states[1]));
}

TEST_CASE("text is scored by the tokens that it becomes behind the prompt") {
  const Vlm model = talker();
  const std::vector<std::string> continuations{" a cat", " dog", "", "s of it"};
  for (const bool raw : {false, true}) {
    const auto prompt = raw ? model.raw_prompt("It is") : model.prompt("Is it?");
    const std::vector<m2lm::Score> scores = model.score(prompt, continuations);
    const std::vector<std::int32_t> alone = model.input_ids(prompt);
    for (std::size_t i = 0; i < continuations.size(); ++i) {
      CAPTURE(continuations[i]);
      std::vector<std::int32_t> together;
      if (raw) {
        together = model.input_ids(model.raw_prompt("It is" + continuations[i]));
      } else {
        const std::vector<m2lm::Message> messages{{m2lm::Role::user, "Is it?"}};
        together = model.tokenizer().encode(render(model.chat_template(), messages) + (continuations[i].empty() ? "" : std::string(model.chat_template().answer_prefix)) + continuations[i], model.chat_template().add_bos);
      }
      const auto parting = std::mismatch(alone.begin(), alone.end(), together.begin(), together.end());
      const std::vector<std::vector<std::int32_t>> rest{{parting.second, together.end()}};
      const std::vector<std::int32_t> before(alone.begin(), parting.first);
      const m2lm::Score expected = model.score(model.prompt(before), rest).front();
      CHECK(scores[i].log_probability == doctest::Approx(expected.log_probability).epsilon(1e-12));
      CHECK(scores[i].tokens == expected.tokens);
    }
  }
  CHECK_THROWS_WITH_AS(model.score(model.prompt(std::vector<std::int32_t>{1, 5}), continuations), doctest::Contains("is continued by token ids, not by text"),
                       m2lm::InputError);
}

TEST_CASE("a fork goes on by itself") {
  for (const DType weights : {DType::f32, DType::bf16}) {
    const Vlm model = talker(2, {.precision = Precision{.weights = weights}});
    const GenerateOptions options{.max_new_tokens = 40, .temperature = 1, .ignore_eos = true};
    auto prompt = model.prompt("<image>\nTell me.");
    prompt.attach<"image">(picture());
    auto trunk = model.session({.seed = 4});
    trunk.generate(prompt, options);
    const std::int64_t length = trunk.length();
    auto branch = trunk.fork();
    CHECK(branch.length() == length);
    CHECK(std::equal(branch.history().begin(), branch.history().end(), trunk.history().begin(), trunk.history().end()));
    const auto next = model.prompt("And now?");
    auto other = trunk.fork();
    const Generation of_other = other.generate(model.prompt("Something else, at length?"), options);
    const Generation of_branch = branch.generate(next, options), of_trunk = trunk.generate(next, options);
    CHECK(of_branch.tokens == of_trunk.tokens);  // the random numbers are copied too
    CHECK(of_other.tokens != of_trunk.tokens);
    // A fork outlives what it came from.
    auto orphan = [&] { return trunk.fork(); }();
    CHECK(orphan.generate(next, options).tokens.size() == 40);
  }
}

TEST_CASE("a whole prompt computes only what the session does not hold") {
  const Vlm model = talker();
  const GenerateOptions options{.max_new_tokens = 6, .ignore_eos = true};
  auto session = model.session();
  const auto complete = [&](const Vlm::PromptType& prompt, std::int64_t computed) {
    const Generation fresh = model.generate(prompt, options), here = session.complete(prompt, options);
    CHECK(here.tokens == fresh.tokens);
    CHECK(here.timings.prefill_tokens == computed);
    return here;
  };
  std::vector<std::int32_t> ids = some_ids(20, 90);
  ids[0] = 1;
  Generation answer = complete(model.prompt(ids), 20);
  // The conversation so far and more: what was answered is there, but for its last token.
  ids.insert(ids.end(), answer.tokens.begin(), answer.tokens.end());
  ids.insert(ids.end(), {4, 8, 15});
  complete(model.prompt(ids), 4);
  // The same again: one position is needed for its logits.
  complete(model.prompt(ids), 1);
  // Another way from the tenth on, and then back to the beginning.
  ids.resize(15);
  ids[10] = 77;
  complete(model.prompt(ids), 5);
  complete(model.prompt(std::vector<std::int32_t>{2, 3}), 2);

  const auto ask = [&](const Image& first, const Image& second, std::string_view question) {
    auto prompt = model.prompt(std::string("<image> <image>\n") + std::string(question));
    prompt.attach<"image">(first).attach<"image">(second);
    return prompt;
  };
  const auto tokens = [&](const Vlm::PromptType& p) { return static_cast<std::int64_t>(model.input_ids(p).size()); };
  const auto one = ask(picture(), other_picture(), "Which?"), two = ask(picture(), other_picture(), "Who?"), three = ask(picture(), picture(), "Who?");
  const std::vector<std::int32_t> a = model.input_ids(one), b = model.input_ids(two);
  const auto common = std::mismatch(a.begin(), a.end(), b.begin(), b.end()).first - a.begin();
  session = model.session();
  complete(one, tokens(one));
  complete(two, tokens(two) - common);
  // Equal ids, but another picture: from there on all is computed.
  const std::int32_t image = model.placeholder_id<"image">();
  const auto second_picture = std::find(std::find_if_not(std::find(b.begin(), b.end(), image), b.end(), [&](std::int32_t id) { return id == image; }), b.end(), image) - b.begin();
  complete(three, tokens(three) - second_picture);
}

TEST_CASE("the same picture is encoded once, whoever asks") {
  const Vlm model = talker();
  auto ask = model.prompt("<image>\nWhat?");
  ask.attach<"image">(picture());
  const Tensor<float> first = model.logits(ask), second = model.logits(ask);
  CHECK(same_bits(first, second));
  CHECK(model.media_cache_stats().misses == 1);
  CHECK(model.media_cache_stats().hits == 1);
  auto pair = model.prompt("<image><image>");
  pair.attach<"image">(picture()).attach<"image">(other_picture());
  model.generate(pair, {.max_new_tokens = 1});
  CHECK(model.media_cache_stats().misses == 2);
  CHECK(model.media_cache_stats().hits == 2);
  CHECK(model.media_cache_stats().entries == 2);
  // One pixel differs.
  Image nearly = picture();
  nearly.pixels[nearly.pixels.size() / 2] ^= 1;
  auto odd = model.prompt("<image>\nWhat?");
  odd.attach<"image">(nearly);
  model.logits(odd);
  CHECK(model.media_cache_stats().misses == 3);

  const Vlm without = talker(2, {.media_cache_bytes = 0});
  CHECK(same_bits(without.logits(ask), first));
  CHECK(same_bits(without.logits(ask), first));
  CHECK(without.media_cache_stats().entries == 0);
  CHECK(without.media_cache_stats().hits == 0);
}

TEST_CASE("kept media stay within their bound, and the least recently used go first") {
  const std::size_t each = talker().encode<"image">(picture()).span().size_bytes() + sizeof(m2lm::detail::EncodedMedia<float>);
  const Vlm model = talker(1, {.media_cache_bytes = 3 * each});
  const auto look = [&](std::uint8_t shade) {
    auto prompt = model.prompt("<image>");
    Image image = picture();
    image.pixels[0] = shade;
    prompt.attach<"image">(image);
    const std::size_t hits = model.media_cache_stats().hits;
    model.input_ids(prompt);
    CHECK(model.media_cache_stats().bytes <= 3 * each);
    return model.media_cache_stats().hits > hits;
  };
  for (std::uint8_t shade = 1; shade <= 3; ++shade) CHECK_FALSE(look(shade));
  CHECK(model.media_cache_stats().entries == 3);
  CHECK(look(1));
  CHECK_FALSE(look(4));  // 2 goes
  CHECK(look(1));
  CHECK(look(3));
  CHECK_FALSE(look(2));
  CHECK(model.media_cache_stats().entries == 3);
}

TEST_CASE("content keys tell contents apart") {
  const auto key = [](auto... parts) {
    m2lm::ContentHash hash;
    (hash.bytes(std::as_bytes(std::span(std::string_view(parts)))), ...);
    return hash.key();
  };
  CHECK(key("abcdefgh") == key("abcdefgh"));
  CHECK_FALSE(key("abcdefgh") == key("abcdefg", "h"));  // pieces are told apart
  CHECK_FALSE(key("") == key("", ""));
  std::set<std::pair<std::uint64_t, std::uint64_t>> keys;
  std::string text(100, '\0');
  for (std::size_t length = 0; length <= text.size(); ++length) {
    const m2lm::ContentKey k = key(std::string_view(text).substr(0, length));
    keys.insert({k.high, k.low});
  }
  for (std::size_t i = 0; i < text.size(); ++i)
    for (int bit = 0; bit < 8; ++bit) {
      std::string changed = text;
      changed[i] = static_cast<char>(1 << bit);
      const m2lm::ContentKey k = key(changed);
      keys.insert({k.high, k.low});
    }
  CHECK(keys.size() == 101 + 800);
}
