// Real weights: the stories models against PyTorch, and LLaVA as transformers wrote it. Needs the shared assets.
#include "models_support.hpp"

#include <cmath>
#include <cstdio>

namespace {

using namespace m2lm_test;

namespace t = m2lm::testing;

template <class M>
double tolerance_of(const M& model) {
  const auto& c = model.decoder_config();
  const double tolerance = t::network_tolerance(t::epsilon_f32, t::epsilon_f32, std::max(c.hidden_size, c.intermediate_size), c.num_layers);
  CHECK(tolerance < 1e-4);
  return tolerance;
}

/// The first rows of a matrix.
Tensor<float> head(const Tensor<float>& x, std::int64_t rows) {
  Tensor<float> out(Shape{rows, x.shape()[1]});
  std::copy_n(x.data(), out.elements(), out.data());
  return out;
}

std::int32_t largest(const float* row, std::int64_t count) { return static_cast<std::int32_t>(std::max_element(row, row + count) - row); }

/// Σ p·log(p/q) of the softmaxes of two rows of logits.
double divergence(const float* p, const float* q, std::int64_t count) {
  const auto log_sum = [&](const float* x) {
    const double top = *std::max_element(x, x + count);
    double sum = 0;
    for (std::int64_t i = 0; i < count; ++i) sum += std::exp(static_cast<double>(x[i]) - top);
    return top + std::log(sum);
  };
  const double lp = log_sum(p), lq = log_sum(q);
  double kl = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    const double a = static_cast<double>(p[i]) - lp, b = static_cast<double>(q[i]) - lq;
    kl += std::exp(a) * (a - b);
  }
  return kl;
}

/// Logits against PyTorch's, and the recorded text as the greedy continuation of its first `given` tokens.
void check_story(const std::string& name, const Lm& model, const std::vector<std::int32_t>& ids, const AnyTensor& golden_logits) {
  const double tolerance = tolerance_of(model);
  const Tensor<float> logits = model.logits(model.prompt(ids));
  const double error = t::relative_error(head(logits, golden_logits.shape()[0]), golden_logits);
  std::printf("%s %s: logits max|a-b|/max|b| = %.2g (bound %.2g)\n", name.c_str(), std::string(m2lm::isa_name(model.backend().isa())).c_str(), error, tolerance);
  CHECK(error <= tolerance);

  // The text is a greedy run of the model's author's own program from BOS on: so the whole of it must come out.
  const auto count = static_cast<std::int64_t>(ids.size());
  const m2lm::Generation told = model.generate(model.prompt(std::vector<std::int32_t>{ids.front()}), {.max_new_tokens = count - 1, .ignore_eos = true});
  CHECK(told.tokens == std::vector<std::int32_t>(ids.begin() + 1, ids.end()));
}

/// Teacher-forced agreement of rows of logits with the exact ones.
struct Agreement {
  std::int64_t rows = 0, equal = 0;
  double divergence_sum = 0, worst = 0;

  void add(const Tensor<float>& exact, const Tensor<float>& other) {
    const std::int64_t vocab = exact.shape()[1];
    for (std::int64_t i = 0; i < exact.shape()[0]; ++i) {
      const float *p = exact.data() + i * vocab, *q = other.data() + i * vocab;
      equal += largest(p, vocab) == largest(q, vocab) ? 1 : 0;
      const double here = divergence(p, q, vocab);
      divergence_sum += here;
      worst = std::max(worst, here);
      ++rows;
    }
  }
  /// What a format may cost on a model of this size: `least` of the best tokens are equal, and the mean KL is below `most`.
  void check(const std::string& name, double least, double most) const {
    const double mean = divergence_sum / static_cast<double>(rows);
    std::printf("%s: top-1 agreement %ld of %ld, mean KL %.2g, worst %.2g\n", name.c_str(), static_cast<long>(equal), static_cast<long>(rows), mean, worst);
    CHECK(static_cast<double>(equal) >= least * static_cast<double>(rows));
    CHECK(mean < most);
  }
};

