// BasicSession: one conversation on a model, and what changes while it goes on.
// Floor: models. May include: core, ops, layers, parts, io, sampling.
#pragma once

#include <m2lm/core/arena.hpp>
#include <m2lm/io/tokenizer.hpp>
#include <m2lm/layers/kv_cache.hpp>
#include <m2lm/models/chat_template.hpp>
#include <m2lm/models/generation.hpp>
#include <m2lm/models/sequence.hpp>
#include <m2lm/parts/decoders/llama.hpp>
#include <m2lm/sampling/processors.hpp>
#include <m2lm/sampling/stop.hpp>

#include <algorithm>
#include <chrono>
#include <new>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace m2lm {

struct SessionOptions {
  std::int64_t max_positions = 0;  ///< context length; 0 = the checkpoint's max_position_embeddings
  std::uint64_t seed = 0;
};

/// One conversation on a model: KV cache, scratch memory, random numbers. Movable; one thread at a time.
template <class M>
class BasicSession {
  using B = typename M::Backend;
  using S = typename M::Scalar;
  M model_;
  Arena arena_;
  KvCache<B> cache_;
  Rng rng_;
  bool seeded_ = false;
  std::vector<std::int32_t> history_;  // ids at the cached positions
  std::vector<std::int32_t> pending_;  // chosen, but not yet seen by the decoder
  bool chatting_ = false;              // the cache begins with a rendered chat
  std::vector<CrossInstance<S>> media_;  // in the cached positions, for hooks of the decoder

  /// Puts a session back where it stood, unless `done`.
  struct Restore {
    BasicSession& session;
    std::int64_t length = session.cache_.length();
    std::size_t ids = session.history_.size(), media = session.media_.size();
    std::vector<std::int32_t> pending = session.pending_;
    Rng rng = session.rng_;
    bool seeded = session.seeded_, chatting = session.chatting_, done = false;

    ~Restore() {
      if (done) return;
      session.cache_.truncate(length);
      session.history_.resize(ids);
      session.media_.resize(media);
      session.pending_ = std::move(pending);
      session.rng_ = rng;
      session.seeded_ = seeded;
      session.chatting_ = chatting;
    }
  };

 public:
  BasicSession(M model, const SessionOptions& options);

  /// Answers the prompt. A chat prompt after the first is the next turn: what the cache holds is not computed again.
  /// throws CapacityError naming both lengths when the prompt does not fit in the context, or the answer grows beyond it; InputError
  /// for a prompt that does not fit the model; what `on_text` throws. The session is then as it was before the call.
  Generation generate(const typename M::PromptType& prompt, const GenerateOptions& options = {});

  /// Positions in the cache.
  std::int64_t length() const { return cache_.length(); }
  std::int64_t max_positions() const { return cache_.capacity(); }
  /// Ids at the cached positions; media stand as placeholder ids.
  std::span<const std::int32_t> history() const { return history_; }
  /// Most scratch bytes in use at once so far.
  std::size_t peak_scratch_bytes() const { return arena_.peak_bytes(); }
};

// Members are defined out of class, as Model's are.

template <class M>
BasicSession<M>::BasicSession(M model, const SessionOptions& options) : model_(std::move(model)), rng_(options.seed), seeded_(options.seed != 0) {
  const LlamaConfig& config = model_.decoder_config();
  const std::int64_t positions = options.max_positions == 0 ? config.max_position_embeddings : options.max_positions;
  require<OptionError>(positions > 0 && positions <= config.max_position_embeddings, "m2lm: a session of ", positions,
                       " positions; the checkpoint has max_position_embeddings = ", config.max_position_embeddings);
  Context<B> ctx{model_.backend(), arena_};
  cache_ = model_.state_->decoder.make_cache(ctx, model_.cache_format(), positions);
}

