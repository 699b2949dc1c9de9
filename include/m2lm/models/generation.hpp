// Options and results of generation.
// Floor: models. May include: core, ops, layers, parts, io, sampling.
#pragma once

#include <m2lm/core/function_ref.hpp>
#include <m2lm/sampling/options.hpp>

#include <atomic>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace m2lm::inline M2LM_ABI {

/// Options of one generate call. `on_text` refers to a callable and does not own it: write the lambda into the call itself, or give
/// it a name that lives as long as the options are used.
struct GenerateOptions {
  std::int64_t max_new_tokens = 128;
  double temperature = 0;  ///< 0 = greedy
  int top_k = 0;
  double top_p = 1;
  double min_p = 0;
  double repetition_penalty = 1;
  std::uint64_t seed = 0;
  std::vector<std::string> stop = {};                    ///< texts that end the answer; they are not part of it
  std::vector<std::int32_t> stop_tokens = {};            ///< besides the checkpoint's end-of-sequence tokens
  bool ignore_eos = false;                               ///< go on after end-of-sequence tokens
  FunctionRef<void(std::string_view)> on_text = {};      ///< called with each piece of the answer: whole UTF-8 characters
  const std::atomic<bool>* cancel = nullptr;             ///< looked at before each token; true ends the answer

  SamplingOptions sampling() const { return {temperature, top_k, top_p, min_p, repetition_penalty, seed}; }
};

/// Why an answer ended.
enum class FinishReason : std::uint8_t { stop_token, stop_string, length, cancelled };

/// Its enumerator, as programs print it.
constexpr std::string_view finish_reason_name(FinishReason reason) {
  switch (reason) {
    case FinishReason::stop_token: return "stop_token";
    case FinishReason::stop_string: return "stop_string";
    case FinishReason::length: return "length";
    case FinishReason::cancelled: return "cancelled";
  }
  return "?";
}

/// Seconds and counts of one generate call.
struct Timings {
  double encode_seconds = 0;  ///< preprocessing and encoding of attached media
  double prefill_seconds = 0;
  std::int64_t prefill_tokens = 0;
  double decode_seconds = 0;
  std::int64_t decode_tokens = 0;  ///< steps of the decoder after the prefill
};

/// How likely a continuation is.
struct Score {
  double log_probability = 0;  ///< natural logarithm, summed over its tokens
  std::int64_t tokens = 0;
  bool greedy = true;          ///< greedy decoding would have chosen each of them
};

/// An answer.
struct Generation {
  std::string text;
  std::vector<std::int32_t> tokens;  ///< with the token that ended the answer, if one did
  FinishReason finish_reason = FinishReason::length;
  Timings timings{};
};

}  // namespace m2lm
