// BasicSession: one conversation on a model, and what changes while it goes on.
// Floor: models. May include: core, ops, layers, parts, io, sampling.
#pragma once

#include <m2lm/core/arena.hpp>
#include <m2lm/layers/kv_cache.hpp>
#include <m2lm/models/answer.hpp>
#include <m2lm/models/chat_template.hpp>
#include <m2lm/models/device_decoding.hpp>
#include <m2lm/models/generation.hpp>
#include <m2lm/models/media_cache.hpp>
#include <m2lm/models/prompt.hpp>
#include <m2lm/models/sequence.hpp>
#include <m2lm/parts/decoders/llama.hpp>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <memory>
#include <new>
#include <optional>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

namespace m2lm::inline M2LM_ABI {

/// What a session is made with.
struct SessionOptions {
  std::int64_t max_positions = 0;  ///< context length; 0 = the checkpoint's max_position_embeddings
  std::uint64_t seed = 0;          ///< of tokens that are drawn, where GenerateOptions::seed is 0
};

/// One conversation on a model: KV cache, scratch memory, random numbers. Movable; one thread at a time.
template <class M>
class BasicSession {
  using B = typename M::Backend;
  using S = typename M::Scalar;
  using PromptType = typename M::PromptType;

  /// Rows of media at cached positions.
  struct CachedMedia {
    std::int64_t begin = 0, rows = 0;
    ContentKey key{};
  };
  M model_;
  Arena arena_{memory_of(model_.backend())};
  KvCache<B> cache_;
  Rng rng_;
  bool seeded_ = false;
  std::optional<std::int64_t> new_tokens_;  // of a session for one answer: its cache is made when the prompt's length is known
  std::vector<std::int32_t> history_;    // ids at the cached positions
  std::vector<std::int32_t> pending_;    // chosen, but not yet seen by the decoder
  bool chatting_ = false;                // the cache begins with a rendered chat
  std::vector<CachedMedia> media_;       // at the cached positions, in their order
  std::vector<CrossInstance<S>> cross_;  // those of them that hooks of the decoder read
  struct NoDeviceDecoding {};
  using Decoding = typename std::conditional_t<HostBackend<B>, std::type_identity<NoDeviceDecoding>, std::type_identity<detail::DeviceDecoding<B>>>::type;
  std::unique_ptr<Decoding> decoding_;  // of a device; kept, so that its recorded steps stay good

  /// Puts a session back where it stood, unless `done`.
  struct Restore {
    BasicSession& session;
    std::int64_t length = session.cache_.length();
    std::size_t ids = session.history_.size(), media = session.media_.size(), cross = session.cross_.size();
    std::vector<std::int32_t> pending = session.pending_;
    Rng rng = session.rng_;
    bool seeded = session.seeded_, chatting = session.chatting_, done = false;

    explicit Restore(BasicSession& s) : session(s) {}
    Restore(const Restore&) = delete;
    Restore& operator=(const Restore&) = delete;
    /// What has been forgotten stays so.
    void retake() {
      length = session.cache_.length();
      ids = session.history_.size();
      media = session.media_.size();
      cross = session.cross_.size();
      pending.clear();
      chatting = false;
    }
    ~Restore() {
      if (done) return;
      try {
        session.cache_.truncate(length);
      } catch (const DeviceError&) {  // a device that has failed says so at the next call, too
      }
      session.history_.resize(ids);
      session.media_.resize(media);
      session.cross_.resize(cross);
      session.pending_ = std::move(pending);
      session.rng_ = rng;
      session.seeded_ = seeded;
      session.chatting_ = chatting;
    }
  };

  /// One prompt on its way into a session.
  struct Turn {
    BasicSession& session;
    const PromptType& prompt;
    std::optional<std::vector<std::int32_t>> ids{};  // instead of the prompt's
    typename M::Embedded embedded{};
    std::int64_t kept = 0;  // positions of the sequence that the cache holds already
    double encode_seconds = 0;
    Restore restore;