template <class M>
Generation BasicSession<M>::generate(const typename M::PromptType& prompt, const GenerateOptions& options) try {
  using Clock = std::chrono::steady_clock;
  const auto seconds_since = [](Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); };
  const auto& state = *model_.state_;
  const LlamaConfig& config = model_.decoder_config();
  Context<B> ctx{model_.backend(), arena_, &state.decoder.embed_tokens.weight.value};
  require<OptionError>(options.max_new_tokens >= 0, "m2lm: max_new_tokens = ", options.max_new_tokens, " is negative");
  Sampler sampler(options.sampling(), config.vocab_size);
  Restore restore{*this};
  if (!seeded_ || options.seed != 0) rng_ = Rng(options.seed);
  seeded_ = true;
  Generation result;

  // The new part of the sequence: what was chosen last, then the prompt.
  std::vector<std::int32_t> ids;
  const ChatTemplate& format = model_.template_of(prompt);
  if (chatting_ && prompt.form == PromptForm::chat) {
    require<InputError>(prompt.system.empty(), "m2lm: a system message opens a conversation; this one has begun");
    // An end token that the model chose is not in the cache yet; the template says whether one stands between turns.
    const auto& ends = state.files.stop_tokens;
    if (!pending_.empty() && std::find(ends.begin(), ends.end(), pending_.back()) != ends.end()) pending_.clear();
    ids = model_.encode_text(render_continuation(format, prompt.text, false), false);
  } else {
    ids = model_.prompt_ids(prompt, cache_.length() == 0);
  }
  auto start = Clock::now();
  typename M::Embedded embedded = model_.embed_media(ctx, prompt, std::move(ids));
  if (!M2LM_FAULT(31)) embedded.sequence.prepend(pending_);
  result.timings.encode_seconds = seconds_since(start);
  const std::span<const std::int32_t> sequence = embedded.sequence.ids;
  const auto tokens = static_cast<std::int64_t>(sequence.size());
  require<CapacityError>(cache_.length() + tokens <= cache_.capacity(), "m2lm: the prompt needs ", cache_.length() + tokens, " positions (", cache_.length(),
                         " used, ", tokens, " new), the context holds ", cache_.capacity());

  for (CrossInstance<S>& instance : embedded.cross_instances(cache_.length())) media_.push_back(std::move(instance));

  // Prefill in pieces of fixed size; each result is the same as at once.
  start = Clock::now();
  constexpr std::int64_t piece = 512;
  Tensor<S> last_hidden(Shape{1, config.hidden_size});
  for (std::int64_t begin = 0; begin < tokens; begin += piece) {
    const std::int64_t count = std::min(piece, tokens - begin);
    const Arena::Scope scope(arena_);
    const Matrix<S> h = arena_.template matrix<S>(count, config.hidden_size);
    model_.embed(ctx, embedded, begin, h);
    const SequenceRows<B> rows{&cache_, 0, count, media_};
    state.decoder.forward(ctx, h, std::span<const SequenceRows<B>>(&rows, 1));
    if (begin + count == tokens) std::copy_n(h.row(count - 1), config.hidden_size, last_hidden.data());
  }
  // All memory that the answer needs is taken before it begins; the context bounds it.
  const std::int64_t most_tokens = std::min(options.max_new_tokens, cache_.capacity() - cache_.length() + 1);
  history_.reserve(history_.size() + static_cast<std::size_t>(tokens + most_tokens));
  history_.insert(history_.end(), sequence.begin(), sequence.end());
  pending_.clear();
  chatting_ = chatting_ || prompt.form == PromptForm::chat;
  result.timings.prefill_seconds = seconds_since(start);
  result.timings.prefill_tokens = tokens;

  std::vector<std::int32_t> stop_tokens = options.stop_tokens;
  if (!options.ignore_eos) stop_tokens.insert(stop_tokens.end(), state.files.stop_tokens.begin(), state.files.stop_tokens.end());
  std::vector<std::string> stop = options.stop;
  if (prompt.form == PromptForm::chat)
    for (const std::string_view s : format.stop_strings) stop.emplace_back(s);
  StopMatcher matcher(stop_tokens, stop);
  std::optional<TokenStream> stream;
  if (state.files.tokenizer) stream.emplace(*state.files.tokenizer);
  const auto emit = [&](std::string_view text) {
    if (text.empty()) return;
    result.text += text;
    if (options.on_text) options.on_text(text);
  };
  result.text.reserve(static_cast<std::size_t>(most_tokens) * 8);
  result.tokens.reserve(static_cast<std::size_t>(most_tokens));
  pending_.reserve(1);

  Tensor<S> logits(Shape{1, config.vocab_size});
  Tensor<float> processed(Shape{config.vocab_size});
  start = Clock::now();
  result.finish_reason = FinishReason::length;
  while (static_cast<std::int64_t>(result.tokens.size()) < options.max_new_tokens) {
    if (options.cancel && options.cancel->load()) {
      result.finish_reason = FinishReason::cancelled;
      break;
    }
    if (!pending_.empty()) {  // feed the token chosen last
      require<CapacityError>(cache_.length() < cache_.capacity(), "m2lm: the answer needs ", cache_.length() + 1, " positions, the context holds ",
                             cache_.capacity());
      const Matrix<S> h = last_hidden.template view<2>();
      state.decoder.embed_tokens.forward(ctx, pending_, h);
      const SequenceRows<B> rows{&cache_, 0, 1, M2LM_FAULT(62) ? std::span<const CrossInstance<S>>() : media_};
      state.decoder.forward(ctx, h, std::span<const SequenceRows<B>>(&rows, 1));
      history_.push_back(pending_.front());
      pending_.clear();
      ++result.timings.decode_tokens;
    }
    const Arena::Scope scope(arena_);
    const Matrix<S> normed = arena_.template matrix<S>(1, config.hidden_size);
    state.decoder.norm.forward(ctx, last_hidden.template view<2>(), normed);
    state.decoder.head.forward(ctx, normed, logits.template view<2>());
    for (std::int64_t i = 0; i < config.vocab_size; ++i) processed.data()[i] = static_cast<float>(logits.data()[i]);
    state.files.checkpoint.require_intact();  // embeddings are read from the file
    std::int32_t token = 0;
    try {
      token = sampler.sample(processed.span(), history_, rng_);
    } catch (const NumericError& error) {
      throw NumericError(error.what() + model_.non_finite_weights());
    }
    result.tokens.push_back(token);
    pending_.push_back(token);
    if (matcher.is_stop_token(token)) {
      result.finish_reason = FinishReason::stop_token;
      break;
    }
    // A vocabulary may be padded, or leave ids out: those have no text.
    if (stream && state.files.tokenizer->contains(token)) {
      const std::string_view text = stream->push(token);
      const StopMatcher::Output out = matcher.push(text);
      emit(out.text);
      if (out.stopped) {
        result.finish_reason = FinishReason::stop_string;
        break;
      }
    }
  }
  if (stream && result.finish_reason != FinishReason::stop_string) {
    const std::string_view rest = stream->finish();
    const StopMatcher::Output out = matcher.push(rest);
    emit(out.text);
    emit(matcher.finish());
    if (out.stopped) result.finish_reason = FinishReason::stop_string;
  }
  result.timings.decode_seconds = seconds_since(start);
  restore.done = true;
  return result;
} catch (const std::bad_alloc&) {
  detail::throw_out_of_memory("an answer");
}

}  // namespace m2lm