void check_stories(const std::string& name, std::span<const IsaLevel> levels) {
  const std::string directory = asset_file("llama/" + name + "-hf");
  const std::vector<std::int32_t> ids = m2lm::ConfigValue::parse_file(asset_file("golden/" + name + "/golden.json")).get_list<std::int32_t>("ids");
  const Safetensors record = Safetensors::open(asset_file("golden/" + name + "/golden.safetensors"));
  REQUIRE(ids_of(record.tensor("ids")) == ids);
  for (const IsaLevel level : levels) {
    const Lm model = Lm::from_pretrained(directory, Cpu({.threads = 2, .max_isa = level}));
    CHECK(model.load_report().string().empty());
    check_story(name, model, ids, record.tensor("logits_f32"));
  }

  // bf16, teacher-forced over the whole text.
  const Lm exact = Lm::from_pretrained(directory, Cpu({.threads = 2}));
  const Tensor<float> a = exact.logits(exact.prompt(ids));
  for (const bool dot : both_dots) {
    const Lm rounded = Lm::from_pretrained(directory, Cpu({.threads = 2, .bf16_dot = dot}), {.precision = Precision{.weights = DType::bf16}});
    Agreement agreement;
    agreement.add(a, rounded.logits(rounded.prompt(ids)));
    agreement.check(name + (dot ? " bf16_dot" : " bf16"), 0.99, 1e-2);
  }
}

}  // namespace

TEST_CASE("stories260K: logits and the greedy text, at every level") {
  M2LM_SKIP_WITHOUT(asset_file("golden/stories260K/golden.json"));
  const std::vector<IsaLevel> levels = isa_levels();
  check_stories("stories260K", levels);
}

// What a format costs in quality is no matter of memory, and ten times as slow under AddressSanitizer.
#if !defined(__SANITIZE_ADDRESS__)
TEST_CASE("stories15M in blocks of 8 and 4 bits: agreement with f32 on 2,000 tokens that it generated") {
  const std::string directory = asset_file("llama/stories15M-hf");
  M2LM_SKIP_WITHOUT(directory + "/config.json");
  const Lm exact = Lm::from_pretrained(directory, Cpu({.threads = 2}));
  const auto quantised = [&](DType format) { return Lm::from_pretrained(directory, Cpu({.threads = 2}), {.precision = Precision{.weights = format}}); };
  const Lm eight = quantised(DType::q8), four = quantised(DType::q4);
  Agreement of_eight, of_four;
  for (std::uint64_t seed = 1; seed <= 8; ++seed) {
    std::vector<std::int32_t> ids{1};
    const auto told = exact.generate(exact.prompt(ids), {.max_new_tokens = 250, .temperature = 1, .seed = seed, .ignore_eos = true});
    ids.insert(ids.end(), told.tokens.begin(), told.tokens.end() - 1);
    const Tensor<float> wanted = exact.logits(exact.prompt(ids));
    of_eight.add(wanted, eight.logits(eight.prompt(ids)));
    of_four.add(wanted, four.logits(four.prompt(ids)));
  }
  // Measured: 98.6 % and 0.00098 in 8 bits, 86 % and 0.10 in 4 bits, of which a model of 15 million weights has few to spare.
  of_eight.check("stories15M q8", 0.98, 2e-3);
  of_four.check("stories15M q4", 0.82, 0.15);
}
#endif

TEST_CASE("stories15M: logits and the greedy text") {
  M2LM_SKIP_WITHOUT(asset_file("golden/stories15M/golden.json"));
  const IsaLevel levels[] = {IsaLevel::avx2, m2lm::default_isa()};
  check_stories("stories15M", std::span(levels).last(m2lm::default_isa() > IsaLevel::avx2 ? 2 : 1));
}

TEST_CASE("stories260K: hidden states of the CPU equal those of Reference<double>") {
  M2LM_SKIP_WITHOUT(asset_file("golden/stories260K/golden.json"));
  const std::string directory = asset_file("llama/stories260K-hf");
  const auto judge = TextModel<m2lm::Reference<double>>::from_pretrained(directory);
  const std::vector<std::int32_t> ids = some_ids(40, judge.decoder_config().vocab_size);
  const auto expected = judge.hidden_states(judge.prompt(ids));
  for (const IsaLevel level : isa_levels()) {
    const Lm model = Lm::from_pretrained(directory, cpu_at(level, 2));
    const auto states = model.hidden_states(model.prompt(ids));
    REQUIRE(states.size() == expected.size());
    for (std::size_t i = 0; i < states.size(); ++i)
      M2LM_CHECK_CLOSE(states[i], expected[i], tolerance_of(model), std::string(m2lm::isa_name(level)) + " hidden_states." + std::to_string(i));
  }
}