    Turn(BasicSession& s, const PromptType& p) : session(s), prompt(p), restore(s) {}
    std::int64_t tokens() const { return static_cast<std::int64_t>(embedded.sequence.ids.size()); }
  };
  using Turns = std::vector<std::unique_ptr<Turn>>;
  friend M;

 public:
  /// An empty conversation. throws CapacityError when the KV cache does not fit in memory, OptionError for a length that the model has not.
  BasicSession(M model, const SessionOptions& options);

  /// Answers the prompt. A chat prompt after the first is the next turn, ids and raw text are appended: what the cache holds is not
  /// computed again. throws CapacityError naming both lengths when the prompt does not fit in the context, or the answer grows beyond
  /// it; InputError for a prompt that does not fit the model; what `on_text` throws. The session is then as it was before the call.
  Generation generate(const PromptType& prompt, const GenerateOptions& options = {});

  /// Answers a prompt that is the whole sequence from its first token on, as a server gets it. Positions that the cache holds already
  /// (equal ids, and media of equal content) are kept, the others forgotten. throws as generate; when it does, what was forgotten
  /// stays so.
  Generation complete(const PromptType& whole, const GenerateOptions& options = {});

  /// A session that goes on from here by itself. The positions so far are copied; nothing is computed again.
  BasicSession fork() const;

  /// Positions in the cache.
  std::int64_t length() const { return cache_.length(); }
  /// Positions that the cache can hold: the context length.
  std::int64_t max_positions() const { return cache_.capacity(); }
  /// Ids at the cached positions; media stand as placeholder ids.
  std::span<const std::int32_t> history() const { return history_; }
  /// Most scratch bytes in use at once so far.
  std::size_t peak_scratch_bytes() const { return arena_.peak_bytes(); }

 private:
  BasicSession(M model, KvCache<B> cache) : model_(std::move(model)), cache_(std::move(cache)) {}
  /// A session for one prompt and so many tokens behind it.
  BasicSession(M model, std::int64_t new_tokens) : model_(std::move(model)), new_tokens_(new_tokens) {}

