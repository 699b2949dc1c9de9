// Trainer: steps of gradient descent on a Model, from prompts and their answers.
// Floor: train. May include: core, ops, layers, parts, io, sampling, models.
#pragma once

#include <m2lm/core/gradients.hpp>
#include <m2lm/models/model.hpp>
#include <m2lm/ops/loss.hpp>
#include <m2lm/train/adamw.hpp>
#include <m2lm/train/schedule.hpp>
#include <m2lm/train/selection.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <variant>
#include <vector>

namespace m2lm::inline M2LM_ABI::train {

/// A prompt with the answer that it shall get. The loss is over the answer's tokens and the token that ends it; text, media and
/// template of the prompt take no part.
template <class M>
struct Example {
  typename M::PromptType prompt;
  std::string answer;                      ///< behind the prompt, as the chat template puts it; or
  std::vector<std::int32_t> answer_ids{};  ///< the very ids, and then nothing is added to them
};

/// What is trained, how, and how far in one step.
struct TrainerOptions {
  Selection parameters{};        ///< which are trained
  AdamWOptions adamw{};          ///< how a step follows from the gradients
  Schedule schedule{};           ///< how far, step by step
  double max_gradient_norm = 0;  ///< gradients are scaled down to this global norm; 0 = never
  bool end_answers = true;       ///< an answer given as text is followed by the checkpoint's end token
};

/// What a step did.
struct StepReport {
  std::int64_t step = 0;     ///< 1 for the first
  double loss = 0;           ///< mean over the targets, before the step
  double gradient_norm = 0;  ///< before clipping
  double learning_rate = 0;  ///< of this step
  std::int64_t targets = 0;  ///< tokens in the loss
  std::int64_t rows = 0;     ///< rows that went through the decoder
};

namespace detail {

struct NoSaved {};
template <class Module>
struct SavedOf {
  using type = NoSaved;
};
template <class Module>
requires requires { typename Module::Saved; }
struct SavedOf<Module> {
  using type = typename Module::Saved;
};

/// What one attached instance became, and what its backward pass needs.
template <class C, class S>
struct Media {
  Matrix<S> rows;                       // [rows, hidden], on the tape
  Matrix<S> features;                   // what the projector reads
  std::vector<std::int32_t> token_ids;  // instead of rows
  bool differentiable = false;
  typename SavedOf<decltype(C::encoder)>::type encoder{};
  typename SavedOf<decltype(C::projector)>::type projector{};
};

}  // namespace detail

/// Trains a model in place: its parameters become f32 (f64 on Reference<double>) values of the trainer's, and after each step the
/// layers are packed from them anew, so that generate and save_pretrained always see the newest. Frozen components keep their
/// precision; a decoder of which anything is trained is packed in the backend's own scalar as a whole. A session that was open before
/// holds keys and values of the old weights.
/// While `step` runs, nobody else may use the model. Movable, not copyable.
template <class M>
class Trainer {
  using B = typename M::Backend;
  using S = typename M::Scalar;
  static_assert(HostBackend<B>, "m2lm::Trainer: trains on Cpu and Reference; a device has the backward ops, but no optimiser yet");
  using State = std::remove_cvref_t<decltype(m2lm::detail::ModelAccess::state(std::declval<const M&>()))>;
  using Components = decltype(State::component);
  static constexpr std::size_t components = std::tuple_size_v<Components>;
  using Indices = std::make_index_sequence<components>;

  template <class Tuple>
  struct AllMedia;
  template <class... C>
  struct AllMedia<std::tuple<C...>> {
    using type = std::tuple<std::vector<detail::Media<C, S>>...>;
  };

  /// An example as rows of the batch.
  struct Sequence {
    m2lm::detail::TokenSequence tokens;
    typename AllMedia<Components>::type media;
    std::int64_t begin = 0;   // row of its first token; its last token has no row, as nothing is predicted from it
    std::int64_t prompt = 0;  // tokens of the prompt
    std::int64_t rows() const { return static_cast<std::int64_t>(tokens.ids.size()) - 1; }
  };

