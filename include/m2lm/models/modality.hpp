// Modality: an encoder and a projector under a name, and how their output enters the sequence.
// Floor: models. May include: core, ops, layers, parts, io, sampling.
#pragma once

#include <m2lm/core/config_of.hpp>
#include <m2lm/core/fields.hpp>
#include <m2lm/io/image.hpp>
#include <m2lm/io/image_processor.hpp>
#include <m2lm/layers/cross_features.hpp>
#include <m2lm/models/hf_config.hpp>
#include <m2lm/models/insertion.hpp>
#include <m2lm/ops/op.hpp>

#include <concepts>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

namespace m2lm::inline M2LM_ABI {

/// What happens to an input before its encoder sees it. The primary hands it on as it is; a user specialises it for a type.
template <class Input>
struct Preprocessor {
  /// From the files beside a checkpoint and the encoder's config; the primary reads none.
  template <class EncoderConfig>
  static Preprocessor from_directory(std::string_view, const EncoderConfig&) {
    return {};
  }
  /// What the encoder's tokens(x) and forward(ctx, x, …) take.
  const Input& operator()(const Input& input) const { return input; }
};

/// Pictures: config.json's image_processor_config, else the checkpoint's preprocessor_config.json, CLIP's values without both.
template <>
struct Preprocessor<Image> {
  ImageProcessorConfig config{};
  /// throws CheckpointError for a preprocessor file that is damaged or asks for what the library has not.
  template <class EncoderConfig>
  static Preprocessor from_directory(std::string_view directory, [[maybe_unused]] const EncoderConfig& encoder, const ConfigValue& root = {}) {
    int image_size = 224;
    if constexpr (requires { encoder.image_size; }) image_size = static_cast<int>(encoder.image_size);
    if (root.has_value("image_processor_config")) return {read_image_processor_config(root["image_processor_config"], image_size)};
    return {read_image_processor_config(directory, image_size)};
  }
  /// preprocess(image, config): [channels, height, width].
  Tensor<float> operator()(const Image& image) const { return preprocess(image, config); }
};

namespace detail {

/// Canonical prefixes of a modality's parameters: LLaVA's for "image", the name otherwise.
inline std::string encoder_prefix(std::string_view name) { return name == "image" ? "vision_tower" : std::string(name) + "_encoder"; }
inline std::string projector_prefix(std::string_view name) { return name == "image" ? "multi_modal_projector" : std::string(name) + "_projector"; }

// What Modality asks of an encoder's and a projector's On. Concepts and not requires-expressions where they are used: those nvcc 13
// takes for false when they name a member type of the class around them.
template <class EncoderOn>
concept HasWidth = requires(const EncoderOn& e) { { e.width() } -> std::convertible_to<std::int64_t>; };
template <class EncoderOn, class X>
concept HasTokens = requires(const EncoderOn& e, const X& x) { { e.tokens(x) } -> std::convertible_to<std::int64_t>; };
template <class EncoderOn, class B, class X, class Y>
concept EncodesRows = requires(const EncoderOn& e, Context<B>& ctx, const X& x, Y y) { e.forward(ctx, x, y); };
template <class EncoderOn, class B, class X, class Y, class Levels>
concept EncodesPyramid = requires(const EncoderOn& e, Context<B>& ctx, const X& x, Y y, Levels& levels) { e.forward(ctx, x, y, levels); };
template <class EncoderOn, class B, class X>
concept EncodesTokens = requires(const EncoderOn& e, Context<B>& ctx, const X& x) { e.token_ids(ctx, x); };
template <class ProjectorOn>
concept HasOutputTokens = requires(const ProjectorOn& p) { { p.output_tokens(std::int64_t{}) } -> std::convertible_to<std::int64_t>; };
template <class ProjectorOn, class B, class X, class Y>
concept ProjectsRows = requires(const ProjectorOn& p, Context<B>& ctx, X x, Y y) { p.forward(ctx, x, y); };

}  // namespace detail

/// What one instance gives to the decoder.
template <class S>
struct ModalityOutput {
  Tensor<S> embeddings;                  ///< [rows, hidden] of the sequence; or
  std::vector<std::int32_t> token_ids;   ///< ids of the decoder's own vocabulary
  std::vector<FeatureLevel<S>> pyramid;  ///< what hooks of the decoder read, if the encoder gives it
};

/// Spec: there is nothing to project, as the encoder gives token ids.
struct NoProjector {
  template <class B, Precision P>
  struct On : NoParameters {
    explicit On(const ProjectorConfig&) {}
  };
};

/// Spec of a component. An encoder has `Input`, optionally `Config` (read by read_config(root, config), found by argument-dependent
/// lookup), and On<B, P> with fields, prepare(ctx, dtype) and either
///  - width(), tokens(x) and forward(ctx, x, features), where x is the preprocessed input; with a fourth argument,
///    std::vector<FeatureLevel<S>>& pyramid, it also leaves features for the decoder's hook; or
///  - token_ids(ctx, x), with the insertion DiscreteTokens and NoProjector.
/// A projector has On<B, P>(ProjectorConfig), or with a Config of its own On<B, P>(ProjectorConfig, Config), and output_tokens(n), fields, prepare and forward(ctx, features, embeddings).
template <FixedString Name, class Encoder, class Projector, class Insertion = ExpandPlaceholder>
struct Modality {
  static constexpr auto name = Name;
  using Input = typename Encoder::Input;
  /// The encoder's part of config.json.
  using EncoderConfig = ConfigOf<Encoder>;
  /// How its rows get into the sequence.
  using InsertionPolicy = Insertion;
  static_assert(detail::InsertionPolicy<Insertion>,
                "m2lm::Modality: the insertion is one of ExpandPlaceholder, PlaceholderRun, PrefixAfterBos<...> and DiscreteTokens<...>");