  std::int64_t common_prefix(const typename M::Embedded& embedded) const;
  void forget_from(std::int64_t position);
  static void prepare(Turn& turn, bool whole);
  static Tensor<S> prefill(Turns& turns);
  static std::vector<Generation> answer(Turns& turns, const GenerateOptions& options, FunctionRef<void(std::size_t, std::string_view)> on_text = {});
  struct Answering;
  // Templates of Backend = B, so that `template class BasicSession<M>` leaves out the one that its backend has not.
  template <class Backend>
  static void decode(Answering& a, Tensor<S> hidden);
  template <class Backend>
  static void decode_on_device(Answering& a, const Tensor<S>& hidden);
  static std::vector<Score> score(Turns& turns, std::span<const std::vector<std::int32_t>> continuations);
};

// Members are defined out of class, as Model's are.

template <class M>
BasicSession<M>::BasicSession(M model, const SessionOptions& options) try : model_(std::move(model)), rng_(options.seed), seeded_(options.seed != 0) {
  const LlamaConfig& config = model_.decoder_config();
  const std::int64_t positions = options.max_positions == 0 ? config.max_position_embeddings : options.max_positions;
  require<OptionError>(positions > 0 && positions <= config.max_position_embeddings, "m2lm: a session of ", positions,
                       " positions; the checkpoint has max_position_embeddings = ", config.max_position_embeddings);
  [[maybe_unused]] const auto turn = exclusive(model_.backend());
  Context<B> ctx{model_.backend(), arena_};
  cache_ = model_.state_->decoder.make_cache(ctx, model_.cache_format(), positions);
} catch (const std::bad_alloc&) {
  detail::throw_out_of_memory("a session");
}

template <class M>
BasicSession<M> BasicSession<M>::fork() const try {
  [[maybe_unused]] const auto turn = exclusive(model_.backend());
  Arena arena(memory_of(model_.backend()));
  Context<B> ctx{model_.backend(), arena};
  BasicSession out(model_, cache_.fork(ctx, cache_.capacity()));
  out.rng_ = rng_;
  out.seeded_ = seeded_;
  out.history_ = history_;
  out.pending_ = pending_;
  out.chatting_ = chatting_;
  out.media_ = media_;
  out.cross_ = cross_;
  return out;
} catch (const std::bad_alloc&) {
  detail::throw_out_of_memory("a session");
}

/// Positions of the cache that hold the beginning of a sequence; at least one of the sequence is left to compute.
template <class M>
std::int64_t BasicSession<M>::common_prefix(const typename M::Embedded& embedded) const {
  const std::vector<std::int32_t>& ids = embedded.sequence.ids;
  std::size_t count = static_cast<std::size_t>(std::mismatch(ids.begin(), ids.end(), history_.begin(), history_.end()).first - ids.begin());
  // Placeholders look alike: the media behind them must be the same too.
  std::size_t i = 0;
  for (const detail::MediaSpan& span : embedded.sequence.media) {
    if (span.begin >= static_cast<std::int64_t>(count)) break;
    const CachedMedia* cached = i < media_.size() ? &media_[i++] : nullptr;
    if (!cached || cached->begin != span.begin || cached->rows != span.rows || (cached->key != embedded.media[span.component][span.instance]->key && !M2LM_FAULT(63)))
      count = static_cast<std::size_t>(span.begin);
  }
  if (i < media_.size()) count = std::min(count, static_cast<std::size_t>(media_[i].begin));
  return static_cast<std::int64_t>(std::min(count, ids.size() - 1));
}

template <class M>
void BasicSession<M>::forget_from(std::int64_t position) {
  cache_.truncate(position);
  history_.resize(static_cast<std::size_t>(position));
  std::erase_if(media_, [&](const CachedMedia& m) { return m.begin >= position; });
  std::erase_if(cross_, [&](const CrossInstance<S>& m) { return m.begin >= position; });
}

/// Finds the ids of a turn, encodes its media, and makes room in the books of its session. `whole`: it begins the sequence.
template <class M>
void BasicSession<M>::prepare(Turn& turn, bool whole) {
  BasicSession& s = turn.session;
  const auto& state = *s.model_.state_;
  Context<B> ctx = s.model_.context(s.arena_, Phase::prefill);
  std::vector<std::int32_t> ids;
  if (turn.ids) {
    ids = *turn.ids;
  } else if (!whole && s.chatting_ && turn.prompt.form == PromptForm::chat) {
    require<InputError>(turn.prompt.system.empty(), "m2lm: a system message opens a conversation; this one has begun");
    // An end token that the model chose is not in the cache yet; the template says whether one stands between turns.
    const auto& ends = state.files.stop_tokens;
    if (!s.pending_.empty() && std::find(ends.begin(), ends.end(), s.pending_.back()) != ends.end()) s.pending_.clear();
    ids = s.model_.encode_text(render_continuation(s.model_.template_of(turn.prompt), turn.prompt.text, false), false);
  } else {
    ids = s.model_.prompt_ids(turn.prompt, whole || s.cache_.length() == 0);
  }
  const auto start = std::chrono::steady_clock::now();
  turn.embedded = s.model_.embed_media(ctx, turn.prompt, std::move(ids));
  turn.encode_seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  if (whole) {
    turn.kept = s.common_prefix(turn.embedded);
    s.forget_from(turn.kept);
    s.pending_.clear();
    s.chatting_ = false;
    turn.restore.retake();
  } else if (!M2LM_FAULT(31)) {  // what was chosen last goes in front
    turn.embedded.sequence.prepend(s.pending_);
  }
  if (s.new_tokens_ && s.cache_.capacity() == 0) {
    const std::int64_t most = s.model_.decoder_config().max_position_embeddings, wanted = std::max<std::int64_t>(*s.new_tokens_, 0);
    const std::int64_t positions = wanted < most - turn.tokens() ? turn.tokens() + wanted : most;
    s.cache_ = state.decoder.make_cache(ctx, s.model_.cache_format(), positions);
  }
  const std::int64_t length = s.cache_.length(), more = turn.tokens() - turn.kept;
  require<CapacityError>(length + more <= s.cache_.capacity(), "m2lm: the prompt needs ", length + more, " positions (", length, " used, ", more,
                         " new), the context holds ", s.cache_.capacity());
  const std::int64_t first = length - turn.kept;  // position of the sequence's first id
  for (const detail::MediaSpan& span : turn.embedded.sequence.media)
    if (span.begin >= turn.kept) s.media_.push_back({first + span.begin, span.rows, turn.embedded.media[span.component][span.instance]->key});
  for (CrossInstance<S>& instance : turn.embedded.cross_instances(first))
    if (instance.begin >= length) s.cross_.push_back(std::move(instance));
}

/// Runs the decoder over the new positions of all turns, in pieces of fixed size (each result is the same as at once), and returns the
/// hidden state of each turn's last position: [turns, hidden].
template <class M>
auto BasicSession<M>::prefill(Turns& turns) -> Tensor<S> {
  const M& model = turns[0]->session.model_;
  const auto& state = *model.state_;
  Arena& arena = turns[0]->session.arena_;
  Context<B> ctx = model.context(arena, Phase::prefill);
  const std::int64_t hidden = model.decoder_config().hidden_size;
  constexpr std::int64_t piece = [] {
    if constexpr (HostBackend<B>)
      return 512;
    else
      return B::prefill_rows;
  }();
  struct Part {
    std::size_t turn;
    std::int64_t from, count;
  };
  std::vector<Part> parts;
  std::vector<SequenceRows<B>> rows;
  Tensor<S> last = make_tensor<S>(model.backend(), Shape{static_cast<std::int64_t>(turns.size()), hidden});
  std::int64_t from = turns[0]->kept;
  for (std::size_t t = 0; t < turns.size();) {
    parts.clear();
    rows.clear();
    std::int64_t total = 0;
    while (t < turns.size() && total < piece) {
      const std::int64_t count = std::min(piece - total, turns[t]->tokens() - from);
      parts.push_back({t, from, count});
      rows.push_back({&turns[t]->session.cache_, total, count, turns[t]->session.cross_});
      total += count;
      from += count;
      if (from == turns[t]->tokens() && ++t < turns.size()) from = turns[t]->kept;
    }
    const Arena::Scope scope(arena);
    const Matrix<S> h = arena.matrix<S>(total, hidden);
    for (std::size_t i = 0; i < parts.size(); ++i)
      model.embed(ctx, turns[parts[i].turn]->embedded, parts[i].from, h.rows(rows[i].begin, rows[i].begin + parts[i].count));
    state.decoder.forward(ctx, h, rows);
    for (std::size_t i = 0; i < parts.size(); ++i)
      if (parts[i].from + parts[i].count == turns[parts[i].turn]->tokens())
        ops::copy_rows(ctx, Matrix<const S>(h).rows(rows[i].begin + parts[i].count - 1, rows[i].begin + parts[i].count),
                       last.template view<2>().rows(static_cast<std::int64_t>(parts[i].turn), static_cast<std::int64_t>(parts[i].turn) + 1));
  }
  for (const auto& turn : turns) {
    BasicSession& s = turn->session;
    s.history_.insert(s.history_.end(), turn->embedded.sequence.ids.begin() + turn->kept, turn->embedded.sequence.ids.end());
    s.pending_.clear();
    s.chatting_ = s.chatting_ || turn->prompt.form == PromptForm::chat;
  }
  return last;
}

/// Answers on their way.
template <class M>
struct BasicSession<M>::Answering {
  using Clock = std::chrono::steady_clock;
  Turns& turns;
  const GenerateOptions& options;
  const M& model = turns[0]->session.model_;
  Arena& arena = turns[0]->session.arena_;
  Context<B> ctx = model.context(arena, Phase::decode);
  std::vector<std::unique_ptr<detail::Answer>> answers{};
  std::vector<std::size_t> active{};  // turns whose answers go on; row r of a batch is of turn active[r]

