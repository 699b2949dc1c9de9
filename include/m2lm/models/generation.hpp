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
  std::int64_t max_new_tokens = 128;                 ///< the answer ends with this many at the latest
  double temperature = 0;                            ///< 0 = greedy
  int top_k = 0;                                     ///< keeps the k most likely tokens; 0 = all
  double top_p = 1;                                  ///< keeps the likeliest tokens until their probabilities sum to this; 1 = all
  double min_p = 0;                                  ///< keeps tokens of at least this share of the likeliest one's probability; 0 = all
  double repetition_penalty = 1;                     ///< divides positive logits of tokens that occurred, multiplies negative ones; 1 = none
  std::uint64_t seed = 0;                            ///< of the tokens that are drawn; 0 goes on with the session's random numbers
  std::vector<std::string> stop = {};                ///< texts that end the answer; they are not part of it
  std::vector<std::int32_t> stop_tokens = {};        ///< besides the checkpoint's end-of-sequence tokens
  bool ignore_eos = false;                           ///< go on after end-of-sequence tokens
  FunctionRef<void(std::string_view)> on_text = {};  ///< called with each piece of the answer: whole UTF-8 characters
  const std::atomic<bool>* cancel = nullptr;         ///< looked at before each token; true ends the answer

  /// Those of them that choose tokens.
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
  double encode_seconds = 0;        ///< preprocessing and encoding of attached media
  double prefill_seconds = 0;       ///< from the prompt's embeddings to the first token
  std::int64_t prefill_tokens = 0;  ///< positions that were computed; those found in the cache do not count
  double decode_seconds = 0;        ///< of the decode_tokens
  std::int64_t decode_tokens = 0;   ///< steps of the decoder after the prefill
};

/// How likely a continuation is.
struct Score {
  double log_probability = 0;  ///< natural logarithm, summed over its tokens
  std::int64_t tokens = 0;     ///< of the continuation
  bool greedy = true;          ///< greedy decoding would have chosen each of them
};

/// An answer.
struct Generation {
  std::string text;                                   ///< without special tokens and without the stop string
  std::vector<std::int32_t> tokens;                   ///< with the token that ended the answer, if one did
  FinishReason finish_reason = FinishReason::length;  ///< why it ended
  Timings timings{};                                  ///< of answers given together, the seconds are those of all
};

}  // namespace m2lm