  template <class B, Precision P>
  struct On {
    using S = ScalarOf<B>;
    static constexpr bool discrete = Insertion::kind == InsertionKind::discrete_tokens;
    /// The encoder on this backend.
    using EncoderOn = typename Encoder::template On<B, P>;
    /// The projector on this backend.
    using ProjectorOn = typename Projector::template On<B, P>;
    /// What the preprocessor makes of an input.
    using X = std::remove_cvref_t<decltype(std::declval<const Preprocessor<Input>&>()(std::declval<const Input&>()))>;
    static constexpr bool pyramidal = detail::EncodesPyramid<EncoderOn, B, X, Matrix<S>, std::vector<FeatureLevel<S>>>;
    static_assert(discrete || detail::HasWidth<EncoderOn>,
                  "m2lm::Modality: the encoder's On has no width() const, the values per row that it gives");
    static_assert(discrete || detail::HasTokens<EncoderOn, X>,
                  "m2lm::Modality: the encoder's On has no tokens(x) const, the rows that it gives for a preprocessed input x (of pictures a Tensor<float>)");
    static_assert(discrete || detail::EncodesRows<EncoderOn, B, X, Matrix<S>> || pyramidal,
                  "m2lm::Modality: the encoder's On has no forward(ctx, x, features) const for a preprocessed input x (of pictures a Tensor<float>)");
    static_assert(!discrete || detail::EncodesTokens<EncoderOn, B, X>,
                  "m2lm::Modality: the insertion is DiscreteTokens, but the encoder's On has no token_ids(ctx, x) const");
    static_assert(discrete || detail::HasOutputTokens<ProjectorOn>,
                  "m2lm::Modality: the projector's On has no output_tokens(n) const, the rows that n rows become");
    static_assert(discrete || detail::ProjectsRows<ProjectorOn, B, Matrix<const S>, Matrix<S>>,
                  "m2lm::Modality: the projector's On has no forward(ctx, x, y) const");
    EncoderOn encoder;
    ProjectorOn projector;
    Preprocessor<Input> preprocessor;

    On(const ConfigValue& root, std::string_view directory, std::int64_t hidden_size) : On(read(root), root, directory, hidden_size) {}