TEST_CASE("stories15M with a tokenizer tells llama.cpp's story") {
  M2LM_SKIP_WITHOUT(asset_file("llama/tokenizer.model"));
  M2LM_SKIP_WITHOUT(asset_file("golden/llama.cpp/stories15M_greedy.txt"));
  const TemporaryDirectory directory;
  const auto link = [&](const std::string& from, const std::string& name) {
    std::filesystem::create_symlink(std::filesystem::absolute(asset_file(from)), directory / name);
  };
  link("llama/stories15M-hf/config.json", "config.json");
  link("llama/stories15M-hf/model.safetensors", "model.safetensors");
  link("llama/tokenizer.model", "tokenizer.model");
  const std::string stories = m2lm::read_file(asset_file("golden/llama.cpp/stories15M_greedy.txt"));
  const std::string title = "== stories15M-f32\n";
  const std::size_t begin = stories.find(title);
  REQUIRE(begin != std::string::npos);
  std::string story = stories.substr(begin + title.size(), stories.find("\n\n\n== ") - begin - title.size());
  REQUIRE(story.size() > 300);

  const Lm model = Lm::from_pretrained(directory.path(), Cpu({.threads = 2}), {.follow_links = true});
  std::string streamed;
  const m2lm::Generation told =
      model.generate(model.raw_prompt("Once upon a time"), {.max_new_tokens = 150, .on_text = [&](std::string_view piece) { streamed += piece; }});
  CHECK(streamed == told.text);
  const std::string text = " Once upon a time" + told.text;
  CHECK_MESSAGE(text.substr(0, story.size()) == story, text);

  // And the text of the author's own program, by text instead of ids.
  const std::string own = m2lm::ConfigValue::parse_file(asset_file("golden/stories15M/golden.json")).get<std::string>("text");
  const m2lm::Generation whole = model.generate(model.raw_prompt("Once upon a time"), {.max_new_tokens = 250, .stop_tokens = {1}});
  CHECK(("Once upon a time" + whole.text).substr(0, own.size()) == own);
}

TEST_CASE("LLaVA as transformers saves it: every recorded tensor") {
  const std::string directory = asset_file("vlm/SYNTHETIC-tiny-llava-hf");
  M2LM_SKIP_WITHOUT(directory + "/golden.safetensors");
  const Safetensors record = Safetensors::open(directory + "/golden.safetensors");
  const std::vector<std::int32_t> ids = ids_of(record.tensor("input_ids"));
  std::vector<std::int32_t> generated = ids_of(record.tensor("generated"));
  REQUIRE(std::equal(ids.begin(), ids.end(), generated.begin()));
  generated.erase(generated.begin(), generated.begin() + static_cast<std::ptrdiff_t>(ids.size()));
  for (const IsaLevel level : isa_levels()) {
    const std::string what(m2lm::isa_name(level));
    const Vlm model = Vlm::from_pretrained(directory, cpu_at(level, 2));
    const double tolerance = tolerance_of(model);
    CHECK_MESSAGE(model.load_report().string().empty(), model.load_report().string());

    m2lm::ClipVisionConfig config;
    read_config(model.config(), config);
    CHECK(config.feature_layer == -2);
    config.features = m2lm::VitFeatures::all_tokens;
    const m2lm::Checkpoint checkpoint = m2lm::Checkpoint::open(directory);
    m2lm::ClipVit<>::On<Cpu, in_f32> encoder(config);
    require_complete(load_parameters(encoder, checkpoint, "vision_tower"), directory);
    m2lm::ProjectorConfig projector_config{.input_width = encoder.width(), .output_width = model.decoder_config().hidden_size};
    read_config(model.config(), projector_config);
    m2lm::MlpProjector<2>::On<Cpu, in_f32> projector(projector_config);
    require_complete(load_parameters(projector, checkpoint, "multi_modal_projector"), directory);
    m2lm::Arena arena;
    m2lm::Context<Cpu> ctx{model.backend(), arena};
    encoder.prepare(ctx, DType::f32);
    projector.prepare(ctx, DType::f32);
    Tensor<float> hidden(Shape{encoder.tokens(), encoder.width()}), projected(Shape{encoder.tokens() - 1, projector_config.output_width});
    encoder.forward(ctx, slice(record.tensor("pixel_values"), 0), hidden.view<2>());
    M2LM_CHECK_CLOSE(hidden, record.tensor("vision_hidden_m2"), tolerance, what + " vision_hidden_m2");
    projector.forward(ctx, hidden.view<2>().rows(1, encoder.tokens()), projected.view<2>());
    M2LM_CHECK_CLOSE(projected, record.tensor("projected"), tolerance, what + " projected");

    auto prompt = model.prompt(ids);
    prompt.attach_embeddings<"image">(AnyTensor(std::move(projected)));  // ours, not the recorded ones: the errors add up
    M2LM_CHECK_CLOSE(model.logits(prompt), record.tensor("logits"), 2 * tolerance, what + " logits");
    const m2lm::Generation answer = model.generate(prompt, {.max_new_tokens = static_cast<std::int64_t>(generated.size()), .ignore_eos = true});
    CHECK(answer.tokens == generated);
  }
}
