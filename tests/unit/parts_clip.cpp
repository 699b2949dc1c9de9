// ClipVit and the projectors as parts of their own: every hidden state, every choice of features, and what is not loaded.
#include "models_support.hpp"

#include <cstdio>

namespace {

using namespace m2lm_test;
using m2lm::Checkpoint;
using m2lm::ClipVisionConfig;
using m2lm::ClipVit;
using m2lm::Context;
using m2lm::Matrix;
using m2lm::Reference;
using m2lm::VitFeatures;
using m2lm::VitPolicy;

namespace t = m2lm::testing;

ClipVisionConfig config_of(const std::string& directory) {
  ClipVisionConfig config;
  read_config(m2lm::ConfigValue::parse_file(directory + "/config.json"), config);
  return config;
}

double tolerance_of(const ClipVisionConfig& c, double storage = t::epsilon_f32) {
  return t::network_tolerance(storage, t::epsilon_f32, std::max({c.hidden_size, c.intermediate_size, c.num_channels * c.patch_size * c.patch_size}), c.num_layers);
}

template <class B, VitPolicy policy>
struct Run {
  Tensor<m2lm::ScalarOf<B>> features;
  std::vector<Tensor<m2lm::ScalarOf<B>>> states;
  std::size_t layers = 0;
};

/// An encoder with `policy`, loaded alone, on picture i of the record.
template <VitPolicy policy, class B>
Run<B, policy> run(const std::string& directory, const ClipVisionConfig& config, const AnyTensor& pixels, std::int64_t i, B backend, DType format = DType::f32) {
  using S = m2lm::ScalarOf<B>;
  typename ClipVit<policy>::template On<B, in_f32> encoder(config);
  require_complete(load_parameters(encoder, Checkpoint::open(directory), "vision_tower"), directory);
  m2lm::Arena arena;
  Context<B> ctx{backend, arena};
  encoder.prepare(ctx, format);
  Run<B, policy> out;
  out.features = Tensor<S>(Shape{encoder.tokens(), encoder.width()});
  encoder.forward(ctx, slice(pixels, i), out.features.template view<2>(), [&](std::int64_t layer, Matrix<const S> h) {
    CHECK(layer == static_cast<std::int64_t>(out.states.size()));
    Tensor<S> copy(Shape{h.extent(0), h.extent(1)});
    std::copy_n(h.data(), h.elements(), copy.data());
    out.states.push_back(std::move(copy));
  });
  out.layers = encoder.layers.size();
  return out;
}

template <class S>
Tensor<S> rows_of(const Tensor<S>& x, std::int64_t begin, std::int64_t end) {
  Tensor<S> out(Shape{end - begin, x.shape()[1]});
  std::copy_n(x.data() + begin * x.shape()[1], out.elements(), out.data());
  return out;
}

/// [1, n] of row i of a matrix, [rows, n] of matrix i of a batch.
AnyTensor row_or_matrix(const AnyTensor& tensor, std::int64_t i) { return AnyTensor(slice<double>(tensor, i)); }

double worst = 0;

template <class S>
void close(const Tensor<S>& a, const AnyTensor& b, double tolerance, const std::string& what) {
  const double error = t::relative_error(a, b);
  worst = std::max(worst, error);
  CHECK_MESSAGE(error <= tolerance, what, ": ", error, " > ", tolerance);
}

template <class B>
void check(const std::string& name, bool projection, B backend, DType format, const std::string& what) {
  const std::string directory = golden("clip/" + name);
  const Safetensors record = Safetensors::open(directory + "/golden.safetensors");
  const ClipVisionConfig config = config_of(directory);
  const double tolerance = tolerance_of(config, format == DType::bf16 ? t::epsilon_bf16 / 2 : t::epsilon_f32);
  if (format == DType::f32) CHECK(tolerance < 1e-4);
  const AnyTensor pixels = record.tensor("pixel_values");
  for (std::int64_t i = 0; i < pixels.shape()[0]; ++i) {
    const auto last = run<VitPolicy{.feature_layer = -1, .features = VitFeatures::all_tokens}>(directory, config, pixels, i, backend, format);
    REQUIRE(last.states.size() == static_cast<std::size_t>(config.num_layers + 1));
    for (std::size_t layer = 0; layer < last.states.size(); ++layer) {
      const std::string state = "hidden_states." + std::to_string(layer);
      close(last.states[layer], row_or_matrix(record.tensor(state), i), tolerance, what + " " + name + " " + state);
    }
    CHECK(!record.contains("hidden_states." + std::to_string(last.states.size())));
    close(last.features, row_or_matrix(record.tensor("last_hidden_state"), i), tolerance, what + " " + name + " last_hidden_state");

    const auto patches = run<VitPolicy{.feature_layer = -1, .features = VitFeatures::patches}>(directory, config, pixels, i, backend, format);
    CHECK(same_bits(patches.features, rows_of(last.features, 1, last.features.shape()[0])));
    const auto pooled = run<VitPolicy{.features = VitFeatures::pooled}>(directory, config, pixels, i, backend, format);
    CHECK(pooled.features.shape() == Shape{1, config.hidden_size});
    close(pooled.features, row_or_matrix(record.tensor("pooler_output"), i), tolerance, what + " " + name + " pooler_output");
    if (!projection) continue;
    const auto projected = run<VitPolicy{.features = VitFeatures::projected}>(directory, config, pixels, i, backend, format);
    close(projected.features, row_or_matrix(record.tensor("image_embeds"), i), tolerance, what + " " + name + " image_embeds");
    const auto tokens = run<VitPolicy{.features = VitFeatures::projected_tokens}>(directory, config, pixels, i, backend, format);
    const Tensor<double> all = slice<double>(record.tensor("projected"), i);
    close(tokens.features, AnyTensor(rows_of(all, 1, all.shape()[0])), tolerance, what + " " + name + " projected tokens");
  }
}

template <class B>
void check_all(B backend, DType format, const std::string& what) {
  check("patch14_proj", true, backend, format, what);
  check("patch16_hd6_remainder", false, backend, format, what);
  check("patch32_full_clip_hd5", true, backend, format, what);
}

}  // namespace