  BasicSession& session(std::size_t turn) const { return turns[turn]->session; }
  std::int64_t count() const { return static_cast<std::int64_t>(active.size()); }
  void drop_ended() {
    std::erase_if(active, [&](std::size_t i) -> bool { return answers[i]->ended(); });
  }
  /// Ends all answers if the caller wants no more of them.
  bool cancelled() {
    if (!options.cancel || !options.cancel->load()) return false;
    for (const std::size_t i : active) answers[i]->end(FinishReason::cancelled);
    return true;
  }
  void require_room(const BasicSession& s) const {
    require<CapacityError>(s.cache_.length() < s.cache_.capacity(), "m2lm: the answer needs ", s.cache_.length() + 1, " positions, the context holds ",
                           s.cache_.capacity());
  }
  /// The token chosen last has gone through the decoder.
  void count_step(std::size_t turn) {
    BasicSession& s = session(turn);
    s.history_.push_back(s.pending_.front());
    s.pending_.clear();
    ++answers[turn]->result.timings.decode_tokens;
  }
  SequenceRows<B> row_of(std::size_t turn, std::int64_t row) const {
    BasicSession& s = session(turn);
    return {&s.cache_, row, 1, M2LM_FAULT(62) ? std::span<const CrossInstance<S>>() : s.cross_};
  }
};

/// Prefills the prepared turns and answers them together: one step of the decoder gives the next token of all that go on. Each answer
/// is the same as alone.
template <class M>
std::vector<Generation> BasicSession<M>::answer(Turns& turns, const GenerateOptions& options,
                                                FunctionRef<void(std::size_t, std::string_view)> on_text) {
  using Clock = std::chrono::steady_clock;
  const auto seconds_since = [](Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); };
  Answering a{.turns = turns, .options = options};
  const M& model = a.model;
  const auto& state = *model.state_;