  M model_;
  TrainerOptions options_;
  Arena arena_, tape_;
  Gradients<S> gradients_;
  std::vector<std::shared_ptr<Tensor<S>>> values_;  // of the trained parameters, in the order of the gradients
  AdamW<S> optimizer_;
  std::int64_t steps_ = 0;
  bool decoder_trained_ = false;
  std::array<bool, components> encoder_trained_{}, projector_trained_{};

 public:
  /// What a step takes.
  using ExampleType = Example<M>;

  /// throws OptionError for patterns that fit nothing, a schedule or betas out of range.
  Trainer(M model, TrainerOptions options);
  Trainer(Trainer&&) = default;
  Trainer& operator=(Trainer&&) = default;

  /// One step on the mean loss of the batch: examples of any lengths, one below another. throws InputError for an example that does
  /// not fit the model or has no answer, NumericError when loss or gradients are not finite, CapacityError when memory runs out; the parameters are then as they were.
  StepReport step(std::span<const Example<M>> batch);
  /// The same of examples written into the call.
  StepReport step(std::initializer_list<Example<M>> batch) { return step(std::span<const Example<M>>(batch.begin(), batch.size())); }
  /// The mean loss of the batch, without a step.
  double loss(std::span<const Example<M>> batch);
  /// The gradients of the batch's mean loss, unclipped, without a step; valid until the next call.
  const Gradients<S>& gradients(std::span<const Example<M>> batch, double* loss = nullptr);
  /// Those of the last step, as the optimiser got them, or of the last call of the other.
  const Gradients<S>& gradients() const { return gradients_; }

  /// The model in training; a step changes its parameters in place.
  const M& model() const { return model_; }
  /// What it was made with.
  const TrainerOptions& options() const { return options_; }
  /// Steps done so far.
  std::int64_t steps() const { return steps_; }

