// Definitions of sampling/processors.hpp.
// Floor: sampling. May include: config, core, ops.
#pragma once

#include <m2lm/sampling/processors.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>

namespace m2lm::inline M2LM_ABI {

namespace detail {

inline constexpr float removed_logit = -std::numeric_limits<float>::infinity();

[[noreturn]] M2LM_IMPL void throw_unusable_logit(std::span<const float> row, std::int64_t row_index) {
  std::size_t i = 0;
  while (row[i] < std::numeric_limits<float>::infinity()) ++i;
  throw NumericError(concat("m2lm: the logit of token ", i, " (row ", row_index, ") is ", std::isnan(row[i]) ? "NaN" : "+inf",
                     ": the weights are damaged or the precision is too low for this model; try f32"));
}

/// The largest logit of a row, after checking that a token can be chosen from it.
M2LM_IMPL float checked_maximum(std::span<const float> row, std::int64_t row_index) {
  // Independent lanes: one maximum would wait for itself at every element.
  constexpr std::size_t lanes = 8;
  float maximum[lanes];
  std::fill_n(maximum, lanes, removed_logit);
  bool usable = true;
  const auto visit = [&](std::size_t i, std::size_t lane) {
    usable &= row[i] < std::numeric_limits<float>::infinity();  // false for NaN too
    maximum[lane] = maximum[lane] < row[i] ? row[i] : maximum[lane];
  };
  std::size_t i = 0;
  for (; i + lanes <= row.size(); i += lanes)
    for (std::size_t lane = 0; lane < lanes; ++lane) visit(i + lane, lane);
  for (; i < row.size(); ++i) visit(i, 0);
  if (!usable) [[unlikely]]
    throw_unusable_logit(row, row_index);
  const float result = *std::max_element(maximum, maximum + lanes);
  require<Error>(result != removed_logit, "m2lm: all ", row.size(), " logits of row ", row_index,
                 " are -inf: no token is left to choose; allow at least one");
  return result;
}

}  // namespace detail

M2LM_IMPL Sampler::Sampler(const SamplingOptions& options, std::int64_t vocab) : options_(options), vocab_(vocab) {
  validate(options);
  require<OptionError>(vocab >= 1 && vocab <= std::numeric_limits<std::int32_t>::max(), "m2lm::Sampler: vocab = ", vocab,
                       ": give the number of logits per token, 1 to 2147483647");
  const auto n = static_cast<std::size_t>(vocab);
  weights_.resize(n);
  candidates_.resize(n);
  seen_.resize((n + 63) / 64);
}

M2LM_IMPL void Sampler::require_vocab(std::int64_t columns) const {
  require(columns == vocab_, "m2lm::Sampler: ", columns, " logits for a vocabulary of ", vocab_);
}

M2LM_IMPL void Sampler::process(Matrix<float> logits, std::span<const std::span<const std::int32_t>> histories) {
  require_vocab(logits.extent(1));
  require(logits.extent(1) <= 1 || logits.stride(1) == 1, "m2lm::Sampler::process: the logits of a row have the stride ", logits.stride(1),
          ", not 1");
  require(logits.extent(0) == static_cast<std::int64_t>(histories.size()), "m2lm::Sampler::process: ", histories.size(), " histories for logits ",
          logits.shape().string());
  for (std::int64_t r = 0; r < logits.extent(0); ++r)
    process_row({logits.row(r), static_cast<std::size_t>(vocab_)}, histories[static_cast<std::size_t>(r)], r);
}

M2LM_IMPL std::int32_t Sampler::sample(std::span<float> logits, std::span<const std::int32_t> history, Rng& rng) {
  require_vocab(static_cast<std::int64_t>(logits.size()));
  if (!greedy())
    process_row(logits, history, 0);
  else if (options_.repetition_penalty != 1)
    penalise(logits, history);  // all that a greedy sampler processes; choose() looks at every logit
  return choose(logits, rng);
}

M2LM_IMPL Sampler::Weights Sampler::weights(std::span<const float> logits) {
  require_vocab(static_cast<std::int64_t>(logits.size()));
  const double maximum = static_cast<double>(detail::checked_maximum(logits, 0));
  double sum = 0;
  for (std::size_t i = 0; i < logits.size(); ++i) {
    // Most tokens are removed after top-k and top-p: their exponential is not worth computing.
    weights_[i] = logits[i] == detail::removed_logit ? 0 : std::exp(static_cast<double>(logits[i]) - maximum);
    sum += weights_[i];
  }
  return {weights_, sum};
}

M2LM_IMPL std::int32_t Sampler::choose(std::span<const float> processed, Rng& rng) {
  require_vocab(static_cast<std::int64_t>(processed.size()));
  if (greedy()) {
    const float maximum = detail::checked_maximum(processed, 0);
    return static_cast<std::int32_t>(std::find(processed.begin(), processed.end(), maximum) - processed.begin());
  }
  const Weights w = weights(processed);
  const double target = rng.uniform() * w.sum;
  double cumulative = 0;
  std::size_t last = 0;
  for (std::size_t i = 0; i < w.weight.size(); ++i) {
    if (w.weight[i] == 0) continue;
    last = i;
    cumulative += w.weight[i];
    if (cumulative > target) break;
  }
  return static_cast<std::int32_t>(last);
}

M2LM_IMPL void Sampler::process_row(std::span<float> row, std::span<const std::int32_t> history, std::int64_t row_index) {
  if (options_.repetition_penalty != 1) penalise(row, history);
  if (!greedy() && options_.temperature != 1) {
    const auto temperature = static_cast<float>(M2LM_FAULT(12) ? 1 / options_.temperature : options_.temperature);
    for (float& logit : row) logit /= temperature;
  }
  detail::checked_maximum(row, row_index);
  if (greedy()) return;
  if (options_.top_k > 0 && options_.top_k < vocab_) keep_top_k(row);
  if (options_.top_p < 1) keep_top_p(row);
  if (options_.min_p > 0) keep_min_p(row);
}

M2LM_IMPL void Sampler::penalise(std::span<float> row, std::span<const std::int32_t> history) {
  const auto penalty = static_cast<float>(options_.repetition_penalty);
  const auto in_vocab = [&](std::int32_t id) { return id >= 0 && id < vocab_; };
  for (const std::int32_t id : history) {
    if (!in_vocab(id)) continue;
    const auto i = static_cast<std::size_t>(id);
    const std::uint64_t bit = std::uint64_t{1} << (i % 64);
    if (seen_[i / 64] & bit) continue;  // once per token, however often it occurs
    seen_[i / 64] |= bit;
    row[i] = row[i] < 0 && !M2LM_FAULT(11) ? row[i] * penalty : row[i] / penalty;
  }
  for (const std::int32_t id : history)
    if (in_vocab(id)) seen_[static_cast<std::size_t>(id) / 64] = 0;
}

M2LM_IMPL void Sampler::keep_top_k(std::span<float> row) {
  for (std::size_t i = 0; i < row.size(); ++i) candidates_[i].logit = row[i];
  const auto kth = candidates_.begin() + (options_.top_k - 1);
  std::nth_element(candidates_.begin(), kth, candidates_.end(), [](Candidate a, Candidate b) { return a.logit > b.logit; });
  const float limit = kth->logit;
  for (float& logit : row)
    if (logit < limit) logit = detail::removed_logit;
}

M2LM_IMPL void Sampler::keep_top_p(std::span<float> row) {
  const Weights w = weights(row);
  // Judge of equality is an f32 softmax whose cumulative sum, ascending, is compared with f32(1 - top_p). Sums of the rounded
  // probabilities are (all but) exact in f64, so the tail at a token is the total less the tokens above it, and only the tokens
  // that are kept need to be ordered.
  const auto limit = static_cast<float>(1 - options_.top_p);
  std::size_t n = 0;
  double tail = 0;
  for (std::size_t i = 0; i < row.size(); ++i) {
    if (w.weight[i] == 0) continue;  // probability 0: behind every limit
    candidates_[n++] = {row[i], static_cast<std::int32_t>(i)};
    tail += static_cast<double>(w.probability(i));
  }
  const auto less = [](Candidate a, Candidate b) { return a.logit != b.logit ? a.logit < b.logit : a.id < b.id; };
  const auto begin = candidates_.begin();
  auto end = begin + static_cast<std::ptrdiff_t>(n);
  std::make_heap(begin, end, less);
  // Kept tokens gather behind the shrinking heap.
  for (bool first = true; end != begin; first = false) {
    const double p = static_cast<double>(w.probability(static_cast<std::size_t>(begin->id)));
    if (!first && static_cast<float>(M2LM_FAULT(10) ? tail - p : tail) <= limit) break;
    tail -= p;
    std::pop_heap(begin, end--, less);
  }
  std::fill(row.begin(), row.end(), detail::removed_logit);
  for (auto kept = end; kept != begin + static_cast<std::ptrdiff_t>(n); ++kept) row[static_cast<std::size_t>(kept->id)] = kept->logit;
}

M2LM_IMPL void Sampler::keep_min_p(std::span<float> row) {
  const Weights w = weights(row);
  const float best = static_cast<float>(1 / w.sum);
  const float limit = static_cast<float>(options_.min_p) * (M2LM_FAULT(13) ? 1.0F : best);
  for (std::size_t i = 0; i < row.size(); ++i)
    if (w.probability(i) < limit) row[i] = detail::removed_logit;
}

}  // namespace m2lm
