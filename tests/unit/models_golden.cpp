// LlamaDecoder, ClipVit and the projector inside Model, against transformers: small random checkpoints, every backend and level.
#include "models_support.hpp"

#include <cstdio>

namespace {

using namespace m2lm_test;
using m2lm::Reference;
using m2lm::testing::network_tolerance;

namespace t = m2lm::testing;

constexpr const char* llama_names[] = {"mha_plain",           "gqa_linear_tied_sharded", "mqa_llama3_hd10", "gqa_llama3_tied_f16",
                                       "mha_wide_heads_bf16", "mqa_linear_tied_hd6",     "mistral_window",  "mistral_nowindow"};
constexpr const char* llava_names[] = {"old_keys_m2_default", "new_keys_m1_full", "saved_keys_mistral_p1_default"};

// The judge computes in f32, so the tolerance of an exact Reference<double> is f32's too.
template <class M>
double f32_tolerance(const M& model) {
  const auto& c = model.decoder_config();
  const double tolerance = network_tolerance(t::epsilon_f32, t::epsilon_f32, std::max(c.hidden_size, c.intermediate_size), c.num_layers);
  CHECK(tolerance < 1e-4);
  return tolerance;
}
template <class M>
double bf16_tolerance(const M& model) {
  const auto& c = model.decoder_config();
  return network_tolerance(t::epsilon_bf16 / 2, t::epsilon_f32, std::max(c.hidden_size, c.intermediate_size), c.num_layers);
}

double worst = 0;

template <class S>
void check_close(const Tensor<S>& a, const AnyTensor& golden, double tolerance, const std::string& what) {
  const double error = t::relative_error(a, golden);
  worst = std::max(worst, error);
  CHECK_MESSAGE(error <= tolerance, what, ": ", error, " > ", tolerance);
}

/// Every recorded tensor of the decoder, and the greedy answer. `exact`: greedy ids must be equal.
template <class M>
void check_decoder(const M& model, const typename M::PromptType& prompt, const Safetensors& golden, double tolerance, bool exact, const std::string& what) {
  CHECK(model.input_ids(prompt) == ids_of(golden.tensor("input_ids")));
  const auto states = model.hidden_states(prompt);
  CHECK(states.size() == static_cast<std::size_t>(model.decoder_config().num_layers + 1));
  for (std::size_t i = 0; i < states.size(); ++i) {
    const std::string name = "hidden_states." + std::to_string(i);
    check_close(states[i], golden.tensor(name), tolerance, what + " " + name);
  }
  CHECK(!golden.contains("hidden_states." + std::to_string(states.size())));
  check_close(model.logits(prompt), golden.tensor("logits"), tolerance, what + " logits");
  if (!exact) return;
  const std::vector<std::int32_t> greedy = ids_of(golden.tensor("greedy"));
  const m2lm::Generation answer = model.generate(prompt, {.max_new_tokens = static_cast<std::int64_t>(greedy.size()), .ignore_eos = true});
  CHECK_MESSAGE(answer.tokens == greedy, what);
  CHECK(answer.finish_reason == m2lm::FinishReason::length);
}

template <class B>
void check_llama(const std::string& name, B backend, const std::string& what) {
  const std::string directory = golden("llama/" + name);
  const Safetensors record = Safetensors::open(directory + "/golden.safetensors");
  const auto model = TextModel<B>::from_pretrained(directory, backend);
  CHECK(model.load_report().string().empty());
  check_decoder(model, model.prompt(ids_of(record.tensor("input_ids"))), record, f32_tolerance(model), true, what + " " + name);
}

}  // namespace

TEST_CASE("decoders: hidden states, logits and greedy tokens equal transformers' at every level, f32") {
  worst = 0;
  for (const IsaLevel level : isa_levels())
    for (const char* name : llama_names) check_llama(name, cpu_at(level), std::string(m2lm::isa_name(level)));
  std::printf("decoders, cpu f32: worst max|a-b|/max|b| = %.2g\n", worst);
}

TEST_CASE("decoders: the reference backends too") {
  worst = 0;
  for (const char* name : llama_names) check_llama(name, Reference<double>{}, "double");
  std::printf("decoders, Reference<double>: worst = %.2g\n", worst);
  for (const char* name : llama_names) check_llama(name, Reference<float>{}, "float");
}

TEST_CASE("decoders: bf16 weights and cache stay within the rounding of bf16") {
  worst = 0;
  for (const IsaLevel level : isa_levels())
    for (const bool dot : both_dots)
      for (const char* name : llama_names) {
        const std::string directory = golden(std::string("llama/") + name);
        const Safetensors record = Safetensors::open(directory + "/golden.safetensors");
        const Lm model = Lm::from_pretrained(directory, cpu_at(level, 1, dot), {.precision = Precision{.weights = DType::bf16}});
        check_decoder(model, model.prompt(ids_of(record.tensor("input_ids"))), record, bf16_tolerance(model), false,
                      std::string(m2lm::isa_name(level)) + (dot ? " bf16_dot " : " bf16 ") + name);
      }
  std::printf("decoders, cpu bf16: worst = %.2g\n", worst);
}