 private:
  State& state() const { return m2lm::detail::ModelAccess::state(model_); }
  Context<B> context(bool training) {
    return Context<B>{state().backend, arena_, &state().decoder.embed_tokens.weight.value, training ? &tape_ : nullptr};
  }
  template <class F>
  void for_each_component(F&& f) const {
    [&]<std::size_t... I>(std::index_sequence<I...>) { (f(std::integral_constant<std::size_t, I>{}, std::get<I>(state().component)), ...); }
    (Indices{});
  }
  std::string encoder_prefix_of(std::size_t i) const { return m2lm::detail::encoder_prefix(state().tokens[i].name); }
  std::string projector_prefix_of(std::size_t i) const { return m2lm::detail::projector_prefix(state().tokens[i].name); }
  void prepare(bool all);
  std::vector<std::int32_t> answer_ids(const Example<M>& example, std::vector<std::int32_t>& prompt) const;
  Sequence lay_out(Context<B>& ctx, const Example<M>& example, bool training);
  template <std::size_t I>
  detail::Media<std::tuple_element_t<I, Components>, S> encode(Context<B>& ctx, const Example<M>& example, std::size_t instance, bool training);
  void media_backward(Context<B>& ctx, Sequence& sequence, Matrix<const S> dh);
  double run(std::span<const Example<M>> batch, bool training, StepReport& report);
};

// ---- definitions ----------------------------------------------------------------------------------------------------------

template <class M>
Trainer<M>::Trainer(M model, TrainerOptions options) : model_(std::move(model)), options_(std::move(options)) {
  options_.schedule.check();  // nothing of the model is touched before all options are known to be good
  options_.adamw.check();
  std::vector<std::string> names;
  std::vector<std::pair<std::string, Parameter*>> wanted;
  // A parameter's values become a tensor of the trainer's; the model's parameter shares it.
  const auto collect = [&](std::string_view name, Parameter& p) {
    names.emplace_back(name);
    if (!options_.parameters.trains(name)) return;
    wanted.emplace_back(name, &p);
  };
  for_each_parameter(collect, state().decoder);
  decoder_trained_ = !wanted.empty();
  for_each_component([&](auto i, auto& component) {
    using C = std::remove_reference_t<decltype(component)>;
    std::size_t before = wanted.size();
    for_each_parameter(collect, component.encoder, encoder_prefix_of(i));
    encoder_trained_[i] = wanted.size() > before;
    before = wanted.size();
    for_each_parameter(collect, component.projector, projector_prefix_of(i));
    projector_trained_[i] = wanted.size() > before;
    if constexpr (std::is_same_v<typename detail::SavedOf<decltype(C::encoder)>::type, detail::NoSaved>)
      require<OptionError>(!encoder_trained_[i], "m2lm::train: the encoder of <", state().tokens[i].name, "> has no backward pass; freeze \"",
                           encoder_prefix_of(i), ".*\"");
    if constexpr (std::is_same_v<typename detail::SavedOf<decltype(C::projector)>::type, detail::NoSaved>)
      require<OptionError>(!projector_trained_[i] && !encoder_trained_[i], "m2lm::train: the projector of <", state().tokens[i].name,
                           "> has no backward pass; freeze \"", projector_prefix_of(i), ".*\" and its encoder");
  });
  options_.parameters.check(names);
  for (const auto& [name, parameter] : wanted) {
    auto values = std::make_shared<Tensor<S>>(parameter->value.template to<S>());
    parameter->value = AnyTensor(values);
    values_.push_back(std::move(values));
    gradients_.add(name, *parameter);
  }
  optimizer_ = AdamW<S>(gradients_, options_.adamw);
  prepare(true);
}

/// Packs what has changed, or everything. What is trained is packed in the backend's own scalar, and all of it in the form that
/// backward passes read.
template <class M>
void Trainer<M>::prepare(bool all) {
  Context<B> ctx = context(true);
  state().media.clear();
  Precision exact = state().precision;
  exact.weights = exact.lm_head = dtype_of<S>;
  if (decoder_trained_ || all) state().decoder.prepare(ctx, decoder_trained_ ? exact : state().precision, {});
  for_each_component([&](auto i, auto& component) {
    const Precision own = component.precision_of(state().precision);
    if (encoder_trained_[i] || all) component.encoder.prepare(ctx, encoder_trained_[i] ? dtype_of<S> : own.resolve_plain(own.encoders));
    if (projector_trained_[i] || all) component.projector.prepare(ctx, projector_trained_[i] ? dtype_of<S> : own.resolve_plain(own.projectors));
  });
}

/// The ids of an answer. Where the tokenizer joins the answer's beginning with the prompt's end, the joined tokens count to the answer.
template <class M>
std::vector<std::int32_t> Trainer<M>::answer_ids(const Example<M>& example, std::vector<std::int32_t>& prompt) const {
  if (!example.answer_ids.empty()) return example.answer_ids;
  require<InputError>(!example.answer.empty(), "m2lm::train: an example has neither answer nor answer_ids");
  std::vector<std::int32_t> answer;
  if (example.prompt.form == PromptForm::ids) {
    answer = model_.tokenizer().encode(example.answer, false);
  } else {
    const std::vector<std::int32_t> whole = m2lm::detail::ModelAccess::prompt_ids(model_, example.prompt, example.answer);
    const auto common = std::mismatch(prompt.begin(), prompt.end(), whole.begin(), whole.end()).first - prompt.begin();
    prompt.resize(static_cast<std::size_t>(common));
    answer.assign(whole.begin() + common, whole.end());
  }
  const auto& stops = state().files.stop_tokens;
  if (options_.end_answers && !stops.empty()) answer.push_back(stops.front());
  return answer;
}

template <class M>
template <std::size_t I>
auto Trainer<M>::encode(Context<B>& ctx, const Example<M>& example, std::size_t instance, bool training)
    -> detail::Media<std::tuple_element_t<I, Components>, S> {
  using C = std::tuple_element_t<I, Components>;
  const C& component = std::get<I>(state().component);
  const std::string_view name = state().tokens[I].name;
  const std::int64_t hidden = model_.decoder_config().hidden_size;
  const auto& attachment = std::get<I>(example.prompt.attachments)[instance];
  detail::Media<C, S> out;
  const auto keep = [&](const Tensor<S>& rows) {
    out.rows = tape_.template matrix<S>(rows.shape()[0], hidden);
    copy_rows(rows.template view<2>(), out.rows);
  };
  if (const AnyTensor* given = std::get_if<1>(&attachment)) {
    require<InputError>(given->has_value() && given->shape().rank() == 2 && given->shape()[1] == hidden, "m2lm::train: the embeddings attached to <",
                        name, "> are ", given->shape().string(), ", expected [tokens, ", hidden, "]");
    keep(given->template to<S>());
    return out;
  }
  const auto& input = std::get<0>(attachment);
  constexpr bool has_gradient = !std::is_same_v<typename detail::SavedOf<decltype(C::projector)>::type, detail::NoSaved>;
  if constexpr (has_gradient) {
    if (training && (encoder_trained_[I] || projector_trained_[I])) {
      const auto& x = component.preprocessor(input);
      const std::int64_t tokens = component.encoder.tokens(x);
      out.features = tape_.template matrix<S>(tokens, component.encoder.width());
      out.rows = tape_.template matrix<S>(component.projector.output_tokens(tokens), hidden);
      out.differentiable = true;
      if constexpr (!std::is_same_v<typename detail::SavedOf<decltype(C::encoder)>::type, detail::NoSaved>)
        component.encoder.forward(ctx, x, out.features, {}, encoder_trained_[I] ? &out.encoder : nullptr);
      else
        component.encoder.forward(ctx, x, out.features);
      component.projector.forward(ctx, out.features, out.rows, &out.projector);
      return out;
    }
  }
  ModalityOutput<S> encoded = component.encode(ctx, input, hidden);
  require<InputError>(encoded.pyramid.empty(), "m2lm::train: <", name, "> gives features to a hook of the decoder; hooks cannot be trained yet");
  out.token_ids = std::move(encoded.token_ids);
  if (out.token_ids.empty()) keep(encoded.embeddings);
  return out;
}

template <class M>
auto Trainer<M>::lay_out(Context<B>& ctx, const Example<M>& example, bool training) -> Sequence {
  Sequence out;
  std::vector<std::int32_t> prompt = m2lm::detail::ModelAccess::prompt_ids(model_, example.prompt);
  const std::vector<std::int32_t> answer = answer_ids(example, prompt);
  std::vector<m2lm::detail::ComponentInstances> uses;
  for_each_component([&](auto i, auto&) {
    m2lm::detail::ComponentInstances use{.tokens = state().tokens[i], .rows = {}, .token_ids = {}};
    const std::size_t count = std::get<i()>(example.prompt.attachments).size();
    for (std::size_t instance = 0; instance < count; ++instance) {
      auto media = encode<i()>(ctx, example, instance, training);
      use.rows.push_back(media.rows.data() ? media.rows.extent(0) : 0);
      use.token_ids.push_back(media.token_ids);
      std::get<i()>(out.media).push_back(std::move(media));
    }
    uses.push_back(std::move(use));
  });
  out.tokens = m2lm::detail::lay_out(prompt, example.prompt.form == PromptForm::ids, state().bos, uses);
  out.prompt = static_cast<std::int64_t>(out.tokens.ids.size());
  require<InputError>(out.prompt > 0, "m2lm::train: an example's prompt has no tokens; nothing predicts the first token of the answer");
  out.tokens.ids.insert(out.tokens.ids.end(), answer.begin(), answer.end());
  const std::int64_t most = model_.decoder_config().max_position_embeddings;
  require<InputError>(out.rows() <= most, "m2lm::train: an example takes ", out.rows(), " positions (", answer.size(),
                      " of them for the answer), the model has ", most);
  return out;
}

template <class M>
void Trainer<M>::media_backward(Context<B>& ctx, Sequence& sequence, Matrix<const S> dh) {
  for_each_component([&](auto i, auto& component) {
    using C = std::remove_cvref_t<decltype(component)>;
    if constexpr (!std::is_same_v<typename detail::SavedOf<decltype(C::projector)>::type, detail::NoSaved>) {
      for (const m2lm::detail::MediaSpan& span : sequence.tokens.media) {
        if (span.component != i()) continue;
        auto& media = std::get<i()>(sequence.media)[span.instance];
        if (!media.differentiable) continue;
        const Arena::Scope scope(arena_);
        const Matrix<const S> d = dh.rows(sequence.begin + span.begin, sequence.begin + span.begin + span.rows);
        Matrix<S> dfeatures{};
        if (encoder_trained_[i]) dfeatures = arena_.template matrix<S>(media.features.extent(0), media.features.extent(1));
        component.projector.backward(ctx, d, media.projector, gradients_, dfeatures);
        if constexpr (!std::is_same_v<typename detail::SavedOf<decltype(C::encoder)>::type, detail::NoSaved>)
          if (encoder_trained_[i]) component.encoder.backward(ctx, dfeatures, media.encoder, gradients_);
      }
    }
  });
}

/// The mean loss of a batch; with `training` the gradients too.
template <class M>
double Trainer<M>::run(std::span<const Example<M>> batch, bool training, StepReport& report) try {
  require<InputError>(!batch.empty(), "m2lm::train: the batch has no examples");
  gradients_.clear();
  Context<B> ctx = context(training);
  const Arena::Scope tape_scope(tape_), scope(arena_);
  const std::int64_t hidden = model_.decoder_config().hidden_size;
  auto& decoder = state().decoder;
  using Decoder = std::remove_reference_t<decltype(decoder)>;

  std::vector<Sequence> sequences;
  std::vector<SequenceRows<B>> rows_of;
  std::int64_t rows = 0;
  for (const Example<M>& example : batch) {
    sequences.push_back(lay_out(ctx, example, training));
    sequences.back().begin = rows;
    rows_of.push_back(SequenceRows<B>{.cache = nullptr, .begin = rows, .count = sequences.back().rows(), .media = {}});
    rows += sequences.back().rows();
  }
  // Row t of a sequence predicts its token t + 1. Only rows that predict a token of an answer go through the head.
  std::vector<std::int32_t> targets;
  std::vector<std::int64_t> predicting;
  for (const Sequence& s : sequences)
    for (std::int64_t t = M2LM_FAULT(43) ? 0 : s.prompt - 1; t < s.rows(); ++t) {
      predicting.push_back(s.begin + t);
      targets.push_back(s.tokens.ids[static_cast<std::size_t>(t + 1)]);
    }
  const auto count = static_cast<std::int64_t>(targets.size());
  report.targets = count;
  report.rows = rows;

  // Embeddings: text by its ids, media as they were encoded.
  const Matrix<S> h = tape_.template matrix<S>(rows, hidden);
  const auto for_text = [&](auto&& f) {  // f(ids, rows of h) for each stretch of text
    for (const Sequence& s : sequences) {
      const std::span<const std::int32_t> ids = s.tokens.ids;
      std::int64_t at = 0;
      const auto until = [&](std::int64_t end) {
        if (end > at) f(ids.subspan(static_cast<std::size_t>(at), static_cast<std::size_t>(end - at)), s.begin + at, s.begin + end);
      };
      for (const m2lm::detail::MediaSpan& span : s.tokens.media) {
        until(span.begin);
        at = span.begin + span.rows;
      }
      until(s.rows());
    }
  };
  for_text(
      [&](std::span<const std::int32_t> ids, std::int64_t begin, std::int64_t end) { decoder.embed_tokens.forward(ctx, ids, h.rows(begin, end)); });
  for (Sequence& s : sequences)
    for_each_component([&](auto i, auto&) {
      for (const m2lm::detail::MediaSpan& span : s.tokens.media)
        if (span.component == i())
          copy_rows(Matrix<const S>(std::get<i()>(s.media)[span.instance].rows), h.rows(s.begin + span.begin, s.begin + span.begin + span.rows));
    });

  typename Decoder::Saved saved;
  decoder.forward(ctx, h, rows_of, {}, training ? &saved : nullptr);
  const Matrix<S> picked = tape_.template matrix<S>(count, hidden);
  for (std::int64_t i = 0; i < count; ++i) std::copy_n(h.row(predicting[static_cast<std::size_t>(i)]), hidden, picked.row(i));
  const Matrix<S> logits = tape_.template matrix<S>(count, model_.decoder_config().vocab_size);
  decoder.predict(ctx, picked, logits, training ? &saved : nullptr);
  const Vector<S> losses(arena_.template take<S>(count), {count});
  const double scale = 1.0 / static_cast<double>(count);
  ops::cross_entropy(ctx, Matrix<const S>(logits), targets, scale, losses, training ? logits : Matrix<S>{});
  double loss = 0;
  for (std::int64_t i = 0; i < count; ++i) loss += static_cast<double>(losses(i));
  loss *= scale;
  if (!training) return loss;
  require<NumericError>(std::isfinite(loss), "m2lm::train: the loss of step ", steps_ + 1,
                        " is not finite; nothing was changed. Lower the learning rate, or look at the data");

  // Back through the head and the blocks to the rows of h.
  const Matrix<S> dpicked = arena_.template matrix<S>(count, hidden), dh = arena_.template matrix<S>(rows, hidden);
  decoder.predict_backward(ctx, Matrix<const S>(logits), saved, gradients_, dpicked);
  std::fill_n(dh.data(), dh.elements(), S(0));
  for (std::int64_t i = 0; i < count; ++i) std::copy_n(dpicked.row(i), hidden, dh.row(predicting[static_cast<std::size_t>(i)]));
  const bool embeddings_trained = gradients_.trains(decoder.embed_tokens.weight);
  bool media_trained = false;
  for (std::size_t i = 0; i < components; ++i) media_trained = media_trained || encoder_trained_[i] || projector_trained_[i];
  decoder.backward(ctx, dh, saved, gradients_, embeddings_trained || media_trained);
  if (embeddings_trained)
    for_text([&](std::span<const std::int32_t> ids, std::int64_t begin, std::int64_t end) {
      decoder.embed_tokens.backward(ctx, ids, Matrix<const S>(dh.rows(begin, end)), gradients_);
    });
  if (media_trained)
    for (Sequence& s : sequences) media_backward(ctx, s, dh);
  return loss;
} catch (const std::bad_alloc&) {
  m2lm::detail::throw_out_of_memory("training on a batch");
}

template <class M>
StepReport Trainer<M>::step(std::span<const Example<M>> batch) {
  StepReport report;
  report.loss = run(batch, true, report);
  report.gradient_norm = clip_gradients(gradients_, options_.max_gradient_norm);
  require<NumericError>(std::isfinite(report.gradient_norm), "m2lm::train: the gradients of step ", steps_ + 1,
                        " are not finite; nothing was changed. Lower the learning rate, or look at the data");
  report.learning_rate = options_.schedule(steps_);
  optimizer_.step(gradients_, values_, report.learning_rate);
  report.step = ++steps_;
  prepare(false);
  return report;
}

template <class M>
double Trainer<M>::loss(std::span<const Example<M>> batch) {
  StepReport report;
  return run(batch, false, report);
}

template <class M>
auto Trainer<M>::gradients(std::span<const Example<M>> batch, double* loss) -> const Gradients<S>& {
  StepReport report;
  const double value = run(batch, true, report);
  if (loss) *loss = value;
  return gradients_;
}

}  // namespace m2lm::train
