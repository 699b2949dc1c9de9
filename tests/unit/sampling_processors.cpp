// SamplingOptions and Sampler against transformers' logits processors, and the distribution of what is drawn.
#include <m2lm/m2lm.hpp>

#include <doctest/doctest.h>
#include <nlohmann/json.hpp>

#include <support/environment.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <limits>
#include <new>
#include <string>
#include <vector>

// Counts what the sampler would take from the heap. Not inlined: g++ 12 would compare free with a new that it does not see through.
static std::size_t allocations = 0;
[[gnu::noinline]] void* operator new(std::size_t n) {
  ++allocations;
  if (void* p = std::malloc(n ? n : 1)) return p;
  throw std::bad_alloc();
}
[[gnu::noinline]] void operator delete(void* p) noexcept { std::free(p); }
[[gnu::noinline]] void operator delete(void* p, std::size_t) noexcept { std::free(p); }

namespace {

using m2lm::Rng;
using m2lm::Sampler;
using m2lm::SamplingOptions;

constexpr float removed = -std::numeric_limits<float>::infinity();
constexpr float nan_value = std::numeric_limits<float>::quiet_NaN();
constexpr float infinity = std::numeric_limits<float>::infinity();

nlohmann::json golden() {
  std::ifstream file(m2lm_test::source_file("tests/golden/sampling/sampling.json"));
  REQUIRE(file.good());
  return nlohmann::json::parse(file);
}

SamplingOptions options_of(const nlohmann::json& j) {
  SamplingOptions o;
  o.temperature = j.value("temperature", 1.0);
  o.top_k = j.value("top_k", 0);
  o.top_p = j.value("top_p", 1.0);
  o.min_p = j.value("min_p", 0.0);
  o.repetition_penalty = j.value("repetition_penalty", 1.0);
  return o;
}

std::vector<float> floats_of(const nlohmann::json& j) {
  std::vector<float> out;
  for (const auto& x : j) out.push_back(x.is_null() ? removed : x.get<float>());
  return out;
}

/// Processes one row.
std::vector<float> processed(const SamplingOptions& options, std::vector<float> logits, const std::vector<std::int32_t>& history = {}) {
  const auto vocab = static_cast<std::int64_t>(logits.size());
  Sampler sampler(options, vocab);
  const std::span<const std::int32_t> histories[] = {history};
  sampler.process({logits.data(), {1, vocab}}, histories);
  return logits;
}

std::string message_of(const SamplingOptions& options) {
  try {
    m2lm::validate(options);
  } catch (const m2lm::OptionError& e) {
    return e.what();
  }
  return "";
}

bool has(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

/// The formula of make_sampling_golden.py.
std::vector<float> bulk_logits(std::int64_t vocab, std::int64_t seed) {
  std::vector<float> out;
  for (std::int64_t i = 0; i < vocab; ++i) out.push_back(static_cast<float>((i * 7919 + seed * 104729 + (i * i) % 6007) % 10007 - 5000) / 512.0F);
  return out;
}

}  // namespace

TEST_CASE("options out of range are named with their value") {
  const double nan = std::nan("");
  CHECK(message_of({}).empty());
  CHECK(message_of({.temperature = 1e-6, .top_k = 1, .top_p = 0, .min_p = 1, .repetition_penalty = 0.5}).empty());
  CHECK(has(message_of({.temperature = -0.5}), "temperature = -0.5"));
  CHECK(has(message_of({.temperature = 1e-9}), "temperature = 1e-09"));
  CHECK(has(message_of({.temperature = nan}), "temperature = "));
  CHECK(has(message_of({.temperature = HUGE_VAL}), "temperature = inf"));
  CHECK(has(message_of({.top_k = -3}), "top_k = -3"));
  CHECK(has(message_of({.top_p = 1.01}), "top_p = 1.01"));
  CHECK(has(message_of({.top_p = -0.1}), "top_p = -0.1"));
  CHECK(has(message_of({.top_p = nan}), "top_p = "));
  CHECK(has(message_of({.min_p = 2}), "min_p = 2"));
  CHECK(has(message_of({.min_p = nan}), "min_p = "));
  CHECK(has(message_of({.repetition_penalty = 0}), "repetition_penalty = 0"));
  CHECK(has(message_of({.repetition_penalty = nan}), "repetition_penalty = "));
  CHECK_THROWS_AS(Sampler({.top_k = -1}, 10), m2lm::OptionError);
  CHECK_THROWS_AS(Sampler({}, 0), m2lm::OptionError);
}

TEST_CASE("processors equal transformers': the same tokens stay, with the same logits") {
  int cases = 0;
  const auto file = golden();
  for (const auto& c : file["processors"]) {
    const auto logits = floats_of(c["logits"]), expected = floats_of(c["processed"]);
    const auto actual = processed(options_of(c["options"]), logits, c["history"].get<std::vector<std::int32_t>>());
    CAPTURE(c["options"].dump());
    CAPTURE(c["logits"].dump());
    for (std::size_t i = 0; i < expected.size(); ++i) {
      CAPTURE(i);
      CHECK((actual[i] == removed) == (expected[i] == removed));
      // Two roundings: the penalty's and the temperature's. The expected values have 9 digits, which name an f32 exactly.
      if (expected[i] != removed && actual[i] != removed)
        CHECK(std::abs(actual[i] - expected[i]) <= 2 * std::numeric_limits<float>::epsilon() * std::abs(expected[i]));
    }
    ++cases;
  }
  CHECK(cases >= 80);
}

TEST_CASE("large vocabularies keep the same tokens as transformers") {
  const auto file = golden();
  CHECK(file["bulk"].size() == 6);
  for (const auto& c : file["bulk"]) {
    CAPTURE(c["options"].dump());
    const auto actual = processed(options_of(c["options"]), bulk_logits(c["vocab"], c["seed"]), {0});
    std::vector<std::int64_t> kept;
    for (std::size_t i = 0; i < actual.size(); ++i)
      if (actual[i] != removed) kept.push_back(static_cast<std::int64_t>(i));
    CHECK(kept == c["kept"].get<std::vector<std::int64_t>>());
  }
}

TEST_CASE("rows are processed separately, each with its own history") {
  const SamplingOptions options{.temperature = 0.8, .top_k = 3, .repetition_penalty = 1.5};
  const std::vector<float> a{1, 2, 3, 4, -1}, b{4, 4, -2, 0, 1};
  const std::vector<std::int32_t> ha{3, 4}, hb{0};
  // A row stride that is larger than the vocabulary.
  std::vector<float> both(14, 77.0F);
  std::copy(a.begin(), a.end(), both.begin());
  std::copy(b.begin(), b.end(), both.begin() + 7);
  Sampler sampler(options, 5);
  const std::span<const std::int32_t> histories[] = {ha, hb};
  sampler.process({both.data(), {2, 5}, {7, 1}}, histories);
  CHECK(std::vector<float>(both.begin(), both.begin() + 5) == processed(options, a, ha));
  CHECK(std::vector<float>(both.begin() + 7, both.begin() + 12) == processed(options, b, hb));
  CHECK(both[5] == 77.0F);
  CHECK(both[12] == 77.0F);

  CHECK_THROWS_AS(sampler.process({both.data(), {1, 5}}, histories), m2lm::ShapeError);
  CHECK_THROWS_AS(sampler.process({both.data(), {2, 4}}, histories), m2lm::ShapeError);
  CHECK_THROWS_AS(sampler.process({both.data(), {2, 5}, {7, 2}}, histories), m2lm::ShapeError);
}

TEST_CASE("ids outside the vocabulary, such as placeholders of pictures, count for nothing") {
  const std::vector<float> logits{1, -1, 2};
  CHECK(processed({.temperature = 1, .repetition_penalty = 2}, logits, {-1, -200, 3, 32000, 0}) == std::vector<float>{0.5F, -1, 2});
}

TEST_CASE("greedy takes the lowest id of the largest logits, after the repetition penalty") {
  Rng rng(1);
  const auto greedy = [&](SamplingOptions options, std::vector<float> logits, std::vector<std::int32_t> history = {}) {
    return Sampler(options, static_cast<std::int64_t>(logits.size())).sample(logits, history, rng);
  };
  CHECK(greedy({}, {1, 3, 3, 2}) == 1);
  CHECK(greedy({}, {removed, -5, removed}) == 1);
  CHECK(greedy({}, {-0.0F, 0.0F}) == 0);
  CHECK(greedy({.repetition_penalty = 2}, {1, 3, 2}, {1}) == 2);
  CHECK(greedy({.repetition_penalty = 2}, {-4, -3}, {1}) == 0);
  CHECK(greedy({.top_k = 1, .top_p = 0.1, .min_p = 0.9}, {1, 3, 2}) == 1);
  for (std::int64_t vocab = 1; vocab < 40; ++vocab) {
    const auto logits = bulk_logits(vocab, vocab);
    CHECK(greedy({}, logits) == std::max_element(logits.begin(), logits.end()) - logits.begin());
  }
  CHECK(rng == Rng(1));  // nothing was drawn
}

TEST_CASE("logits from which no token can be chosen are errors that name the token") {
  for (const double temperature : {0.0, 0.7}) {
    const auto fails = [&](std::vector<float> logits) -> std::string {
      Sampler sampler({.temperature = temperature}, static_cast<std::int64_t>(logits.size()));
      Rng rng(0);
      try {
        sampler.sample(logits, {}, rng);
      } catch (const m2lm::Error& e) {
        return e.what();
      }
      return "";
    };
    CHECK(has(fails({1, 2, nan_value}), "token 2 (row 0) is NaN"));
    CHECK(has(fails({nan_value, 2}), "token 0 (row 0) is NaN"));
    CHECK(has(fails({1, infinity, 0}), "token 1 (row 0) is +inf"));
    CHECK(has(fails({removed, removed}), "all 2 logits of row 0 are -inf"));
    CHECK(fails({removed, 3}).empty());
    for (std::size_t at = 0; at < 21; ++at) {
      std::vector<float> many(21, removed);
      many[20 - at] = 1;
      many[at] = nan_value;
      CHECK(has(fails(many), ("token " + std::to_string(at) + " (row 0) is NaN").c_str()));
    }
  }
  // Finite logits that the penalty carries out of the range of f32.
  Sampler sampler({.temperature = 1, .repetition_penalty = 1e-30}, 2);
  std::vector<float> logits{1e20F, 0};
  const std::vector<std::int32_t> history{0};
  Rng rng(0);
  CHECK_THROWS_AS(sampler.sample(logits, history, rng), m2lm::Error);
  std::vector<float> three{1, 2, 3};
  CHECK_THROWS_AS(sampler.sample(three, history, rng), m2lm::ShapeError);
  CHECK_THROWS_AS(sampler.choose(three, rng), m2lm::ShapeError);
}

TEST_CASE("the smallest temperature keeps the most likely token only") {
  Sampler sampler({.temperature = 1e-6}, 4);
  Rng rng(3);
  for (int i = 0; i < 100; ++i) {
    std::vector<float> logits{-900, 1000, 999, 0};
    CHECK(sampler.sample(logits, {}, rng) == 1);
  }
}

TEST_CASE("same seed, same tokens; another seed, others") {
  const SamplingOptions options{.temperature = 1.3, .top_k = 50, .top_p = 0.95, .repetition_penalty = 1.1};
  const auto draw = [&](std::uint64_t seed) {
    Sampler sampler(options, 300);
    Rng rng(seed);
    std::vector<std::int32_t> tokens;
    for (int i = 0; i < 64; ++i) {
      auto logits = bulk_logits(300, i);
      tokens.push_back(sampler.sample(logits, tokens, rng));
    }
    return tokens;
  };
  const auto first = draw(7);
  CHECK(first == draw(7));
  CHECK(first != draw(8));
}

TEST_CASE("a token is drawn by inverse CDF in the order of the ids, from one uniform number") {
  const std::vector<float> logits{std::log(0.25F), removed, std::log(0.5F), std::log(0.25F)};
  Sampler sampler({.temperature = 1}, 4);
  Rng rng(11), twin(11);
  for (int i = 0; i < 1000; ++i) {
    const double u = twin.uniform();
    CHECK(sampler.choose(logits, rng) == (u < 0.25 ? 0 : u < 0.75 ? 2 : 3));
  }
  CHECK(rng == twin);
}

TEST_CASE("frequencies follow the probabilities") {
  const std::vector<float> logits{0.3F, -1.2F, 2.0F, 0.9F, -4.0F, 1.1F, 0.0F, 2.0F};
  const SamplingOptions options{.temperature = 0.9, .top_k = 6, .min_p = 0.02};
  const auto row = processed(options, logits);
  double sum = 0;
  for (const float x : row) sum += std::exp(static_cast<double>(x));
  constexpr int draws = 40000;
  std::vector<int> count(logits.size());
  Sampler sampler(options, 8);
  Rng rng(20240229);
  for (int i = 0; i < draws; ++i) {
    auto copy = logits;
    ++count[static_cast<std::size_t>(sampler.sample(copy, {}, rng))];
  }
  double chi_square = 0;
  int categories = 0;
  for (std::size_t i = 0; i < row.size(); ++i) {
    if (row[i] == removed) {
      CHECK(count[i] == 0);
      continue;
    }
    const double expected = std::exp(static_cast<double>(row[i])) / sum * draws;
    chi_square += (count[i] - expected) * (count[i] - expected) / expected;
    ++categories;
  }
  CHECK(categories == 6);
  CHECK(chi_square < 20.5);  // quantile 0.999 of chi-square with 5 degrees of freedom
}

TEST_CASE("sampling allocates nothing after construction") {
  for (const SamplingOptions& options :
       {SamplingOptions{}, SamplingOptions{.temperature = 0.8, .top_k = 40, .top_p = 0.9, .min_p = 0.01, .repetition_penalty = 1.2},
        SamplingOptions{.temperature = 5, .top_p = 0.99}}) {
    Sampler sampler(options, 4001);
    Rng rng(1);
    auto logits = bulk_logits(4001, 1);
    std::vector<std::int32_t> history(600, 17);
    const std::size_t before = allocations;
    const std::int32_t token = sampler.sample(logits, history, rng);
    CHECK(allocations == before);
    CHECK(token >= 0);
  }
}
