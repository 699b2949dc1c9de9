// Model: a decoder and its components on a backend, loaded from a checkpoint.
// Floor: models. May include: core, ops, layers, parts, io, sampling.
#pragma once

#include <m2lm/io/checkpoint.hpp>
#include <m2lm/io/tokenizer.hpp>
#include <m2lm/layers/kv_cache.hpp>
#include <m2lm/models/adapter.hpp>
#include <m2lm/models/chat_template.hpp>
#include <m2lm/models/generation.hpp>
#include <m2lm/models/hf_config.hpp>
#include <m2lm/models/loader.hpp>
#include <m2lm/models/media_cache.hpp>
#include <m2lm/models/modality.hpp>
#include <m2lm/models/packed_cache.hpp>
#include <m2lm/models/prompt.hpp>
#include <m2lm/models/save.hpp>
#include <m2lm/models/sequence.hpp>
#include <m2lm/models/session.hpp>
#include <m2lm/ops/transfer.hpp>

#include <algorithm>
#include <memory>
#include <new>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

namespace m2lm::inline M2LM_ABI {

struct GgufModel;

/// `progress` refers to a callable and does not own it, as GenerateOptions::on_text.
struct LoadOptions {
  std::optional<Precision> precision = {};                          ///< instead of the one in the type (a `With` component keeps its own)
  std::string_view template_name = {};                              ///< chat template instead of the checkpoint's
  FunctionRef<void(double)> progress = {};                          ///< fraction done, 0 to 1
  bool allow_unexpected = true;                                     ///< false: tensors that the model does not know are an error
  bool follow_links = false;                                        ///< true: symbolic links may lead out of the directory
  bool check = false;                                               ///< true: NaN or infinity among the weights is an error that names them all
  CheckpointLimits limits = {};                                     ///< of config.json and the tensors' files
  std::size_t media_cache_bytes = std::size_t{128} << 20;           ///< encoded media that are kept, by content; 0 = none
  std::size_t memory_limit = 0;                                     ///< bytes the packed model may take; 0 = what the system has free
  std::string_view adapter = {};                                    ///< directory of a PEFT adapter (LoRA) for this checkpoint
  AdapterMode adapter_mode = AdapterMode::merge;                    ///< into the weights, or beside them
  std::string_view vision_tower = {};                               ///< of LLaVA's own layout: the tower's directory, or the one that it is in
  std::string_view tokenizer_directory = {};                        ///< of from_config: where the tokenizer and preprocessor files are, if any
  PackedCacheMode packed_cache_mode = PackedCacheMode::when_valid;  ///< whether a file of packed weights is used
  std::string_view packed_cache = {};                               ///< the file of packed weights; default: beside the checkpoint, for `weights`
};

namespace detail {

/// What a directory says besides its tensors.
struct ModelFiles {
  std::string directory;
  ConfigValue config;
  Checkpoint checkpoint;
  PackedCache packed;
  std::optional<Tokenizer> tokenizer;   ///< empty when the directory has none; `tokenizer_error` says why
  std::string tokenizer_error;
  const ChatTemplate* chat_template = nullptr;
  std::vector<std::int32_t> stop_tokens;

  /// throws CheckpointError naming a file that was truncated, or could not be read, since it was opened.
  void require_intact() const {
    checkpoint.require_intact();
    packed.require_intact();
  }
};
ModelFiles open_model_files(std::string_view directory, const LoadOptions& options);

/// The template of the checkpoint: by the Jinja text in its files (or in `gguf`), else by its type and name. throws as detect_chat_template.
const ChatTemplate& find_chat_template(const ConfigValue& config, std::string_view directory, const GgufModel* gguf);

/// throws CapacityError unless `needed` bytes are available; `limit` 0 asks the system.
void require_memory(std::string_view directory, std::size_t needed, std::size_t limit, DType format);

/// The files of a model that is made from a config: no tensors yet, a tokenizer if `directory` has one.
ModelFiles model_files_of_config(const ConfigValue& config, std::string_view directory, std::string_view template_name);

/// The way of the save, train and inspection code to what a Model holds.
struct ModelAccess {
  template <class M>
  static auto& state(const M& model) {
    return *model.state_;
  }
  template <class M, class P>
  static std::vector<std::int32_t> prompt_ids(const M& model, const P& prompt, std::string_view answer = {}) {
    return model.prompt_ids(prompt, true, answer);
  }
};

/// The token that begins a sequence: the tokenizer's, or without one config.json's bos_token_id.
std::optional<std::int32_t> bos_token(const ModelFiles& files);

/// The tokens of component `index`: config.json's NAME_token_index (or NAME_token_id), NAME_begin_token_id and NAME_end_token_id, else
/// the tokenizer's "<NAME>", `before` and `after`. A placeholder that is no token gets the id -1 - index.
/// throws CheckpointError when there is no token for `before` or `after`.
ComponentTokens component_tokens(const ModelFiles& files, std::string_view name, std::size_t index, InsertionKind insertion, std::string_view before,
                                 std::string_view after);

/// Ids of a text in which the placeholders that are no tokens stand too: the text between them is tokenized piece by piece.
std::vector<std::int32_t> encode_text(const Tokenizer& tokenizer, std::string_view text, bool add_bos, std::span<const ComponentTokens> components);

}  // namespace detail

/// Immutable after load; copies are handles on the same weights, and several threads may use one. Sizes come from config.json,
/// choices are in the type.
template <class B, Precision P, class Decoder, class... Component>
class Model {
 public:
  /// What computes.
  using Backend = B;
  using Scalar = ScalarOf<B>;
  /// The element of logits and hidden states on the host.
  using HostScalar = HostScalarOf<B>;
  /// What `prompt` gives: text, with places for this model's components.
  using PromptType = Prompt<Component...>;
  /// A conversation on this model.
  using Session = BasicSession<Model>;

