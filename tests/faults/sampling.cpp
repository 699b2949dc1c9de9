// Probe: logits processors, stop strings and the template of a further turn, by hand.
#include <m2lm/models/chat_template.hpp>
#include <m2lm/sampling/options.hpp>
#include <m2lm/sampling/processors.hpp>
#include <m2lm/sampling/stop.hpp>

#include <doctest/doctest.h>

#include <array>
#include <cmath>
#include <string>
#include <vector>

namespace {

/// Logits of the probabilities 0.5, 0.3, 0.15 and 0.05, processed with 3 and 2 in the history.
std::array<float, 4> processed(const m2lm::SamplingOptions& options) {
  std::array<float, 4> row{};
  const double probability[] = {0.5, 0.3, 0.15, 0.05};
  for (std::size_t i = 0; i < 4; ++i) row[i] = static_cast<float>(std::log(probability[i]) + 2);
  const std::vector<std::int32_t> history{3, 2};
  const std::span<const std::int32_t> histories[] = {history};
  m2lm::Sampler(options, 4).process(m2lm::Matrix<float>(row.data(), {1, 4}), histories);
  return row;
}

int kept(const m2lm::SamplingOptions& options) {
  int n = 0;
  for (const float x : processed(options)) n += std::isinf(x) ? 0 : 1;
  return n;
}

}  // namespace

TEST_CASE("processors") {
  CHECK(kept({.temperature = 1, .top_p = 0.7}) == 2);
  CHECK(kept({.temperature = 1, .min_p = 0.5}) == 2);
  const auto plain = processed({}), halved = processed({.temperature = 2}), penalised = processed({.repetition_penalty = 1.5});
  CHECK(halved[0] == doctest::Approx(plain[0] / 2));
  CHECK(plain[3] < 0);
  CHECK(penalised[3] == doctest::Approx(plain[3] * 1.5F));
  CHECK(plain[2] > 0);
  CHECK(penalised[2] == doctest::Approx(plain[2] / 1.5F));
}

TEST_CASE("the beginning of a stop string is held back") {
  const std::string stop[] = {"###"};
  m2lm::StopMatcher matcher({}, stop);
  CHECK(matcher.push("answer ##").text == "answer ");
  const auto end = matcher.push("# more");
  CHECK(end.text.empty());
  CHECK(end.stopped);
}

TEST_CASE("an answer is closed before the next turn") {
  CHECK(m2lm::render_continuation(m2lm::chat_template("vicuna_v1"), "And?", false).starts_with("</s>"));
}