TEST_CASE("our bf16 is no further from the truth than PyTorch's is, by more than its own rounding") {
  const Safetensors record = Safetensors::open(golden("llama/mha_plain/golden.safetensors"));
  const Lm model = Lm::from_pretrained(golden("llama/mha_plain"), Cpu(), {.precision = Precision{.weights = DType::bf16}});
  const double theirs = t::relative_error(record.tensor("logits_bf16").to<float>(), record.tensor("logits"));
  const double ours = t::relative_error(model.logits(model.prompt(ids_of(record.tensor("input_ids")))), record.tensor("logits"));
  std::printf("bf16 logits: ours %.2g, PyTorch's %.2g\n", ours, theirs);
  CHECK(ours <= 2 * theirs);
}

TEST_CASE("decoders: negative layer numbers, a choice of layers, and one that is not there") {
  const Safetensors record = Safetensors::open(golden("llama/mha_plain/golden.safetensors"));
  const Lm model = Lm::from_pretrained(golden("llama/mha_plain"));
  const auto prompt = model.prompt(ids_of(record.tensor("input_ids")));
  const int wanted[] = {-1, 0, 3, 0};
  const auto states = model.hidden_states(prompt, wanted);
  REQUIRE(states.size() == 4);
  CHECK(same_bits(states[0], states[2]));
  CHECK(same_bits(states[1], states[3]));
  M2LM_CHECK_CLOSE(states[0], record.tensor("hidden_states.3"), f32_tolerance(model), "-1");
  for (const int bad : {4, -5}) {
    const std::string message = message_of<m2lm::OptionError>([&] { model.hidden_states(prompt, std::span<const int>(&bad, 1)); });
    CHECK_MESSAGE(has(message, std::to_string(bad)), message);
    CHECK_MESSAGE(has(message, "3 layers"), message);
  }
}

// ---- LLaVA: pixel_values through the parts, and features through the decoder -------------------------------------------------

namespace {

/// Loads the parts one by one, as a user who wants only the encoder would, and compares what they say about pixel_values.
template <class B>
void check_vision_parts(const std::string& directory, const Safetensors& record, B backend, double tolerance, const std::string& what) {
  using S = m2lm::ScalarOf<B>;
  const m2lm::ConfigValue root = m2lm::ConfigValue::parse_file(directory + "/config.json");
  m2lm::ClipVisionConfig config;
  read_config(root, config);
  m2lm::LlamaConfig text;
  read_config(root, text);
  const m2lm::Checkpoint checkpoint = m2lm::Checkpoint::open(directory);
  typename m2lm::ClipVit<>::On<B, in_f32> encoder(config);
  require_complete(load_parameters(encoder, checkpoint, "vision_tower"), directory);
  m2lm::ProjectorConfig projector_config{.input_width = encoder.width(), .output_width = text.hidden_size};
  read_config(root, projector_config);
  typename m2lm::MlpProjector<2>::On<B, in_f32> projector(projector_config);
  require_complete(load_parameters(projector, checkpoint, "multi_modal_projector"), directory);

  m2lm::Arena arena;
  m2lm::Context<B> ctx{backend, arena};
  encoder.prepare(ctx, DType::f32);
  projector.prepare(ctx, DType::f32);
  const AnyTensor pixels = record.tensor("pixel_values"), chosen = record.tensor("vision_hidden"), features = record.tensor("features");
  for (std::int64_t i = 0; i < pixels.shape()[0]; ++i) {
    Tensor<S> seen;
    Tensor<S> x(Shape{encoder.tokens(), encoder.width()}), y(Shape{encoder.tokens(), text.hidden_size});
    encoder.forward(ctx, slice(pixels, i), x.template view<2>(), [&](std::int64_t, m2lm::Matrix<const S> h) {
      seen = Tensor<S>(Shape{h.extent(0), h.extent(1)});
      std::copy_n(h.data(), h.elements(), seen.data());
    });
    // The last state that was computed is the chosen one: nothing behind it runs.
    check_close(seen, AnyTensor(slice<S>(chosen, i)), tolerance, what + " vision_hidden");
    const std::int64_t dropped = config.features == m2lm::VitFeatures::all_tokens ? 0 : 1;
    CHECK(encoder.tokens() == chosen.shape()[1] - dropped);
    CHECK(std::equal(x.data(), x.data() + x.elements(), seen.data() + dropped * encoder.width()));
    projector.forward(ctx, x.template view<2>(), y.template view<2>());
    check_close(y, AnyTensor(slice<S>(features, i)), tolerance, what + " features");
  }
}

template <class B>
void check_llava(const std::string& name, B backend, const std::string& what) {
  const std::string directory = golden("llava/" + name);
  const auto model = ImageModel<B>::from_pretrained(directory, backend);
  CHECK_MESSAGE(model.load_report().string().empty(), model.load_report().string());
  const double tolerance = f32_tolerance(model);
  for (const char* images : {"1", "2", "3"}) {
    const Safetensors record = Safetensors::open(directory + "/golden_" + images + "img.safetensors");
    const std::string label = what + " " + name + " " + images + " images";
    check_vision_parts(directory, record, backend, tolerance, label);
    check_decoder(model, with_features(model, record, "features"), record, tolerance, true, label);
  }
}

}  // namespace