  /// Loads config.json, *.safetensors, and the tokenizer if there is one. throws CheckpointError with all that is missing or does
  /// not fit, CapacityError before any work if the memory will not do, OptionError for a format the backend has not.
  static Model from_pretrained(std::string_view directory, B backend = {}, const LoadOptions& options = {});

  /// A model of random weights, as transformers initialises them; the same seed gives the same ones everywhere. throws as from_pretrained.
  static Model from_config(const ConfigValue& config, std::uint64_t seed, B backend = {}, const LoadOptions& options = {});
  /// Writes config.json, model.safetensors (or shards) and the tokenizer's files, named as in the checkpoint, for from_pretrained and
  /// transformers. An old directory of the name is replaced in one step; files in it that belong to no checkpoint stay.
  /// throws InputError or CapacityError naming the file; what was there before is then still there.
  void save_pretrained(std::string_view directory, const SaveOptions& options = {}) const;

  /// A user's turn, in the checkpoint's chat template.
  PromptType prompt(std::string_view text) const;
  /// Text without a template.
  PromptType raw_prompt(std::string_view text) const;
  /// Token ids as they are. requires ids inside the vocabulary.
  PromptType prompt(std::vector<std::int32_t> ids) const;

  /// The ids that the decoder sees, one placeholder id per row of media.
  std::vector<std::int32_t> input_ids(const PromptType& prompt) const;
  /// What the decoder sees of one input of a component: [tokens, hidden], or, of one that enters as discrete tokens, their ids.
  template <FixedString Name, class Input>
  auto encode(const Input& input) const;
  /// The id that stands for a component's instances in token ids; negative, and outside the vocabulary, where the checkpoint has none.
  template <FixedString Name>
  std::int32_t placeholder_id() const;
  /// Logits of every position: [tokens, vocabulary].
  Tensor<HostScalar> logits(const PromptType& prompt) const;
  /// The same for several prompts in one batch; bit-equal to one at a time. throws CapacityError for a prompt beyond the model's positions.
  std::vector<Tensor<HostScalar>> logits(std::span<const PromptType> prompts) const;
  /// hidden_states[i] as transformers numbers them: 0 = embeddings, i = after block i, the last with the final norm. Only the
  /// listed ones, in that order; an empty list asks for all. Negative numbers count from the end.
  std::vector<Tensor<HostScalar>> hidden_states(const PromptType& prompt, std::span<const int> layers = {}) const;
  /// A new session's answer.
  Generation generate(const PromptType& prompt, const GenerateOptions& options = {}) const;
  /// Answers several prompts together, of any lengths and with any media; each answer is bit-equal to that of the prompt alone (with the
  /// same seed, so equal prompts get equal answers). `on_text` is called with the index of the prompt. throws OptionError for
  /// options.on_text, which could not say whose text it gets; otherwise as generate, and then no answer is given.
  std::vector<Generation> generate(std::span<const PromptType> prompts, const GenerateOptions& options = {},
                                   FunctionRef<void(std::size_t, std::string_view)> on_text = {}) const;
  /// How likely each continuation is behind the prompt, which is computed once. Tokens are those that follow the prompt's when both are
  /// tokenized as one text (a chat's template puts its space between them); a token that crosses the border counts to the
  /// continuation. requires a prompt of text.
  std::vector<Score> score(const PromptType& prompt, std::span<const std::string> continuations) const;
  /// The same with token ids.
  std::vector<Score> score(const PromptType& prompt, std::span<const std::vector<std::int32_t>> continuations) const;
  /// A conversation of its own.
  Session session(const SessionOptions& options = {}) const;

  /// Sizes and constants of the decoder.
  const LlamaConfig& decoder_config() const;
  /// config.json as it was read.
  const ConfigValue& config() const;
  /// throws InputError saying what the directory lacks when it has no tokenizer that can be read.
  const Tokenizer& tokenizer() const;
  /// What goes around the turns of a chat.
  const ChatTemplate& chat_template() const;
  /// What checkpoint and model disagreed on without being an error.
  const LoadReport& load_report() const;
  /// Encoded media that are kept for the next prompt with the same content.
  MediaCacheStats media_cache_stats() const;
  /// The backend that the model was loaded with; copies of the model share it.
  B& backend() const;

 private:
  using DecoderOn = typename Decoder::template On<B, P>;
  static constexpr std::size_t components = sizeof...(Component);
  friend class BasicSession<Model>;
  friend struct detail::ModelAccess;

  struct State {
    B backend;
    detail::ModelFiles files;
    Precision precision;
    DecoderOn decoder;
    std::tuple<typename Component::template On<B, P>...> component;
    std::vector<detail::ComponentTokens> tokens;  // of each component
    std::optional<std::int32_t> bos;
    mutable detail::MediaCache media;
    LoadReport report;

    State(B b, detail::ModelFiles f, const Precision& p, std::size_t media_cache_bytes);
  };
  using MediaPointer = std::shared_ptr<const detail::EncodedMedia<Scalar>>;
  struct Embedded {
    detail::TokenSequence sequence;
    std::vector<std::vector<MediaPointer>> media;  // [component][instance]