    template <class V, class Self>
    static void fields(V&& visit, Self& self) {
      visit(detail::encoder_prefix(Name.view()), self.encoder);
      visit(detail::projector_prefix(Name.view()), self.projector);
    }
    /// The precision that this component is packed in when the model's is `model`.
    static constexpr Precision precision_of(const Precision& model) { return model; }
    void prepare(Context<B>& ctx, const Precision& precision) {
      encoder.prepare(ctx, precision.resolve_plain(precision.encoders, plain_format_on<B>));
      projector.prepare(ctx, precision.resolve_plain(precision.projectors, plain_format_on<B>));
    }
    /// What the decoder sees of one instance.
    ModalityOutput<S> encode(Context<B>& ctx, const Input& input, [[maybe_unused]] std::int64_t hidden_size) const {
      const auto& x = preprocessor(input);
      const Arena::Scope scope(ctx.arena);
      ModalityOutput<S> out;
      if constexpr (discrete) {
        out.token_ids = encoder.token_ids(ctx, x);
      } else {
        const std::int64_t tokens = encoder.tokens(x);
        const Matrix<S> features = ctx.arena.template matrix<S>(tokens, encoder.width());
        if constexpr (pyramidal)
          encoder.forward(ctx, x, features, out.pyramid);
        else
          encoder.forward(ctx, x, features);
        out.embeddings = make_tensor<S>(ctx.backend, Shape{projector.output_tokens(tokens), hidden_size});
        projector.forward(ctx, features, out.embeddings.template view<2>());
      }
      return out;
    }

   private:
    static EncoderConfig read(const ConfigValue& root) {
      EncoderConfig config{};
      read_config(root, config);
      return config;
    }
    static auto make_encoder(const EncoderConfig& config) {
      if constexpr (std::is_same_v<EncoderConfig, NoConfig>)
        return typename Encoder::template On<B, P>();
      else
        return typename Encoder::template On<B, P>(config);
    }
    static Preprocessor<Input> make_preprocessor(std::string_view directory, const EncoderConfig& config, const ConfigValue& root) {
      if constexpr (requires { Preprocessor<Input>::from_directory(directory, config, root); })
        return Preprocessor<Input>::from_directory(directory, config, root);
      else
        return Preprocessor<Input>::from_directory(directory, config);
    }
    static std::int64_t width_of([[maybe_unused]] const EncoderOn& e) {
      if constexpr (discrete)
        return 0;
      else
        return e.width();
    }
    static auto make_projector(const ConfigValue& root, std::int64_t input_width, std::int64_t output_width) {
      ProjectorConfig widths{.input_width = input_width, .output_width = output_width};
      read_config(root, widths);
      if constexpr (std::is_same_v<ConfigOf<Projector>, NoConfig>) {
        return ProjectorOn(widths);
      } else {
        ConfigOf<Projector> config{};
        read_config(root, config);
        return ProjectorOn(widths, config);
      }
    }
    On(const EncoderConfig& config, const ConfigValue& root, std::string_view directory, std::int64_t hidden_size)
        : encoder(make_encoder(config)),
          projector(make_projector(root, width_of(encoder), hidden_size)),
          preprocessor(make_preprocessor(directory, config, root)) {}
  };
};

/// A component with a precision of its own: `With<Modality<…>, Precision{.weights = DType::f32}>`.
template <class Component, Precision P>
struct With {
  static constexpr auto name = Component::name;
  using Input = typename Component::Input;
  /// How its rows get into the sequence.
  using InsertionPolicy = typename Component::InsertionPolicy;

  template <class B, Precision>
  struct On : Component::template On<B, P> {
    using Component::template On<B, P>::On;
    /// Its own, whatever the model's is.
    static constexpr Precision precision_of(const Precision&) { return P; }
    void prepare(Context<B>& ctx, const Precision&) { Component::template On<B, P>::prepare(ctx, P); }
  };
};

}  // namespace m2lm
