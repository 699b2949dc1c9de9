// Definitions of models/answer.hpp.
// Floor: models. May include: core, ops, layers, parts, io, sampling.
#pragma once

#include <m2lm/models/answer.hpp>

#include <algorithm>
#include <vector>

namespace m2lm::inline M2LM_ABI::detail {

namespace answers {

inline StopMatcher matcher(const GenerateOptions& options, const AnswerContext& context) {
  std::vector<std::int32_t> tokens = options.stop_tokens;
  if (!options.ignore_eos) tokens.insert(tokens.end(), context.stop_tokens.begin(), context.stop_tokens.end());
  std::vector<std::string> strings = options.stop;
  for (const std::string_view s : context.stop_strings) strings.emplace_back(s);
  return StopMatcher(tokens, strings);
}

}  // namespace answers

M2LM_IMPL Answer::Answer(const GenerateOptions& options, const AnswerContext& context)
    : sampler_(options.sampling(), context.vocab_size),
      matcher_(answers::matcher(options, context)),
      tokenizer_(context.tokenizer),
      on_text_(context.on_text),
      max_new_tokens_(options.max_new_tokens) {
  require<OptionError>(max_new_tokens_ >= 0, "m2lm: max_new_tokens = ", max_new_tokens_, " is negative");
  if (tokenizer_) stream_.emplace(*tokenizer_);
  const auto most = static_cast<std::size_t>(std::min(max_new_tokens_, context.room + 1));
  result.tokens.reserve(most);
  result.text.reserve(most * 8);
  if (max_new_tokens_ == 0) end(FinishReason::length);
}

M2LM_IMPL void Answer::emit(std::string_view text) {
  if (text.empty()) return;
  result.text += text;
  if (on_text_) on_text_(text);
}

M2LM_IMPL std::int32_t Answer::next(std::span<float> logits, std::span<const std::int32_t> history, Rng& rng) {
  const std::int32_t token = sampler_.sample(logits, history, rng);
  accept(token);
  return token;
}

M2LM_IMPL void Answer::accept(std::int32_t token) {
  result.tokens.push_back(token);
  if (matcher_.is_stop_token(token)) {
    end(FinishReason::stop_token);
    return;
  }
  // A vocabulary may be padded, or leave ids out: those have no text.
  if (stream_ && tokenizer_->contains(token)) {
    const StopMatcher::Output out = matcher_.push(stream_->push(token));
    emit(out.text);
    if (out.stopped) {
      result.finish_reason = FinishReason::stop_string;
      ended_ = true;
      return;
    }
  }
  if (tokens_left() <= 0) end(FinishReason::length);
}

M2LM_IMPL void Answer::end(FinishReason reason) {
  ended_ = true;
  result.finish_reason = reason;
  if (!stream_) return;
  const StopMatcher::Output out = matcher_.push(stream_->finish());
  emit(out.text);
  emit(matcher_.finish());
  if (out.stopped) result.finish_reason = FinishReason::stop_string;
}

}  // namespace m2lm::detail