TEST_CASE("CLIP: every hidden state and every kind of features equal transformers'") {
  worst = 0;
  for (const IsaLevel level : isa_levels()) check_all(cpu_at(level), DType::f32, std::string(m2lm::isa_name(level)));
  check_all(Reference<double>{}, DType::f32, "double");
  check_all(Reference<float>{}, DType::f32, "float");
  std::printf("CLIP, f32: worst max|a-b|/max|b| = %.2g\n", worst);
  worst = 0;
  for (const IsaLevel level : isa_levels()) check_all(cpu_at(level), DType::bf16, std::string(m2lm::isa_name(level)) + " bf16");
  std::printf("CLIP, bf16: worst = %.2g\n", worst);
}

TEST_CASE("CLIP: threads and rounding of the pool change no bit") {
  const std::string directory = golden("clip/patch14_proj");
  const AnyTensor pixels = Safetensors::open(directory + "/golden.safetensors").tensor("pixel_values");
  constexpr VitPolicy policy{.feature_layer = -1, .features = VitFeatures::all_tokens};
  const auto one = run<policy>(directory, config_of(directory), pixels, 0, Cpu({.threads = 1}));
  for (const int threads : {2, 3}) CHECK(same_bits(run<policy>(directory, config_of(directory), pixels, 0, Cpu({.threads = threads})).features, one.features));
}

TEST_CASE("CLIP: feature layers count as transformers counts hidden_states") {
  const std::string directory = golden("clip/patch16_hd6_remainder");
  const Safetensors record = Safetensors::open(directory + "/golden.safetensors");
  ClipVisionConfig config = config_of(directory);
  const AnyTensor pixels = record.tensor("pixel_values");
  for (int layer = static_cast<int>(-config.num_layers - 1); layer <= config.num_layers; ++layer) {
    config.feature_layer = layer;
    config.features = VitFeatures::all_tokens;
    const auto chosen = run<VitPolicy{}>(directory, config, pixels, 0, Cpu());
    const std::int64_t state = layer < 0 ? config.num_layers + 1 + layer : layer;
    CAPTURE(layer);
    CHECK(chosen.layers == static_cast<std::size_t>(state));
    CHECK(chosen.states.size() == static_cast<std::size_t>(state + 1));
    M2LM_CHECK_CLOSE(chosen.features, AnyTensor(slice<float>(record.tensor("hidden_states." + std::to_string(state)), 0)), tolerance_of(config), "features");
  }
  for (const int bad : {static_cast<int>(config.num_layers) + 1, static_cast<int>(-config.num_layers) - 2}) {
    config.feature_layer = bad;
    const std::string message = message_of<m2lm::OptionError>([&] { ClipVit<>::On<Cpu, in_f32> encoder(config); });
    CHECK_MESSAGE(has(message, std::to_string(bad)), message);
    CHECK_MESSAGE(has(message, std::to_string(config.num_layers) + " layers"), message);
  }
}

TEST_CASE("CLIP: layers behind the chosen one need not be in the file") {
  const TemporaryDirectory directory;
  copy_directory(golden("llava/old_keys_m2_default"), directory);
  const Vlm whole = Vlm::from_pretrained(directory.path());
  m2lm::Image picture{.width = 28, .height = 28, .pixels = std::vector<std::uint8_t>(28 * 28 * 3)};
  for (std::size_t i = 0; i < picture.pixels.size(); ++i) picture.pixels[i] = static_cast<std::uint8_t>(i * 37);
  const Tensor<float> features = whole.encode<"image">(picture);
  const std::int64_t layers = whole.config()["vision_config"].get<std::int64_t>("num_hidden_layers");
  std::size_t removed = 0;
  change_tensors(directory, [&](std::vector<m2lm::NamedTensor>& tensors) {
    removed = std::erase_if(tensors, [&](const m2lm::NamedTensor& x) {
      return has(x.name, "vision_model.encoder.layers." + std::to_string(layers - 1) + ".") || has(x.name, "post_layernorm");
    });
  });
  CHECK(removed > 10);
  const Vlm reduced = Vlm::from_pretrained(directory.path());
  CHECK(reduced.load_report().string().empty());
  CHECK(same_bits(reduced.encode<"image">(picture), features));
  // The layer before it is needed.
  change_tensors(directory, [&](std::vector<m2lm::NamedTensor>& tensors) {
    std::erase_if(tensors, [&](const m2lm::NamedTensor& x) { return has(x.name, "vision_model.encoder.layers." + std::to_string(layers - 2) + "."); });
  });
  const std::string message = message_of<m2lm::CheckpointError>([&] { Vlm::from_pretrained(directory.path()); });
  CHECK_MESSAGE(has(message, "16 tensors missing"), message);
  CHECK_MESSAGE(has(message, "vision_model.encoder.layers." + std::to_string(layers - 2) + ".self_attn.q_proj.weight is missing"), message);
}