  // All memory that the answers need is taken before they begin; the context bounds it.
  struct Stream {
    FunctionRef<void(std::size_t, std::string_view)> on_text;
    std::size_t index;
    void operator()(std::string_view text) const { on_text(index, text); }
  };
  std::vector<Stream> streams;
  for (std::size_t i = 0; i < turns.size(); ++i) streams.push_back({on_text, i});
  for (std::size_t i = 0; i < turns.size(); ++i) {
    BasicSession& s = turns[i]->session;
    if (!s.seeded_ || options.seed != 0) s.rng_ = Rng(options.seed);
    s.seeded_ = true;
    const std::int64_t room = s.cache_.capacity() - s.cache_.length() - (turns[i]->tokens() - turns[i]->kept);
    std::span<const std::string_view> stop_strings;
    if (turns[i]->prompt.form == PromptForm::chat) stop_strings = model.template_of(turns[i]->prompt).stop_strings;
    a.answers.push_back(std::make_unique<detail::Answer>(options, detail::AnswerContext{.vocab_size = model.decoder_config().vocab_size, .room = room,
                                                          .tokenizer = state.files.tokenizer ? &*state.files.tokenizer : nullptr,
                                                          .stop_tokens = state.files.stop_tokens, .stop_strings = stop_strings,
                                                          .on_text = on_text ? FunctionRef<void(std::string_view)>(streams[i]) : options.on_text}));
    s.history_.reserve(s.history_.size() + static_cast<std::size_t>(turns[i]->tokens() + std::min(options.max_new_tokens, room + 1)));
    a.answers.back()->result.timings.encode_seconds = turns[i]->encode_seconds;
    a.answers.back()->result.timings.prefill_tokens = turns[i]->tokens() - turns[i]->kept;
    a.active.push_back(i);
  }
  auto start = Clock::now();
  Tensor<S> hidden = prefill(turns);
  if constexpr (!HostBackend<B>) model.backend().synchronize();
  const double prefill_seconds = seconds_since(start);
  for (std::size_t i = 0; i < turns.size(); ++i) {
    turns[i]->session.pending_.reserve(1);
    a.answers[i]->result.timings.prefill_seconds = prefill_seconds;
  }
  start = Clock::now();
  a.drop_ended();  // no token was asked for
  if constexpr (HostBackend<B>)
    decode<B>(a, std::move(hidden));
  else
    decode_on_device<B>(a, hidden);
  std::vector<Generation> out;
  for (std::size_t i = 0; i < turns.size(); ++i) {
    a.answers[i]->result.timings.decode_seconds = seconds_since(start);
    out.push_back(std::move(a.answers[i]->result));
    turns[i]->restore.done = true;
  }
  return out;
}

