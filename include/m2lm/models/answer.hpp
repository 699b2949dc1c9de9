// Answer: one answer while it is generated: tokens are chosen, stops found, text handed on.
// Floor: models. May include: core, ops, layers, parts, io, sampling.
#pragma once

#include <m2lm/core/rng.hpp>
#include <m2lm/io/tokenizer.hpp>
#include <m2lm/models/generation.hpp>
#include <m2lm/sampling/processors.hpp>
#include <m2lm/sampling/stop.hpp>

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>

namespace m2lm::inline M2LM_ABI::detail {

/// What ends and shows an answer, besides the options of the call.
struct AnswerContext {
  std::int64_t vocab_size = 0;
  std::int64_t room = 0;                          ///< positions that the context has left; no answer is longer than one more
  const Tokenizer* tokenizer = nullptr;           ///< null: there is no text
  std::span<const std::int32_t> stop_tokens{};    ///< the checkpoint's, unless the options ignore them
  std::span<const std::string_view> stop_strings{};  ///< the chat template's
  FunctionRef<void(std::string_view)> on_text{};
};

/// Memory is reserved at construction: for all tokens, and for eight bytes of text per token. Neither copied nor moved.
class Answer {
  Sampler sampler_;
  StopMatcher matcher_;
  const Tokenizer* tokenizer_;
  std::optional<TokenStream> stream_;
  FunctionRef<void(std::string_view)> on_text_;
  std::int64_t max_new_tokens_;
  bool ended_ = false;

 public:
  Generation result;

  Answer(const GenerateOptions& options, const AnswerContext& context);
  Answer(const Answer&) = delete;
  Answer& operator=(const Answer&) = delete;

  bool ended() const { return ended_; }
  /// Chooses the next token from its logits [vocabulary], which are overwritten. May end the answer. throws as Sampler, and what
  /// `on_text` throws.
  std::int32_t next(std::span<float> logits, std::span<const std::int32_t> history, Rng& rng);
  /// Takes a token that was chosen elsewhere, a device's sampler. Otherwise as `next`.
  void accept(std::int32_t token);
  std::int64_t tokens_left() const { return max_new_tokens_ - static_cast<std::int64_t>(result.tokens.size()); }
  const SamplingOptions& sampling() const { return sampler_.options(); }
  /// Hands on the text that was held back.
  void end(FinishReason reason);

 private:
  void emit(std::string_view text);
};

}  // namespace m2lm::detail
