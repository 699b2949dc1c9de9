// Definitions of sampling/options.hpp.
// Floor: sampling. May include: config, core, ops.
#pragma once

#include <m2lm/sampling/options.hpp>

#include <cmath>
#include <cstdio>
#include <string>

namespace m2lm::inline M2LM_ABI {

namespace detail {

/// Shortest of the usual notations: "1e-09", where std::to_string would print "0.000000".
M2LM_IMPL std::string option_number(double value) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.9g", value);
  return text;
}

}  // namespace detail

M2LM_IMPL void validate(const SamplingOptions& options) {
  // Below 1e-6 scaled logits could leave the range of f32.
  require<OptionError>(options.temperature == 0 || (std::isfinite(options.temperature) && options.temperature >= 1e-6),
                       "m2lm: temperature = ", detail::option_number(options.temperature), ": give 0 (greedy) or a number from 1e-6 on, such as 0.7");
  require<OptionError>(options.top_k >= 0, "m2lm: top_k = ", options.top_k, ": give 0 (off) or how many tokens to keep");
  require<OptionError>(options.top_p >= 0 && options.top_p <= 1, "m2lm: top_p = ", detail::option_number(options.top_p),
                       ": give a probability between 0 and 1 (1 is off)");
  require<OptionError>(options.min_p >= 0 && options.min_p <= 1, "m2lm: min_p = ", detail::option_number(options.min_p),
                       ": give a factor between 0 (off) and 1");
  require<OptionError>(std::isfinite(options.repetition_penalty) && options.repetition_penalty > 0,
                       "m2lm: repetition_penalty = ", detail::option_number(options.repetition_penalty),
                       ": give a positive number (1 is off, 1.2 is usual)");
}

}  // namespace m2lm
