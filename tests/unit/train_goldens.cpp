// Whole training runs on Cpu in f32 that follow PyTorch's: stories260K with AdamW, and a tiny LLaVA on easy-VQA from nothing.
// labels: no-sanitizer
#include "models_support.hpp"

#include <cmath>
#include <cstdio>
#include <map>

namespace {

using namespace m2lm_test;
namespace train = m2lm::train;

m2lm::ConfigValue recorded(const char* name) { return m2lm::ConfigValue::parse_file(golden(std::string("train/") + name)); }

/// The largest relative distance of two numbers seen.
struct Distance {
  double largest = 0;
  void add(double got, double want) { largest = std::max(largest, std::abs(got - want) / std::abs(want)); }
};

double norm_of(const AnyTensor& tensor, const Tensor<float>* begin = nullptr) {
  double squares = 0;
  for (std::int64_t i = 0; i < tensor.shape().elements(); ++i) {
    const double x = tensor.at(i) - (begin ? static_cast<double>(begin->data()[i]) : 0.0);
    squares += x * x;
  }
  return std::sqrt(squares);
}

TEST_CASE("ten AdamW steps on stories260K follow PyTorch to 1e-4: loss, gradient norms, parameters") {
  const std::string directory = asset_file("llama/stories260K-hf");
  M2LM_SKIP_WITHOUT(directory + "/model.safetensors");
  M2LM_SKIP_WITHOUT(asset_file("golden/stories260K/golden.safetensors"));
  const auto golden = recorded("stories260K.json");
  const auto recipe = golden["adamw"];
  const auto betas = recipe.get_list<double>("betas");
  const Lm model = Lm::from_pretrained(directory, Cpu({.threads = 2}));
  train::Trainer<Lm> trainer(model, {.adamw = {.beta1 = betas[0], .beta2 = betas[1], .eps = recipe.get<double>("eps"), .weight_decay = recipe.get<double>("weight_decay")},
                                     .schedule = {.peak = recipe.get<double>("lr")}});
  const auto ids = golden.get_list<std::int32_t>("ids");
  // Every token behind the first is a target.
  const train::Example<Lm> example{.prompt = model.prompt(std::vector<std::int32_t>{ids[0]}), .answer = {}, .answer_ids = {ids.begin() + 1, ids.end()}};

  // The first gradients, element by element, in the shared golden, which has llama2.c's names and interleaved rotation of q and k.
  const Safetensors recorded_gradients = Safetensors::open(asset_file("golden/stories260K/golden.safetensors"));
  const std::map<std::string, std::string> names{{"self_attn.v_proj", "attention.wv"}, {"self_attn.o_proj", "attention.wo"}, {"mlp.gate_proj", "feed_forward.w1"},
                                                 {"mlp.down_proj", "feed_forward.w2"}, {"mlp.up_proj", "feed_forward.w3"}, {"input_layernorm", "attention_norm"},
                                                 {"post_attention_layernorm", "ffn_norm"}};
  Distance gradient_norms, loss;
  int compared = 0;
  for (const auto& entry : trainer.gradients(std::span(&example, 1)).entries()) {
    std::string name = entry.name == "model.embed_tokens.weight" ? "tok_embeddings.weight" : entry.name == "model.norm.weight" ? "norm.weight" : entry.name;
    for (const auto& [ours, theirs] : names)
      if (const std::size_t at = name.find(ours); at != std::string::npos) name.replace(at, ours.size(), theirs);
    if (name.starts_with("model.")) name = name.substr(6);
    gradient_norms.add(norm_of(AnyTensor(entry.value.clone())), golden["parameters"][entry.name].get<double>("first_gradient_norm"));
    if (!recorded_gradients.contains("grad." + name)) continue;
    ++compared;
    M2LM_CHECK_CLOSE(entry.value, recorded_gradients.tensor("grad." + name), 1e-4, entry.name);
  }
  CHECK(compared == 37);  // all but q_proj and k_proj of five blocks

  std::map<std::string, Tensor<float>> begin;
  const auto visit = [&](auto&& f) { m2lm::for_each_parameter(f, m2lm::detail::ModelAccess::state(trainer.model()).decoder); };
  visit([&](std::string_view name, m2lm::Parameter& p) { begin.emplace(name, p.value.to<float>()); });
  const auto losses = golden.get_list<double>("losses"), norms = golden.get_list<double>("gradient_norms"), shared = recipe.get_list<double>("losses");
  for (std::size_t step = 0; step < 10; ++step) {
    const train::StepReport report = trainer.step(std::span(&example, 1));
    CHECK(report.targets == 199);
    loss.add(report.loss, losses[step]);
    loss.add(report.loss, shared[step]);
    gradient_norms.add(report.gradient_norm, norms[step]);
  }
  Distance parameter_norms, changes, elements;
  visit([&](std::string_view name, m2lm::Parameter& p) {
    const auto want = golden["parameters"][name];
    parameter_norms.add(norm_of(p.value), want.get<double>("norm"));
    changes.add(norm_of(p.value, &begin.at(std::string(name))), want.get<double>("change_norm"));
    const auto at = want.get_list<std::int64_t>("at");
    const auto values = want.get_list<double>("values");
    const double root = want.get<double>("norm") / std::sqrt(static_cast<double>(p.shape.elements()));
    for (std::size_t i = 0; i < at.size(); ++i) elements.largest = std::max(elements.largest, std::abs(p.value.at(at[i]) - values[i]) / root);
  });
  std::printf("stories260K: loss %.1e, gradient norms %.1e, parameter norms %.1e, their changes %.1e, elements %.1e\n", loss.largest, gradient_norms.largest,
              parameter_norms.largest, changes.largest, elements.largest);
  CHECK(loss.largest < 1e-4);
  CHECK(gradient_norms.largest < 1e-4);
  CHECK(parameter_norms.largest < 1e-4);
  CHECK(elements.largest < 1e-4);
  // The whole way of ten steps is 1e-3 long at most, so its own distance says more than that of the parameters.
  CHECK(changes.largest < 1e-3);
}

TEST_CASE("200 steps of a tiny LLaVA on easy-VQA, from nothing, follow PyTorch's curve to 1e-3") {
  const std::string data = asset_file("data/easy_vqa/train");
  M2LM_SKIP_WITHOUT(data + "/questions.json");
  const auto golden = recorded("easy_vqa.json");
  const auto betas = golden.get_list<double>("betas");
  const Vlm model = Vlm::from_config(m2lm::ConfigValue::parse_file(m2lm_test::golden("train/config.json")), golden.get<std::uint64_t>("seed"),
                                     Cpu({.threads = 2}), {.tokenizer_directory = source_file("assets/easy-vqa")});
  const auto steps = golden.get<std::int64_t>("steps");
  train::Trainer<Vlm> trainer(
      model, {.parameters = {.freeze = {"vision_tower.*"}},
              .adamw = {.beta1 = betas[0], .beta2 = betas[1], .eps = golden.get<double>("eps"), .weight_decay = golden.get<double>("weight_decay")},
              .schedule = {.peak = golden.get<double>("peak"), .warmup_steps = golden.get<std::int64_t>("warmup"), .decay = train::Decay::cosine,
                           .total_steps = steps, .floor = golden.get<double>("floor")},
              .max_gradient_norm = golden.get<double>("max_gradient_norm")});
  const m2lm::ConfigValue questions = m2lm::ConfigValue::parse_file(data + "/questions.json");
  const auto example = [&](std::size_t i) {
    const m2lm::ConfigValue q = questions.at(i);
    train::Example<Vlm> out{.prompt = model.prompt(m2lm::concat("<image>\n", q.at(0).as<std::string>())), .answer = q.at(1).as<std::string>(), .answer_ids = {}};
    out.prompt.attach<"image">(m2lm::load_image(m2lm::concat(data, "/images/", q.at(2).as<int>(), ".png")));
    return out;
  };
  REQUIRE(questions.size() == golden.get<std::size_t>("questions"));
  std::vector<std::int32_t> first = model.input_ids(example(0).prompt);
  const auto first_ids = golden.get_list<std::int32_t>("first_ids");
  REQUIRE(first.size() < first_ids.size());
  CHECK(std::equal(first.begin(), first.end(), first_ids.begin()));

  std::vector<float> tower;
  const auto tower_values = [&] {
    std::vector<float> out;
    m2lm::for_each_parameter([&](std::string_view, const m2lm::Parameter& p) {
      const Tensor<float> values = p.value.to<float>();
      out.insert(out.end(), values.data(), values.data() + values.elements());
    }, std::get<0>(m2lm::detail::ModelAccess::state(model).component).encoder);
    return out;
  };
  tower = tower_values();
  const auto losses = golden.get_list<double>("losses"), norms = golden.get_list<double>("gradient_norms"), rates = golden.get_list<double>("learning_rates");
  const auto batch_size = golden.get<std::size_t>("batch"), stride = golden.get<std::size_t>("stride");
  Distance loss, norm;
  std::FILE* curve = nullptr;
  if (const std::string path = environment("M2LM_LOSS_CURVE", ""); !path.empty()) curve = std::fopen(path.c_str(), "w");
  for (std::int64_t step = 0; step < steps; ++step) {
    std::vector<train::Example<Vlm>> batch;
    for (std::size_t b = 0; b < batch_size; ++b) batch.push_back(example((batch_size * static_cast<std::size_t>(step) + b) * stride % questions.size()));
    const train::StepReport report = trainer.step(batch);
    const auto at = static_cast<std::size_t>(step);
    if (curve) std::fprintf(curve, "%.9g\n", report.loss);
    CHECK(report.learning_rate == doctest::Approx(rates[at]).epsilon(1e-12));
    CHECK_MESSAGE(std::abs(report.loss - losses[at]) <= 1e-3 * losses[at], "step ", step, ": loss ", report.loss, ", PyTorch's is ", losses[at]);
    loss.add(report.loss, losses[at]);
    norm.add(report.gradient_norm, norms[at]);
  }
  if (curve) std::fclose(curve);
  std::printf("easy-VQA: loss from %.3f to %.3f; distance from PyTorch: loss %.1e, gradient norm %.1e\n", losses.front(), losses.back(), loss.largest, norm.largest);
  CHECK(tower_values() == tower);  // frozen

  // Saved and loaded, the trained model says the same.
  const TemporaryDirectory directory;
  trainer.model().save_pretrained(directory / "saved");
  const auto prompt = example(3).prompt;
  // Not bit by bit: a trained MLP is packed without its gate fused, and a compiler may contract the two forms differently.
  M2LM_CHECK_CLOSE(Vlm::from_pretrained(directory / "saved").logits(prompt), AnyTensor(trainer.model().logits(prompt)), 1e-5, "saved and loaded");
}

}  // namespace