TEST_CASE("LLaVA: one to three images, both key layouts and config dialects, at every level") {
  worst = 0;
  for (const IsaLevel level : isa_levels())
    for (const char* name : llava_names) check_llava(name, cpu_at(level), std::string(m2lm::isa_name(level)));
  std::printf("llava, cpu f32: worst = %.2g\n", worst);
}

TEST_CASE("LLaVA: the reference backends too") {
  for (const char* name : llava_names) {
    check_llava(name, Reference<double>{}, "double");
    check_llava(name, Reference<float>{}, "float");
  }
}

TEST_CASE("ids with one placeholder per picture mean the same as ids with one per row") {
  const Vlm model = Vlm::from_pretrained(golden("llava/old_keys_m2_default"));
  const Safetensors record = Safetensors::open(golden("llava/old_keys_m2_default/golden_3img.safetensors"));
  auto prompt = with_features(model, record, "features");
  const Tensor<float> expanded = model.logits(prompt);
  const std::int64_t rows = record.tensor("features").shape()[1];
  std::vector<std::int32_t> short_ids;
  for (std::size_t i = 0; i < prompt.ids.size(); i += prompt.ids[i] == 90 ? static_cast<std::size_t>(rows) : 1) short_ids.push_back(prompt.ids[i]);
  CHECK(std::count(short_ids.begin(), short_ids.end(), 90) == 3);
  prompt.ids = short_ids;
  CHECK(same_bits(model.logits(prompt), expanded));
}

// ---- from text and a picture to text -----------------------------------------------------------------------------------------

namespace {

std::vector<std::int32_t> ids_of_json(const m2lm::ConfigValue& json, std::string_view key) { return json.get_list<std::int32_t>(key); }

}  // namespace

TEST_CASE("LLaVA with a tokenizer: text and a picture file to ids, pixels, features, logits and text") {
  const std::string directory = golden("llava/with_tokenizer");
  const m2lm::ConfigValue json = m2lm::ConfigValue::parse_file(directory + "/golden.json");
  const Safetensors record = Safetensors::open(directory + "/golden.safetensors");
  const m2lm::Image picture = m2lm::load_image(directory + "/picture.png");
  for (const IsaLevel level : isa_levels()) {
    const Vlm model = Vlm::from_pretrained(directory, cpu_at(level));
    const double tolerance = f32_tolerance(model);
    const std::string what(m2lm::isa_name(level));
    CHECK(model.load_report().string().empty());
    CHECK(model.tokenizer().encode(json.get<std::string>("rendered")) == ids_of_json(json, "ids_before_expansion"));

    const auto image_config = m2lm::read_image_processor_config(directory, 28);
    M2LM_CHECK_CLOSE(m2lm::preprocess(picture, image_config), record.tensor("pixel_values"), 1e-6, "pixel_values");
    M2LM_CHECK_CLOSE(model.encode<"image">(picture), record.tensor("features"), tolerance, what + " features");

    auto prompt = model.prompt("<image>\n" + json.get<std::string>("question"));
    prompt.attach<"image">(picture);
    CHECK(model.input_ids(prompt) == ids_of_json(json, "input_ids"));
    check_decoder(model, prompt, record, tolerance, false, what + " with_tokenizer");
    std::string streamed;
    const std::vector<std::int32_t> greedy = ids_of_json(json, "greedy_ids");
    const m2lm::Generation answer = model.generate(
        prompt, {.max_new_tokens = static_cast<std::int64_t>(greedy.size()), .ignore_eos = true, .on_text = [&](std::string_view piece) { streamed += piece; }});
    CHECK(answer.tokens == greedy);
    CHECK(answer.text == json.get<std::string>("greedy_text"));
    CHECK(streamed == answer.text);

    // The same as raw text, with the template applied by hand.
    auto raw = model.raw_prompt(json.get<std::string>("rendered"));
    raw.attach<"image">(picture);
    CHECK(same_bits(model.logits(raw), model.logits(prompt)));
  }
}

TEST_CASE("a With component keeps its own precision beside a bf16 decoder") {
  using Modality = m2lm::Modality<"image", m2lm::ClipVit<>, m2lm::MlpProjector<2>>;
  using Mixed = m2lm::Model<Cpu, Precision{.weights = DType::bf16}, m2lm::LlamaDecoder<>, m2lm::With<Modality, in_f32>>;
  const std::string directory = golden("llava/with_tokenizer");
  const m2lm::Image picture = m2lm::load_image(directory + "/picture.png");
  const Tensor<float> mixed = Mixed::from_pretrained(directory).encode<"image">(picture);
  const Tensor<float> exact = Vlm::from_pretrained(directory).encode<"image">(picture);
  const Tensor<float> rounded = Vlm::from_pretrained(directory, Cpu(), {.precision = Precision{.weights = DType::bf16}}).encode<"image">(picture);
  CHECK(same_bits(mixed, exact));
  CHECK(!same_bits(rounded, exact));
}