/// Chooses tokens from the last hidden states of all turns, and feeds them, until all answers have ended.
template <class M>
template <class Backend>
void BasicSession<M>::decode(Answering& a, Tensor<S> hidden) {
  const auto& state = *a.model.state_;
  const std::int64_t vocab = a.model.decoder_config().vocab_size;
  const auto turns = static_cast<std::int64_t>(a.turns.size());
  std::vector<SequenceRows<B>> rows;
  rows.reserve(a.turns.size());
  std::vector<std::int32_t> ids;
  ids.reserve(a.turns.size());
  Tensor<S> logits(Shape{turns, vocab});
  Tensor<float> narrow(Shape{std::is_same_v<S, float> ? 0 : vocab});
  // The rows of `hidden` are written anew before the next step reads them.
  for (bool first = true; !a.active.empty(); first = false) {
    if (a.cancelled()) break;
    if (!first) {  // feed the tokens chosen last
      rows.clear();
      ids.clear();
      for (const std::size_t i : a.active) {
        BasicSession& s = a.session(i);
        a.require_room(s);
        rows.push_back(a.row_of(i, static_cast<std::int64_t>(rows.size())));
        ids.push_back(s.pending_.front());
      }
      const Matrix<S> h = hidden.template view<2>().rows(0, a.count());
      state.decoder.embed_tokens.forward(a.ctx, ids, h);
      state.decoder.forward(a.ctx, h, rows);
      for (const std::size_t i : a.active) a.count_step(i);
    }
    state.decoder.predict(a.ctx, hidden.template view<2>().rows(0, a.count()), logits.template view<2>().rows(0, a.count()));
    state.files.require_intact();  // embeddings are read from the file, and packed weights may be
    for (std::int64_t r = 0; r < a.count(); ++r) {
      const std::size_t i = a.active[static_cast<std::size_t>(r)];
      S* row = logits.data() + r * vocab;
      std::span<float> processed;  // the sampler overwrites it
      if constexpr (std::is_same_v<S, float>) {
        processed = {row, static_cast<std::size_t>(vocab)};
      } else {
        for (std::int64_t j = 0; j < vocab; ++j) narrow.data()[j] = static_cast<float>(row[j]);
        processed = narrow.span();
      }
      BasicSession& s = a.session(i);
      try {
        s.pending_.push_back(a.answers[i]->next(processed, s.history_, s.rng_));
      } catch (const NumericError& error) {
        throw NumericError(error.what() + a.model.non_finite_weights());
      }
    }
    a.drop_ended();
  }
}

