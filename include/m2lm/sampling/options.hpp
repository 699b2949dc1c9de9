// SamplingOptions: how the next token is chosen.
// Floor: sampling. May include: config, core, ops.
#pragma once

#include <m2lm/core/error.hpp>

#include <cstdint>

namespace m2lm::inline M2LM_ABI {

/// Names and meanings as in transformers' GenerationConfig, except that greedy is temperature 0 instead of do_sample = false.
struct SamplingOptions {
  /// 0 is greedy: the most likely token; top_k, top_p and min_p then have no effect. Otherwise at least 1e-6.
  double temperature = 0;
  /// Only the top_k most likely tokens; 0 switches it off.
  int top_k = 0;
  /// The smallest set of most likely tokens whose probabilities reach top_p; 1 switches it off.
  double top_p = 1;
  /// Only tokens at least min_p times as likely as the most likely one; 0 switches it off.
  double min_p = 0;
  /// Divides positive and multiplies negative logits of tokens that the prompt or the answer already holds; 1 switches it off.
  double repetition_penalty = 1;
  /// Same seed, same tokens.
  std::uint64_t seed = 0;
  friend bool operator==(const SamplingOptions&, const SamplingOptions&) = default;
};

/// throws OptionError that names the option, its value and its range.
void validate(const SamplingOptions& options);

}  // namespace m2lm
