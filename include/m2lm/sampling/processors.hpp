// Sampler: from logits to the next token, without allocating.
// Floor: sampling. May include: config, core, ops.
#pragma once

#include <m2lm/core/rng.hpp>
#include <m2lm/core/view.hpp>
#include <m2lm/sampling/options.hpp>

#include <cstdint>
#include <span>
#include <vector>

namespace m2lm::inline M2LM_ABI {

/// Processes logits and chooses tokens. All memory is reserved at construction; no member allocates after it (unless it throws).
///
/// Order and definitions follow transformers' `generate`: repetition penalty, temperature, top-k, top-p, min-p. A removed token has
/// the logit -inf. Where equal logits meet a limit: top-k keeps all tokens equal to the k-th; top-p removes lower ids first, as an
/// ascending stable sort does; greedy takes the lowest id.
class Sampler {
  struct Candidate {
    float logit = 0;
    std::int32_t id = 0;
  };
  SamplingOptions options_;
  std::int64_t vocab_ = 0;
  std::vector<double> weights_;        // exp(logit - max), 0 for removed tokens
  std::vector<Candidate> candidates_;  // what top-k and top-p order
  std::vector<std::uint64_t> seen_;    // one bit per token; all 0 between calls

 public:
  /// throws OptionError for an option out of range, or a vocabulary that is empty or larger than 2^31 - 1.
  Sampler(const SamplingOptions& options, std::int64_t vocab);

  /// What it was made with.
  const SamplingOptions& options() const { return options_; }
  /// Logits per row.
  std::int64_t vocab() const { return vocab_; }
  /// Temperature 0: the largest logit, and nothing is drawn.
  bool greedy() const { return options_.temperature == 0; }

  /// Applies the processors in place, row by row; a greedy sampler applies the repetition penalty only. histories[r] holds the ids
  /// of row r so far, prompt and answer; ids outside the vocabulary (placeholders of media) count for nothing.
  /// requires logits [rows, vocab] with unit column stride, one history per row.
  /// throws ShapeError if the shapes differ; Error if a logit is NaN or +inf, or if all of a row are -inf.
  void process(Matrix<float> logits, std::span<const std::span<const std::int32_t>> histories);

  /// The token of one processed row: greedy, or drawn by inverse CDF in the order of the ids with one rng.uniform(). Rows that share
  /// one token (guidance) are merged by the caller before this.
  std::int32_t choose(std::span<const float> processed, Rng& rng);

  /// `process` and `choose` of one row. logits [vocab] are overwritten.
  std::int32_t sample(std::span<float> logits, std::span<const std::int32_t> history, Rng& rng);

  /// exp(logit - max) of one row, [vocab], and its sum: probability = weight / sum. Valid until the next call of any member.
  struct Weights {
    std::span<const double> weight;
    double sum = 0;
    /// Of token `id`, 0 of one that was removed.
    float probability(std::size_t id) const { return static_cast<float>(weight[id] / sum); }
  };
  /// throws as `process`.
  Weights weights(std::span<const float> logits);

 private:
  void process_row(std::span<float> row, std::span<const std::int32_t> history, std::int64_t row_index);
  void penalise(std::span<float> row, std::span<const std::int32_t> history);
  void keep_top_k(std::span<float> row);
  void keep_top_p(std::span<float> row);
  void keep_min_p(std::span<float> row);
  void require_vocab(std::int64_t columns) const;
};

}  // namespace m2lm