/// The same where the device chooses the tokens. While a token travels to the host, the next step is computed already; it is forgotten
/// if the token turns out to be the last.
template <class M>
template <class Backend>
void BasicSession<M>::decode_on_device(Answering& a, const Tensor<S>& hidden) {
  if (a.active.empty()) return;
  const M& model = a.model;
  const auto& state = *model.state_;
  std::unique_ptr<Decoding>& decoding = a.turns[0]->session.decoding_;
  if (!decoding || decoding->rows() < a.count())
    decoding = std::make_unique<Decoding>(a.ctx, a.count(), model.decoder_config().hidden_size, model.decoder_config().vocab_size);
  Decoding& d = *decoding;
  std::vector<SequenceRows<B>> rows;
  std::vector<detail::DeviceRow> samplers;
  std::vector<std::int32_t> ids;
  std::vector<std::vector<std::int32_t>> histories(a.turns.size());

  const auto begin = [&] {
    samplers.clear();
    for (const std::size_t i : a.active) {
      const BasicSession& s = a.session(i);
      histories[i] = s.history_;
      histories[i].insert(histories[i].end(), s.pending_.begin(), s.pending_.end());
      samplers.push_back({&a.answers[i]->sampling(), &s.rng_, histories[i]});
    }
    d.begin(a.ctx, samplers);
  };
  const auto choose = [&] {
    const Arena::Scope scope(a.arena);
    state.decoder.predict(a.ctx, Matrix<const S>(d.hidden(a.count())), d.logits(a.count()));
    d.choose(a.ctx, a.count());
  };
  // Feeds the tokens that were chosen last and chooses the next.
  const auto step = [&] {
    rows.clear();
    std::int64_t keys = 0;
    ops::StepKey key = d.key(a.count());
    std::uint64_t caches = 0;
    for (const std::size_t i : a.active) {
      const BasicSession& s = a.session(i);
      a.require_room(s);
      rows.push_back(a.row_of(i, static_cast<std::int64_t>(rows.size())));
      keys = std::max(keys, s.cache_.length() + 1);
      caches = caches * 0x9E3779B97F4A7C15U + s.cache_.number();
    }
    key.words[3] = caches;
    key.words[4] = static_cast<std::uint64_t>(B::key_bucket(keys));
    key.words[5] = a.arena.generation();
    const bool called = ops::replay(a.ctx, key, [&] {
      const Matrix<S> h = d.hidden(a.count());
      state.decoder.embed_tokens.forward(a.ctx, d.ids(a.count()), h);
      state.decoder.forward(a.ctx, h, rows);
      choose();
    });
    if (!called)
      for (const std::size_t i : a.active) a.session(i).cache_.count_repeated(1);
    d.post(a.ctx, a.count());
  };

  for (std::int64_t r = 0; r < a.count(); ++r) {
    const auto from = static_cast<std::int64_t>(a.active[static_cast<std::size_t>(r)]);
    ops::copy_rows(a.ctx, hidden.template view<2>().rows(from, from + 1), d.hidden(a.count()).rows(r, r + 1));
  }
  begin();
  choose();
  d.post(a.ctx, a.count());
  for (;;) {
    if (a.cancelled()) break;
    bool ahead = true;
    for (const std::size_t i : a.active) ahead = ahead && a.answers[i]->tokens_left() > 1 && a.session(i).cache_.length() < a.session(i).cache_.capacity();
    if (ahead) step();
    const std::span<const std::int32_t> chosen = d.read();
    for (std::int64_t r = 0; r < a.count(); ++r) {
      const std::size_t i = a.active[static_cast<std::size_t>(r)];
      BasicSession& s = a.session(i);
      const std::int32_t token = chosen[static_cast<std::size_t>(r)];
      if (token < 0) throw NumericError("m2lm: the logits hold NaN or infinity" + model.non_finite_weights());
      if (a.answers[i]->sampling().temperature != 0) s.rng_.next();  // as the device did
      s.pending_.push_back(token);
      a.answers[i]->accept(token);
    }
    const std::size_t before = a.active.size();
    const std::vector<std::size_t> stepped = a.active;
    a.drop_ended();
    if (ahead && a.active.size() == before) {
      for (const std::size_t i : a.active) a.count_step(i);
      continue;
    }
    if (ahead)  // computed for rows that are no longer the same
      for (const std::size_t i : stepped) a.session(i).cache_.truncate(a.session(i).cache_.length() - 1);
    if (a.active.empty()) break;
    ids.clear();
    for (const std::size_t i : a.active) ids.push_back(a.session(i).pending_.front());
    begin();
    d.feed(a.ctx, ids);
    step();
    for (const std::size_t i : a.active) a.count_step(i);
  }
}

template <class M>
Generation BasicSession<M>::generate(const PromptType& prompt, const GenerateOptions& options) try {
  [[maybe_unused]] const auto exclusively = exclusive(model_.backend());
  Turns turns;
  turns.push_back(std::make_unique<Turn>(*this, prompt));
  prepare(*turns[0], false);
  return std::move(answer(turns, options).front());
} catch (const std::bad_alloc&) {
  detail::throw_out_of_memory("an answer");
}

template <class M>
Generation BasicSession<M>::complete(const PromptType& whole, const GenerateOptions& options) try {
  [[maybe_unused]] const auto exclusively = exclusive(model_.backend());
  Turns turns;
  turns.push_back(std::make_unique<Turn>(*this, whole));
  prepare(*turns[0], true);
  return std::move(answer(turns, options).front());
} catch (const std::bad_alloc&) {
  detail::throw_out_of_memory("an answer");
}