TEST_CASE("CLIP: pixels of another shape") {
  const std::string directory = golden("clip/patch14_proj");
  ClipVit<>::On<Cpu, in_f32> encoder(config_of(directory));
  require_complete(load_parameters(encoder, Checkpoint::open(directory), "vision_tower"), directory);
  Cpu backend;
  m2lm::Arena arena;
  Context<Cpu> ctx{backend, arena};
  encoder.prepare(ctx, DType::f32);
  Tensor<float> features(Shape{encoder.tokens(), encoder.width()});
  for (const Shape& shape : {Shape{3, 42, 41}, Shape{1, 42, 42}, Shape{3, 28, 28}}) {
    const std::string message = message_of<m2lm::InputError>([&] { encoder.forward(ctx, Tensor<float>(shape), features.view<2>()); });
    CHECK_MESSAGE(has(message, shape.string()), message);
    CHECK_MESSAGE(has(message, "[3, 42, 42]"), message);
  }
  Tensor<float> wrong(Shape{encoder.tokens() + 1, encoder.width()});
  CHECK(has(message_of<m2lm::ShapeError>([&] { encoder.forward(ctx, Tensor<float>(Shape{3, 42, 42}), wrong.view<2>()); }), wrong.shape().string()));
}

// ---- projectors ----------------------------------------------------------------------------------------------------------------

TEST_CASE("projectors: one to three layers by the plain formula, and identity") {
  const m2lm::ProjectorConfig config{.input_width = 5, .output_width = 7};
  m2lm::Rng rng(3);
  const auto random = [&](Shape shape) {
    Tensor<double> x(shape);
    for (double& v : x.span()) v = 2 * rng.uniform() - 1;
    return x;
  };
  const Tensor<double> x = random({3, 5});
  Reference<double> backend;
  m2lm::Arena arena;
  Context<Reference<double>> ctx{backend, arena};
  const auto check_depth = [&]<int depth>() {
    typename m2lm::MlpProjector<depth>::template On<Reference<double>, in_f32> projector(config);
    std::vector<std::string> names;
    for_each_parameter(
        [&](std::string_view name, m2lm::Parameter& p) {
          names.emplace_back(name);
          p.value = AnyTensor(random(p.shape));
        },
        projector);
    REQUIRE(names.size() == 2 * depth);
    CHECK(names.back() == "linear_" + std::to_string(depth) + ".bias");
    projector.prepare(ctx, DType::f32);
    Tensor<double> y(Shape{3, 7});
    projector.forward(ctx, x.view<2>(), y.view<2>());
    std::vector<double> h(x.data(), x.data() + x.elements());
    for (std::size_t l = 0; l < depth; ++l) {
      const Tensor<double> w = projector.layers[l].weight.value.template to<double>(), b = projector.layers[l].bias.value.template to<double>();
      const auto inputs = static_cast<std::size_t>(w.shape()[1]);
      std::vector<double> out;
      for (std::size_t i = 0; i < 3; ++i)
        for (std::size_t j = 0; j < 7; ++j) {
          double sum = b.data()[j];
          for (std::size_t k = 0; k < inputs; ++k) sum += h[i * inputs + k] * w.data()[j * inputs + k];
          out.push_back(l + 1 == depth ? sum : 0.5 * sum * std::erfc(-sum / std::sqrt(2.0)));
        }
      h = out;
    }
    for (std::size_t i = 0; i < h.size(); ++i) CHECK(y.data()[i] == doctest::Approx(h[i]).epsilon(1e-12));
  };
  check_depth.operator()<1>();
  check_depth.operator()<2>();
  check_depth.operator()<3>();

  m2lm::IdentityProjector::On<Reference<double>, in_f32> identity(m2lm::ProjectorConfig{.input_width = 5, .output_width = 5});
  Tensor<double> y(Shape{3, 5});
  identity.forward(ctx, x.view<2>(), y.view<2>());
  CHECK(same_bits(x, y));
  CHECK(has(message_of<m2lm::ShapeError>([&] { m2lm::IdentityProjector::On<Reference<double>, in_f32> unequal(config); }), "5 values per token"));
}