    /// What hooks of the decoder read, with the sequence beginning at position `first`.
    std::vector<CrossInstance<Scalar>> cross_instances(std::int64_t first) const {
      std::vector<CrossInstance<Scalar>> out;
      for (const detail::MediaSpan& span : sequence.media)
        if (const auto& cross = media[span.component][span.instance]->cross) out.push_back({cross, first + span.begin, span.rows});
      return out;
    }
  };

  std::shared_ptr<State> state_;

  static typename Decoder::Config read_decoder_config(const ConfigValue& root);
  static Model load(detail::ModelFiles files, B backend, const LoadOptions& options);
  template <class F>
  void for_each_component(F&& f) const;
  Model() = default;
  void require_positions(std::int64_t tokens) const {
    require<CapacityError>(tokens <= decoder_config().max_position_embeddings, "m2lm: the prompt needs ", tokens, " positions, the model has ",
                           decoder_config().max_position_embeddings);
  }
  Context<B> context(Arena& arena, Phase phase) const {
    return {.backend = state_->backend, .arena = arena, .embedding_table = &state_->decoder.embed_tokens.weight.value, .phase = phase};
  }
  const ChatTemplate& template_of(const PromptType& prompt) const;
  std::vector<detail::NamedParameter> named_parameters() const;
  /// Which weights a NaN in the logits comes from, as detail::non_finite_values says it.
  std::string non_finite_weights() const;
  std::vector<std::int32_t> encode_text(std::string_view text, bool add_bos) const;
  /// `answer`: the ids of prompt and answer together, the answer as a chat's template puts it.
  std::vector<std::int32_t> prompt_ids(const PromptType& prompt, bool first = true, std::string_view answer = {}) const;
  std::vector<Score> score(const PromptType& prompt, std::optional<std::vector<std::int32_t>> ids,
                           std::span<const std::vector<std::int32_t>> continuations) const;
  MediaPointer given_media(Context<B>& ctx, const AnyTensor& given, const detail::ComponentTokens& tokens) const;
  template <class Component_, class Input>
  MediaPointer encode_media(Context<B>& ctx, const Component_& component, std::size_t index, const Input& input) const;
  Embedded embed_media(Context<B>& ctx, const PromptType& prompt, std::vector<std::int32_t> ids) const;
  void embed(Context<B>& ctx, const Embedded& embedded, std::int64_t begin, Matrix<Scalar> h) const;
  DType cache_format() const { return state_->precision.resolve_plain(state_->precision.kv_cache, plain_format_on<B>); }
};

// ---- Model ----------------------------------------------------------------------------------------------------------------
// Members are defined out of class: only then does `extern template class` keep their bodies from being instantiated.

template <class B, Precision P, class D, class... C>
typename D::Config Model<B, P, D, C...>::read_decoder_config(const ConfigValue& root) {
  typename D::Config config{};
  read_config(root, config);
  return config;
}

template <class B, Precision P, class D, class... C>
Model<B, P, D, C...>::State::State(B b, detail::ModelFiles f, const Precision& p, std::size_t media_cache_bytes)
    : backend(std::move(b)),
      files(std::move(f)),
      precision(p),
      decoder(read_decoder_config(files.config)),
      component(typename C::template On<B, P>(files.config, files.directory, decoder.config().hidden_size)...),
      bos(detail::bos_token(files)),
      media(media_cache_bytes) {
  (tokens.push_back(detail::component_tokens(files, C::name.view(), tokens.size(), C::InsertionPolicy::kind, C::InsertionPolicy::before,
                                             C::InsertionPolicy::after)),
   ...);
}

template <class B, Precision P, class D, class... C>
Model<B, P, D, C...> Model<B, P, D, C...>::from_pretrained(std::string_view directory, B backend, const LoadOptions& options) try {
  return load(detail::open_model_files(directory, options), std::move(backend), options);
} catch (const std::bad_alloc&) {
  detail::throw_out_of_memory("loading a model");
}

template <class B, Precision P, class D, class... C>
Model<B, P, D, C...> Model<B, P, D, C...>::from_config(const ConfigValue& config, std::uint64_t seed, B backend, const LoadOptions& options) try {
  detail::ModelFiles files = detail::model_files_of_config(config, options.tokenizer_directory, options.template_name);
  {
    const State shapes(backend, files, P, 0);
    std::vector<Parameter> parameters;
    std::vector<detail::NamedParameter> named;
    const auto count = [&](std::string_view name, const Parameter& p) {
      parameters.push_back(Parameter(p.shape));
      named.push_back({std::string(name), nullptr});
    };
    for_each_parameter(count, shapes.decoder);
    std::apply([&](const auto&... c) { (for_each_parameter(count, c), ...); }, shapes.component);
    for (std::size_t i = 0; i < named.size(); ++i) named[i].parameter = &parameters[i];
    files.checkpoint = detail::initial_checkpoint(files.config, named, seed);
  }
  return load(std::move(files), std::move(backend), options);
} catch (const std::bad_alloc&) {
  detail::throw_out_of_memory("making a model");
}

template <class B, Precision P, class D, class... C>
void Model<B, P, D, C...>::save_pretrained(std::string_view directory, const SaveOptions& options) const try {
  const std::vector<detail::NamedParameter> parameters = named_parameters();
  const detail::ModelFiles& files = state_->files;
  detail::save_model(directory, {.directory = files.directory, .config = files.config, .checkpoint = files.checkpoint, .parameters = parameters}, options);
} catch (const std::bad_alloc&) {
  detail::throw_out_of_memory("saving a model");
}

template <class B, Precision P, class D, class... C>
std::vector<detail::NamedParameter> Model<B, P, D, C...>::named_parameters() const {
  std::vector<detail::NamedParameter> out;
  const detail::CollectParameters collect{out};
  for_each_parameter(collect, state_->decoder);
  std::apply([&](auto&... c) { (for_each_parameter(collect, c), ...); }, state_->component);
  return out;
}

template <class B, Precision P, class D, class... C>
std::string Model<B, P, D, C...>::non_finite_weights() const {
  return detail::non_finite_values(named_parameters(), state_->files.checkpoint);
}

template <class B, Precision P, class D, class... C>
Model<B, P, D, C...> Model<B, P, D, C...>::load(detail::ModelFiles files, B backend, const LoadOptions& options) {
  const Precision precision = options.precision.value_or(P);
  const B held = backend;  // it lives until the turn is given back
  [[maybe_unused]] const auto turn = exclusive(held);
  Model model;
  model.state_ = std::make_shared<State>(std::move(backend), std::move(files), precision, options.media_cache_bytes);
  State& state = *model.state_;
  const std::string& directory = state.files.directory;

  std::vector<detail::NamedParameter> parameters;
  const detail::CollectParameters collect{parameters};
  std::vector<DType> formats;  // what each parameter is to be packed in
  for_each_parameter(collect, state.decoder);
  for (const detail::NamedParameter& p : parameters)
    formats.push_back(p.name.starts_with("lm_head") || p.name.starts_with("model.embed_tokens") ? precision.resolve(precision.lm_head) : precision.weights);
  const auto add_component = [&](auto& component) {
    for_each_parameter(collect, component);
    const Precision own = component.precision_of(precision);
    const DType encoder = own.resolve_plain(own.encoders, plain_format_on<B>), projector = own.resolve_plain(own.projectors, plain_format_on<B>);
    formats.resize(parameters.size(), dtype_bytes(encoder, group_values) < dtype_bytes(projector, group_values) ? projector : encoder);
  };
  std::apply([&](auto&... c) { (add_component(c), ...); }, state.component);
  state.report = detail::bind_parameters(parameters, state.files.checkpoint, hugging_face_names);
  require_complete(state.report, directory);
  if (!options.allow_unexpected && !state.report.unexpected.empty())
    throw CheckpointError(concat("m2lm: the checkpoint in ", directory, " holds tensors that the model does not know:", state.report.string()));

  detail::PackedCache& packed = state.files.packed;
  if constexpr (!PackedForm<B>::name.empty()) {
    std::string path(options.packed_cache);
    if (path.empty()) path = detail::packed_cache_path(directory, PackedForm<B>::name, precision.weights);
    state.report.packed_cache = packed.start({options.packed_cache_mode, std::move(path), PackedForm<B>::name, PackedForm<B>::version, options.check}, parameters,
                                             state.files.checkpoint);
  } else {
    require<OptionError>(options.packed_cache_mode == PackedCacheMode::when_valid || options.packed_cache_mode == PackedCacheMode::ignored,
                         "m2lm: this backend has no packed weights in files");
  }

  // Bytes that packing takes: matrices in the format of their part, vectors in the backend's scalar.
  std::size_t needed = 0;
  for (std::size_t i = 0; i < parameters.size(); ++i) {
    const Parameter& p = *parameters[i].parameter;
    // An embedding table is read where it lies; only as the head too it is packed.
    if (HostBackend<B> && parameters[i].name == "model.embed_tokens.weight" && !state.decoder.config().tie_word_embeddings) continue;
    const bool is_packed = p.shape.rank() >= 2 && std::is_same_v<HostScalar, float> && !std::is_same_v<B, Reference<float>>;
    const DType format = is_packed ? ops::format_to_pack(std::span(&p.value, 1), formats[i]) : DType::native;
    if (packed.holds(parameters[i].name, format)) continue;
    needed += is_packed ? ops::packed_bytes(format, p.shape) : static_cast<std::size_t>(p.shape.elements()) * sizeof(Scalar);
  }
  if (!options.adapter.empty())
    needed += detail::apply_adapter(parameters, options.adapter, options.adapter_mode, hugging_face_names, options.limits, options.follow_links);
  if (options.check) {
    const std::string bad = detail::non_finite_values(parameters, state.files.checkpoint);
    require<CheckpointError>(bad.empty(), "m2lm: the checkpoint in ", directory, " holds weights that are not finite:", bad);
  }
  if constexpr (HostBackend<B>) {
    detail::require_memory(directory, needed, options.memory_limit, precision.weights);
  } else {
    const std::size_t free = state.backend.memory().available();
    detail::require_memory(directory, needed, options.memory_limit == 0 ? free : std::min(free, options.memory_limit), precision.weights);
  }

  Arena arena(memory_of(state.backend));
  Context<B> ctx = model.context(arena, Phase::prefill);
  state.decoder.make_cache(ctx, model.cache_format(), 0);  // a format that the backend has not is said now
  const auto find = [&](std::span<const AnyTensor> sources, DType format, bool gated) {
    std::int64_t rows = 0;
    for (const AnyTensor& source : sources) rows += source.shape()[0];
    PackedMatrix found = packed.find(sources, format, gated, PackedForm<B>::bytes(state.backend, format, rows, ops::columns_of(sources[0].shape()), gated));
    if (!found.empty()) ++state.report.mapped_matrices;
    return found;
  };
  const auto made = [&](std::span<const AnyTensor> sources, const PackedMatrix& matrix) {
    if (packed.writes()) packed.keep(sources, matrix);
  };
  const PackHooks hooks{find, made};
  if (packed.reads() || packed.writes()) ctx.packing = &hooks;
  // What has been packed is not needed of the file any more: at no time are all tensors in memory twice.
  const Checkpoint& files_read = state.files.checkpoint;
  const double share = components == 0 ? 0.0 : 0.2;
  const auto prepare_component = [&](auto& component) {
    component.prepare(ctx, precision);
    files_read.release_pages();
  };
  std::apply([&](auto&... c) { (prepare_component(c), ...); }, state.component);
  state.decoder.prepare(ctx, precision, [&](std::int64_t done, std::int64_t total) {
    files_read.release_pages();
    if (options.progress) options.progress(1.0 - (1.0 - share) * static_cast<double>(total - done) / static_cast<double>(total));
  });
  if (packed.writes()) packed.write(state.files.checkpoint);
  state.files.require_intact();
  files_read.release_pages();
  return model;
}

template <class B, Precision P, class D, class... C>
auto Model<B, P, D, C...>::prompt(std::string_view text) const -> PromptType {
  PromptType p;
  p.text = text;
  return p;
}

template <class B, Precision P, class D, class... C>
auto Model<B, P, D, C...>::raw_prompt(std::string_view text) const -> PromptType {
  PromptType p;
  p.form = PromptForm::raw;
  p.text = text;
  return p;
}

template <class B, Precision P, class D, class... C>
auto Model<B, P, D, C...>::prompt(std::vector<std::int32_t> ids) const -> PromptType {
  PromptType p;
  p.form = PromptForm::ids;
  p.ids = std::move(ids);
  return p;
}

template <class B, Precision P, class D, class... C>
template <class F>
void Model<B, P, D, C...>::for_each_component(F&& f) const {
  [&]<std::size_t... I>(std::index_sequence<I...>) {
    (f(std::integral_constant<std::size_t, I>{}, std::get<I>(state_->component)), ...);
  }(std::index_sequence_for<C...>{});
}

template <class B, Precision P, class D, class... C>
const ChatTemplate& Model<B, P, D, C...>::template_of(const PromptType& prompt) const {
  return prompt.template_name.empty() ? chat_template() : m2lm::chat_template(prompt.template_name);
}

template <class B, Precision P, class D, class... C>
std::vector<std::int32_t> Model<B, P, D, C...>::encode_text(std::string_view text, bool add_bos) const {
  return detail::encode_text(tokenizer(), text, add_bos, state_->tokens);
}

template <class B, Precision P, class D, class... C>
std::vector<std::int32_t> Model<B, P, D, C...>::prompt_ids(const PromptType& prompt, bool first, std::string_view answer) const {
  if (prompt.form == PromptForm::ids) return prompt.ids;
  if (prompt.form == PromptForm::raw) return encode_text(concat(prompt.text, answer), first);
  const ChatTemplate& format = template_of(prompt);
  std::vector<Message> messages;
  if (!prompt.system.empty()) messages.push_back({Role::system, prompt.system});
  messages.push_back({Role::user, prompt.text});
  return encode_text(answer.empty() ? render(format, messages) : concat(render(format, messages), format.answer_prefix, answer), first && format.add_bos);
}

/// Embeddings that a prompt gives itself.
template <class B, Precision P, class D, class... C>
auto Model<B, P, D, C...>::given_media([[maybe_unused]] Context<B>& ctx, const AnyTensor& given, const detail::ComponentTokens& tokens) const -> MediaPointer {
  const std::int64_t hidden = decoder_config().hidden_size;
  require<InputError>(tokens.insertion != InsertionKind::discrete_tokens, "m2lm: <", tokens.name, "> enters as token ids; embeddings cannot be attached to it");
  require<InputError>(given.has_value() && given.shape().rank() == 2 && given.shape()[1] == hidden, "m2lm: the embeddings attached to <", tokens.name, "> are ",
                      given.shape(), ", expected [tokens, ", hidden, "]");
  auto media = std::make_shared<detail::EncodedMedia<Scalar>>();
  Tensor<HostScalar> host = given.template to<HostScalar>();
  const auto is_finite = [](HostScalar x) { return x - x == HostScalar(0); };
  const std::span<const HostScalar> values = std::as_const(host).span();
  const auto bad = std::find_if_not(values.begin(), values.end(), is_finite) - values.begin();
  require<InputError>(bad == static_cast<std::ptrdiff_t>(values.size()), "m2lm: the embeddings attached to <", tokens.name, "> hold NaN or infinity in row ",
                      bad / std::max<std::int64_t>(1, hidden));
  if constexpr (HostBackend<B>)
    media->rows = std::move(host);
  else
    media->rows = ops::upload_tensor(ctx, AnyTensor(std::move(host)));
  ContentHash hash;
  hash_content(hash, given);
  media->key = hash.key();
  return media;
}

/// What a component makes of an input, from the cache if it has been encoded before.
template <class B, Precision P, class D, class... C>
template <class Component, class Input>
auto Model<B, P, D, C...>::encode_media(Context<B>& ctx, const Component& component, std::size_t index, const Input& input) const -> MediaPointer {
  ContentKey key;
  if constexpr (detail::HashableContent<Input>) {
    ContentHash hash;
    hash.value(index);
    hash_content(hash, input);
    key = hash.key();
    if (const auto found = state_->media.find(key)) return std::static_pointer_cast<const detail::EncodedMedia<Scalar>>(found);
  } else {
    key = detail::unique_key();
  }
  auto media = std::make_shared<detail::EncodedMedia<Scalar>>();
  media->key = key;
  ModalityOutput<Scalar> encoded = component.encode(ctx, input, decoder_config().hidden_size);
  media->rows = std::move(encoded.embeddings);
  media->token_ids = std::move(encoded.token_ids);
  if (!encoded.pyramid.empty()) media->cross = state_->decoder.cross_features(ctx, std::move(encoded.pyramid));
  if constexpr (detail::HashableContent<Input>) state_->media.insert(key, media, media->bytes());
  return media;
}

template <class B, Precision P, class D, class... C>
auto Model<B, P, D, C...>::embed_media(Context<B>& ctx, const PromptType& prompt, std::vector<std::int32_t> ids) const -> Embedded {
  Embedded out;
  std::vector<detail::ComponentInstances> uses;
  for_each_component([&](auto index, const auto& component) {
    detail::ComponentInstances use{.tokens = state_->tokens[index()], .rows = {}, .token_ids = {}};
    std::vector<MediaPointer> instances;
    for (const auto& attachment : std::get<index()>(prompt.attachments)) {
      if (const AnyTensor* given = std::get_if<1>(&attachment))
        instances.push_back(given_media(ctx, *given, use.tokens));
      else
        instances.push_back(encode_media(ctx, component, index(), std::get<0>(attachment)));
      const detail::EncodedMedia<Scalar>& media = *instances.back();
      use.rows.push_back(media.rows.shape().rank() == 2 ? media.rows.shape()[0] : 0);
      use.token_ids.push_back(media.token_ids);
    }
    uses.push_back(std::move(use));
    out.media.push_back(std::move(instances));
  });
  out.sequence = detail::lay_out(ids, prompt.form == PromptForm::ids, state_->bos, uses);
  require<InputError>(!out.sequence.ids.empty(), "m2lm: the prompt has no tokens");
  return out;
}

template <class B, Precision P, class D, class... C>
void Model<B, P, D, C...>::embed(Context<B>& ctx, const Embedded& embedded, std::int64_t begin, Matrix<Scalar> h) const {
  const std::int64_t end = begin + h.extent(0);
  const std::span<const std::int32_t> ids = embedded.sequence.ids;
  std::int64_t at = begin;
  const auto text_until = [&](std::int64_t stop) {
    if (stop <= at) return;
    state_->decoder.embed_tokens.forward(ctx, ids.subspan(static_cast<std::size_t>(at), static_cast<std::size_t>(stop - at)), h.rows(at - begin, stop - begin));
    at = stop;
  };
  for (const detail::MediaSpan& span : embedded.sequence.media) {
    const std::int64_t from = std::max(span.begin, begin), to = std::min(span.begin + span.rows, end);
    if (from >= to) continue;
    text_until(from);
    const Tensor<Scalar>& rows = embedded.media[span.component][M2LM_FAULT(28) ? 0 : span.instance]->rows;
    const auto source = rows.template view<2>();
    ops::copy_rows(ctx, source.rows(from - span.begin, to - span.begin), h.rows(from - begin, to - begin));
    at = to;
  }
  text_until(end);
}

template <class B, Precision P, class D, class... C>
std::vector<std::int32_t> Model<B, P, D, C...>::input_ids(const PromptType& prompt) const {
  [[maybe_unused]] const auto turn = exclusive(state_->backend);
  Arena arena(memory_of(state_->backend));
  Context<B> ctx = context(arena, Phase::prefill);
  return embed_media(ctx, prompt, prompt_ids(prompt)).sequence.ids;
}

template <class B, Precision P, class D, class... C>
template <FixedString Name, class Input>
auto Model<B, P, D, C...>::encode(const Input& input) const try {
  constexpr std::size_t index = detail::component_index<Name, C...>();
  static_assert(index < sizeof...(C), "m2lm::Model::encode<name>: this model has no component of that name");
  [[maybe_unused]] const auto turn = exclusive(state_->backend);
  Arena arena(memory_of(state_->backend));
  Context<B> ctx = context(arena, Phase::prefill);
  const auto embed = [&](const auto& x) { return std::get<index>(state_->component).encode(ctx, x, decoder_config().hidden_size); };
  ModalityOutput<Scalar> out = [&] {
    using Expected = typename std::tuple_element_t<index, std::tuple<C...>>::Input;
    if constexpr (detail::StandsForInput<const Input, Expected>)
      return embed(to_input(InputTag<Expected>{}, input));
    else
      return embed(input);
  }();
  if constexpr (std::tuple_element_t<index, std::tuple<C...>>::InsertionPolicy::kind == InsertionKind::discrete_tokens)
    return std::move(out.token_ids);
  else if constexpr (HostBackend<B>)
    return std::move(out.embeddings);
  else
    return ops::download(ctx, std::as_const(out.embeddings).template view<2>());
} catch (const std::bad_alloc&) {
  detail::throw_out_of_memory("encoding an input");
}

template <class B, Precision P, class D, class... C>
template <FixedString Name>
std::int32_t Model<B, P, D, C...>::placeholder_id() const {
  constexpr std::size_t index = detail::component_index<Name, C...>();
  static_assert(index < sizeof...(C), "m2lm::Model::placeholder_id<name>: this model has no component of that name");
  return state_->tokens[index].placeholder;
}

template <class B, Precision P, class D, class... C>
auto Model<B, P, D, C...>::logits(const PromptType& prompt) const -> Tensor<HostScalar> {
  return std::move(logits(std::span<const PromptType>(&prompt, 1)).front());
}

template <class B, Precision P, class D, class... C>
auto Model<B, P, D, C...>::logits(std::span<const PromptType> prompts) const -> std::vector<Tensor<HostScalar>> try {
  [[maybe_unused]] const auto turn = exclusive(state_->backend);
  Arena arena(memory_of(state_->backend));
  Context<B> ctx = context(arena, Phase::prefill);
  std::vector<Embedded> embedded;
  std::vector<KvCache<B>> caches;
  std::int64_t rows = 0;
  for (const PromptType& p : prompts) {
    embedded.push_back(embed_media(ctx, p, prompt_ids(p)));
    const auto tokens = static_cast<std::int64_t>(embedded.back().sequence.ids.size());
    require_positions(tokens);
    caches.push_back(state_->decoder.make_cache(ctx, cache_format(), tokens));
    rows += tokens;
  }
  const LlamaConfig& config = decoder_config();
  const Arena::Scope scope(arena);
  const Matrix<Scalar> h = arena.matrix<Scalar>(rows, config.hidden_size);
  std::vector<SequenceRows<B>> sequences;
  std::vector<std::vector<CrossInstance<Scalar>>> media;
  media.reserve(prompts.size());
  std::int64_t row = 0;
  for (std::size_t i = 0; i < prompts.size(); ++i) {
    const std::int64_t count = caches[i].capacity();
    embed(ctx, embedded[i], 0, h.rows(row, row + count));
    media.push_back(embedded[i].cross_instances(0));
    sequences.push_back({&caches[i], row, count, media.back()});
    row += count;
  }
  state_->decoder.forward(ctx, h, sequences);
  std::vector<Tensor<HostScalar>> out;
  for (const SequenceRows<B>& s : sequences) {
    if constexpr (HostBackend<B>) {
      out.emplace_back(Shape{s.count, config.vocab_size});
      state_->decoder.predict(ctx, h.rows(s.begin, s.begin + s.count), out.back().template view<2>());
    } else {
      const Arena::Scope logits_scope(arena);
      const Matrix<AccumulatorOf<B>> logits = arena.matrix<AccumulatorOf<B>>(s.count, config.vocab_size);
      state_->decoder.predict(ctx, h.rows(s.begin, s.begin + s.count), logits);
      out.push_back(ops::download(ctx, Matrix<const AccumulatorOf<B>>(logits)));
    }
  }
  state_->files.require_intact();
  return out;
} catch (const std::bad_alloc&) {
  detail::throw_out_of_memory("the logits of a prompt");
}

template <class B, Precision P, class D, class... C>
auto Model<B, P, D, C...>::hidden_states(const PromptType& prompt, std::span<const int> layers) const -> std::vector<Tensor<HostScalar>> try {
  [[maybe_unused]] const auto turn = exclusive(state_->backend);
  Arena arena(memory_of(state_->backend));
  Context<B> ctx = context(arena, Phase::prefill);
  const Embedded embedded = embed_media(ctx, prompt, prompt_ids(prompt));
  const auto tokens = static_cast<std::int64_t>(embedded.sequence.ids.size());
  require_positions(tokens);
  const LlamaConfig& config = decoder_config();
  std::vector<std::int64_t> wanted;
  for (const int layer : layers) {
    const std::int64_t i = layer < 0 ? config.num_layers + 1 + layer : layer;
    require<OptionError>(i >= 0 && i <= config.num_layers, "m2lm::Model::hidden_states: layer ", layer, " of a decoder with ", config.num_layers, " layers");
    wanted.push_back(i);
  }
  if (layers.empty())
    for (std::int64_t i = 0; i <= config.num_layers; ++i) wanted.push_back(i);

  KvCache<B> cache = state_->decoder.make_cache(ctx, cache_format(), tokens);
  Tensor<Scalar> h = make_tensor<Scalar>(state_->backend, Shape{tokens, config.hidden_size});
  embed(ctx, embedded, 0, h.template view<2>());
  std::vector<Tensor<HostScalar>> all(static_cast<std::size_t>(config.num_layers) + 1);
  const std::vector<CrossInstance<Scalar>> media = embedded.cross_instances(0);
  const SequenceRows<B> rows{&cache, 0, tokens, media};
  state_->decoder.forward(ctx, h.template view<2>(), std::span<const SequenceRows<B>>(&rows, 1), [&](std::int64_t layer, Matrix<const Scalar> state) {
    if (std::find(wanted.begin(), wanted.end(), layer) == wanted.end()) return;
    Matrix<const Scalar> shown = state;
    const Arena::Scope scope(ctx.arena);
    if (layer == config.num_layers) {
      const Matrix<Scalar> normed = ctx.arena.template matrix<Scalar>(state.extent(0), state.extent(1));
      state_->decoder.norm.forward(ctx, state, normed);
      shown = normed;
    }
    all[static_cast<std::size_t>(layer)] = ops::download(ctx, shown);
  });
  std::vector<Tensor<HostScalar>> out;
  for (std::size_t i = 0; i < wanted.size(); ++i) {  // moved, unless the same is asked for again
    Tensor<HostScalar>& state = all[static_cast<std::size_t>(wanted[i])];
    const bool again = std::find(wanted.begin() + static_cast<std::ptrdiff_t>(i) + 1, wanted.end(), wanted[i]) != wanted.end();
    out.push_back(again ? state.clone() : std::move(state));
  }
  state_->files.require_intact();
  return out;
} catch (const std::bad_alloc&) {
  detail::throw_out_of_memory("the hidden states of a prompt");
}

template <class B, Precision P, class D, class... C>
Generation Model<B, P, D, C...>::generate(const PromptType& prompt, const GenerateOptions& options) const try {
  return Session(*this, options.max_new_tokens).generate(prompt, options);
} catch (const std::bad_alloc&) {
  detail::throw_out_of_memory("an answer");
}

template <class B, Precision P, class D, class... C>
std::vector<Generation> Model<B, P, D, C...>::generate(std::span<const PromptType> prompts, const GenerateOptions& options,
                                                       FunctionRef<void(std::size_t, std::string_view)> on_text) const try {
  [[maybe_unused]] const auto turn = exclusive(state_->backend);
  require<OptionError>(!options.on_text, "m2lm: options.on_text for several prompts cannot say whose text it gets; give generate an on_text(index, text)");
  if (prompts.empty()) return {};
  std::vector<Session> sessions;
  sessions.reserve(prompts.size());
  typename Session::Turns turns;
  for (const PromptType& prompt : prompts) {
    sessions.push_back(Session(*this, options.max_new_tokens));
    turns.push_back(std::make_unique<typename Session::Turn>(sessions.back(), prompt));
    Session::prepare(*turns.back(), false);
  }
  return Session::answer(turns, options, on_text);
} catch (const std::bad_alloc&) {
  detail::throw_out_of_memory("answers");
}

template <class B, Precision P, class D, class... C>
std::vector<Score> Model<B, P, D, C...>::score(const PromptType& prompt, std::span<const std::vector<std::int32_t>> continuations) const try {
  return score(prompt, std::nullopt, continuations);
} catch (const std::bad_alloc&) {
  detail::throw_out_of_memory("scoring");
}

template <class B, Precision P, class D, class... C>
std::vector<Score> Model<B, P, D, C...>::score(const PromptType& prompt, std::span<const std::string> continuations) const try {
  require<InputError>(prompt.form != PromptForm::ids, "m2lm: a prompt of token ids is continued by token ids, not by text");
  const std::vector<std::int32_t> alone = prompt_ids(prompt);
  std::vector<Score> out(continuations.size());
  std::vector<std::vector<std::int32_t>> rest;  // of the continuations that leave the prompt's tokens as they are
  std::vector<std::size_t> whose;
  for (std::size_t i = 0; i < continuations.size(); ++i) {
    const std::vector<std::int32_t> together = prompt_ids(prompt, true, continuations[i]);
    const auto parting = std::mismatch(alone.begin(), alone.end(), together.begin(), together.end());
    std::vector<std::int32_t> own(parting.second, together.end());
    if (parting.first == alone.end()) {
      rest.push_back(std::move(own));
      whose.push_back(i);
    } else {  // a token crosses the border
      out[i] = score(prompt, std::vector<std::int32_t>(alone.begin(), parting.first), std::span<const std::vector<std::int32_t>>(&own, 1)).front();
    }
  }
  if (rest.empty()) return out;
  const std::vector<Score> scores = score(prompt, alone, rest);
  for (std::size_t i = 0; i < whose.size(); ++i) out[whose[i]] = scores[i];
  return out;
} catch (const std::bad_alloc&) {
  detail::throw_out_of_memory("scoring");
}

/// `ids`: of the prompt, if they are not what its text becomes.
template <class B, Precision P, class D, class... C>
std::vector<Score> Model<B, P, D, C...>::score(const PromptType& prompt, std::optional<std::vector<std::int32_t>> ids,
                                               std::span<const std::vector<std::int32_t>> continuations) const {
  std::int64_t longest = 0;
  for (const std::vector<std::int32_t>& tokens : continuations) longest = std::max(longest, static_cast<std::int64_t>(tokens.size()));
  [[maybe_unused]] const auto turn = exclusive(state_->backend);
  Session scratch(*this, longest);
  typename Session::Turns turns;
  turns.push_back(std::make_unique<typename Session::Turn>(scratch, prompt));
  turns[0]->ids = std::move(ids);
  Session::prepare(*turns[0], false);
  return Session::score(turns, continuations);
}

template <class B, Precision P, class D, class... C>
MediaCacheStats Model<B, P, D, C...>::media_cache_stats() const {
  return state_->media.stats();
}

template <class B, Precision P, class D, class... C>
auto Model<B, P, D, C...>::session(const SessionOptions& options) const -> Session try {
  return Session(*this, options);
} catch (const std::bad_alloc&) {
  detail::throw_out_of_memory("a session");
}

template <class B, Precision P, class D, class... C>
const LlamaConfig& Model<B, P, D, C...>::decoder_config() const {
  return state_->decoder.config();
}

template <class B, Precision P, class D, class... C>
const ConfigValue& Model<B, P, D, C...>::config() const {
  return state_->files.config;
}

template <class B, Precision P, class D, class... C>
const Tokenizer& Model<B, P, D, C...>::tokenizer() const {
  require<InputError>(state_->files.tokenizer.has_value(), state_->files.tokenizer_error);
  return *state_->files.tokenizer;
}

template <class B, Precision P, class D, class... C>
const ChatTemplate& Model<B, P, D, C...>::chat_template() const {
  return *state_->files.chat_template;
}

template <class B, Precision P, class D, class... C>
const LoadReport& Model<B, P, D, C...>::load_report() const {
  return state_->report;
}

template <class B, Precision P, class D, class... C>
B& Model<B, P, D, C...>::backend() const {
  return state_->backend;
}

}  // namespace m2lm