/// log P of each continuation behind the one prepared turn, which is computed once.
template <class M>
std::vector<Score> BasicSession<M>::score(Turns& turns, std::span<const std::vector<std::int32_t>> continuations) {
  BasicSession& session = turns[0]->session;
  const M& model = session.model_;
  const auto& state = *model.state_;
  const LlamaConfig& config = model.decoder_config();
  Arena& arena = session.arena_;
  Context<B> ctx = model.context(arena, Phase::prefill);
  std::int64_t longest = 0;
  for (std::size_t i = 0; i < continuations.size(); ++i) {
    for (const std::int32_t id : continuations[i])
      require<InputError>(id >= 0 && id < config.vocab_size, "m2lm: token id ", id, " of continuation ", i, " is outside the vocabulary of ", config.vocab_size);
    longest = std::max(longest, static_cast<std::int64_t>(continuations[i].size()));
  }
  const std::int64_t room = session.cache_.capacity() - session.cache_.length() - turns[0]->tokens();
  require<CapacityError>(longest - 1 <= room, "m2lm: a continuation of ", longest, " tokens behind a prompt of ", turns[0]->tokens(), " needs more than the ",
                         session.cache_.capacity(), " positions that the context holds");
  const Tensor<S> last = prefill(turns);

  // log P of a token in a row of logits, and whether greedy decoding would choose it.
  using Host = typename M::HostScalar;
  const auto add = [&](Score& score, const Host* row, std::int32_t token) {
    double largest = static_cast<double>(row[0]), sum = 0;
    for (std::int64_t j = 0; j < config.vocab_size; ++j) largest = std::max(largest, static_cast<double>(row[j]));
    for (std::int64_t j = 0; j < config.vocab_size; ++j) sum += std::exp(static_cast<double>(row[j]) - largest);
    if (!std::isfinite(largest) || !std::isfinite(sum)) throw NumericError("m2lm: the logits hold NaN or infinity" + model.non_finite_weights());
    const double own = static_cast<double>(row[token]);
    score.log_probability += own - largest - std::log(sum);
    score.greedy = score.greedy && std::max_element(row, row + config.vocab_size) - row == token;
    ++score.tokens;
  };
  std::vector<Score> out(continuations.size());
  constexpr std::int64_t piece = 16;  // rows of logits at a time
  const auto predict = [&](Matrix<const S> h) {
    const Arena::Scope scope(arena);
    const Matrix<AccumulatorOf<B>> logits = arena.matrix<AccumulatorOf<B>>(h.extent(0), config.vocab_size);
    state.decoder.predict(ctx, h, logits);
    return ops::download(ctx, Matrix<const AccumulatorOf<B>>(logits));
  };
  const Tensor<Host> first = predict(last.template view<2>());
  for (std::size_t i = 0; i < continuations.size(); ++i) {
    const std::span<const std::int32_t> ids = continuations[i];
    if (ids.empty()) continue;
    add(out[i], first.data(), ids[0]);
    const auto rest = static_cast<std::int64_t>(ids.size()) - 1;
    const std::int64_t length = session.cache_.length();
    const Arena::Scope scope(arena);
    const Matrix<S> h = arena.matrix<S>(rest, config.hidden_size);
    state.decoder.embed_tokens.forward(ctx, ids.first(static_cast<std::size_t>(rest)), h);
    const SequenceRows<B> rows{&session.cache_, 0, rest, session.cross_};
    state.decoder.forward(ctx, h, std::span<const SequenceRows<B>>(&rows, 1));
    session.cache_.truncate(length);  // the next continuation stands in the same place
    for (std::int64_t begin = 0; begin < rest; begin += piece) {
      const std::int64_t count = std::min(piece, rest - begin);
      const Tensor<Host> logits = predict(h.rows(begin, begin + count));
      for (std::int64_t t = 0; t < count; ++t) add(out[i], logits.data() + t * config.vocab_size, ids[static_cast<std::size_t>(begin + t) + 1]);
    }
  }
  return out;
}

}  // namespace m2lm
