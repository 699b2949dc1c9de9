// labels: narrow-sanitizer
// Trainer: gradients of the whole chain against differences of the loss, ragged batches, freezing, precision, threads, errors.
#include "models_support.hpp"

#include <cmath>
#include <map>

namespace {

using namespace m2lm_test;
namespace train = m2lm::train;
using m2lm::Reference;

template <class B>
auto& decoder_of(const ImageModel<B>& model) {
  return m2lm::detail::ModelAccess::state(model).decoder;
}

/// Every parameter of a model under its name.
template <class M>
std::map<std::string, AnyTensor> parameters_of(const M& model) {
  std::map<std::string, AnyTensor> out;
  const auto collect = [&](std::string_view name, const m2lm::Parameter& p) { out.emplace(name, p.value); };
  auto& state = m2lm::detail::ModelAccess::state(model);
  m2lm::for_each_parameter(collect, state.decoder);
  std::apply([&](auto&... c) { (m2lm::for_each_parameter(collect, c), ...); }, state.component);
  return out;
}
template <class M>
std::map<std::string, std::vector<float>> values_of(const M& model) {
  std::map<std::string, std::vector<float>> out;
  for (const auto& [name, value] : parameters_of(model)) {
    const Tensor<float> t = value.template to<float>();
    out.emplace(name, std::vector<float>(t.data(), t.data() + t.elements()));
  }
  return out;
}


m2lm::Image drawn(std::uint64_t seed) {
  m2lm::Rng rng(seed);
  m2lm::Image out{.width = 28, .height = 28, .pixels = {}};
  for (int i = 0; i < 28 * 28 * 3; ++i) out.pixels.push_back(static_cast<std::uint8_t>(rng.next() % 256));
  return out;
}

/// Two examples of different lengths: one with two pictures, one with none.
template <class M>
std::vector<train::Example<M>> examples(const M& model) {
  const auto image = static_cast<std::int32_t>(model.decoder_config().vocab_size - 1);
  std::vector<train::Example<M>> out(2);
  out[0].prompt = model.prompt(std::vector<std::int32_t>{1, image, 7, 9, image, 12});
  out[0].prompt.template attach<"image">(drawn(1)).template attach<"image">(drawn(2));
  out[0].answer_ids = {20, 7, 2};
  out[1].prompt = model.prompt(std::vector<std::int32_t>{1, 30, 31});
  out[1].answer_ids = {7, 33, 34, 35, 2};
  return out;
}

TEST_CASE("the gradient of the whole chain is the slope of the loss, group by group, tied and not") {
  using M = ImageModel<Reference<double>>;
  for (const bool tied : {false, true}) {
    const TemporaryDirectory directory;
    m2lm::LlamaConfig text = m2lm::testing::small_llama();
    text.tie_word_embeddings = tied;
    m2lm::testing::write_synthetic_llava(directory.path(), text);
    // The same values in f64, so that a small change is not rounded away.
    std::vector<m2lm::NamedTensor> begin;
    for (const m2lm::Safetensors file = m2lm::Safetensors::open(directory / "model.safetensors"); const std::string& name : file.names())
      begin.push_back({name, AnyTensor(file.tensor(name).to<double>())});
    const M model = M::from_pretrained(directory.path());
    train::Trainer<M> trainer(model, {});
    const auto batch = examples(model);
    const auto& gradients = trainer.gradients(batch);
    const auto stored_name = [](std::string name) { return (name.starts_with("model.") || name.starts_with("lm_head.") ? "language_model." : "") + name; };
    for (const char* group : {"*embed_tokens*", "*layers.0.self_attn*", "*layers.1.mlp*", "*model.norm*", "*lm_head*", "multi_modal_projector.*",
                              "vision_tower.*embeddings.*", "vision_tower.*layers.0.*", "vision_tower.*pre_layrnorm*"}) {
      CAPTURE(group);
      m2lm::Rng rng(9);
      std::map<std::string, Tensor<double>> direction;
      double slope = 0;
      for (const auto& entry : gradients.entries()) {
        if (!m2lm::glob_match(group, entry.name)) continue;
        Tensor<double> d(entry.parameter->shape);
        for (double& x : d.span()) x = 2 * rng.uniform() - 1;
        for (std::int64_t i = 0; i < d.elements(); ++i) slope += d.data()[i] * entry.value.data()[i];
        direction.emplace(stored_name(entry.name), std::move(d));
      }
      if (tied && std::string(group) == "*lm_head*") {
        CHECK(direction.empty());
        continue;
      }
      REQUIRE(!direction.empty());
      const auto loss_at = [&](double step) {
        std::vector<m2lm::NamedTensor> tensors;
        for (const m2lm::NamedTensor& t : begin) {
          Tensor<double> values = t.tensor.to<double>();
          if (const auto d = direction.find(t.name); d != direction.end())
            for (std::int64_t i = 0; i < values.elements(); ++i) values.data()[i] += step * d->second.data()[i];
          tensors.push_back({t.name, AnyTensor(std::move(values))});
        }
        m2lm::write_safetensors(directory / "model.safetensors", tensors);
        const M moved = M::from_pretrained(directory.path());
        train::Trainer<M> at(moved, {});
        return at.loss(examples(moved));
      };
      // A difference of order four: off by step⁴ times the fifth derivative, and by the rounding of the loss over the step.
      const double step = 1e-4;
      const double difference = (8 * (loss_at(step) - loss_at(-step)) - (loss_at(2 * step) - loss_at(-2 * step))) / (12 * step);
      CHECK_MESSAGE(std::abs(slope - difference) < 1e-7 * (1 + std::abs(slope)), slope, " against ", difference);
      CHECK(std::abs(slope) > 1e-4);
    }
  }
}

struct Small {
  TemporaryDirectory directory;
  Small() { m2lm::testing::write_synthetic_llava(directory.path()); }
};

TEST_CASE("the loss is the mean over the answers; a ragged batch is the weighted sum of its examples") {
  const Small files;
  const Vlm model = Vlm::from_pretrained(files.directory.path());
  train::Trainer<Vlm> trainer(model, {});
  const auto batch = examples(model);
  double expected = 0, counted = 0;
  for (const auto& e : batch) {
    auto whole = e.prompt;
    whole.ids.insert(whole.ids.end(), e.answer_ids.begin(), e.answer_ids.end());
    const Tensor<float> logits = model.logits(whole);
    const std::int64_t rows = logits.shape()[0], n = logits.shape()[1], answers = static_cast<std::int64_t>(e.answer_ids.size());
    for (std::int64_t i = 0; i < answers; ++i) {
      const float* row = logits.data() + (rows - 1 - answers + i) * n;
      double sum = 0;
      for (std::int64_t j = 0; j < n; ++j) sum += std::exp(static_cast<double>(row[j]));
      expected += std::log(sum) - static_cast<double>(row[e.answer_ids[static_cast<std::size_t>(i)]]);
    }
    counted += static_cast<double>(answers);
  }
  CHECK(trainer.loss(batch) == doctest::Approx(expected / counted).epsilon(1e-6));
  const auto copy = [](const m2lm::Gradients<float>& g) {
    std::vector<std::vector<double>> out;
    for (const auto& entry : g.entries()) out.emplace_back(entry.value.data(), entry.value.data() + entry.value.elements());
    return out;
  };
  double loss = 0, first_loss = 0, second_loss = 0;
  const auto both = copy(trainer.gradients(batch, &loss));
  const auto first = copy(trainer.gradients(std::span(batch).first(1), &first_loss)), second = copy(trainer.gradients(std::span(batch).last(1), &second_loss));
  CHECK(loss == doctest::Approx((3 * first_loss + 5 * second_loss) / 8).epsilon(1e-6));
  // Gradients that are zero but for rounding (a key's bias shifts all scores alike) are judged by the size of the others.
  double all = 0;
  for (const auto& values : both)
    for (const double x : values) all = std::max(all, std::abs(x));
  for (std::size_t i = 0; i < both.size(); ++i) {
    double largest = 1e-2 * all, error = 0;
    for (std::size_t j = 0; j < both[i].size(); ++j) {
      largest = std::max({largest, std::abs(first[i][j]), std::abs(second[i][j])});
      error = std::max(error, std::abs(both[i][j] - (3 * first[i][j] + 5 * second[i][j]) / 8));
    }
    CHECK_MESSAGE(error <= 1e-5 * largest, trainer.gradients().entries()[i].name);
  }
}

TEST_CASE("what is frozen stays, what is trained moves, both by pattern") {
  const Small files;
  const Vlm model = Vlm::from_pretrained(files.directory.path());
  const auto before = values_of(model);
  const train::Selection selection{.train = {"multi_modal_projector.*", "model.layers.1.mlp.*", "lm_head.weight"}, .freeze = {"*.bias"}};
  train::Trainer<Vlm> trainer(model, {.parameters = selection, .schedule = {.peak = 1e-2}});
  const auto batch = examples(model);
  const double first = trainer.step(batch).loss;
  for (int i = 0; i < 15; ++i) trainer.step(batch);
  CHECK(trainer.loss(batch) < 0.5 * first);
  CHECK(trainer.steps() == 16);
  int moved = 0;
  for (const auto& item : values_of(trainer.model())) {
    const std::string& name = item.first;
    const bool same = item.second == before.at(name);
    CHECK_MESSAGE(same != selection.trains(name), name);
    moved += same ? 0 : 1;
  }
  CHECK(moved == 2 + 3 + 1);
}

TEST_CASE("a picture that was encoded before a step is encoded anew behind it") {
  const Small files;
  const Vlm model = Vlm::from_pretrained(files.directory.path());
  const auto batch = examples(model);
  const Tensor<float> before = model.logits(batch[0].prompt);
  train::Trainer<Vlm> trainer(model, {.parameters = {.train = {"multi_modal_projector.*"}}, .schedule = {.peak = 1e-2}});
  trainer.step(batch);
  const Tensor<float> after = model.logits(batch[0].prompt);
  model.save_pretrained(files.directory / "saved");
  // Not bit by bit: a trained MLP is packed without its gate fused, and a compiler may contract the two forms differently.
  M2LM_CHECK_CLOSE(Vlm::from_pretrained(files.directory / "saved").logits(batch[0].prompt), AnyTensor(after.clone()), 1e-5, "saved and loaded");
  CHECK(m2lm::testing::relative_error(before, after) > 1e-3);
}

TEST_CASE("a frozen decoder in bf16 hands gradients to a projector that is trained in f32") {
  using Mixed = m2lm::Model<Cpu, Precision{.weights = DType::bf16}, m2lm::LlamaDecoder<>, m2lm::Modality<"image", m2lm::ClipVit<>, m2lm::MlpProjector<2>>>;
  const TemporaryDirectory directory;
  m2lm::testing::write_synthetic_llava(directory.path(), m2lm::testing::small_llama(), m2lm::testing::small_clip(), 1, DType::bf16);
  const Mixed model = Mixed::from_pretrained(directory.path());
  train::Trainer<Mixed> trainer(model, {.parameters = {.train = {"multi_modal_projector.*"}}, .schedule = {.peak = 1e-2}});
  const auto batch = std::vector{examples(model)[0]};
  const double first = trainer.step(batch).loss;
  for (int i = 0; i < 30; ++i) trainer.step(batch);
  CHECK(trainer.loss(batch) < 0.7 * first);
  trainer.model().save_pretrained(directory / "saved");
  const m2lm::Checkpoint saved = m2lm::Checkpoint::open(directory / "saved");
  CHECK(saved.find("multi_modal_projector.linear_1.weight")->dtype() == DType::f32);
  CHECK(saved.find("language_model.model.norm.weight")->dtype() == DType::bf16);
  // In f32 the saved model is the trained one, except that activations are not rounded.
  const Vlm exact = Vlm::from_pretrained(directory / "saved");
  train::Trainer<Vlm> judge(exact, {});
  CHECK(judge.loss(examples(exact)) > 0);
  const auto e = examples(exact)[0];
  CHECK(judge.loss(std::span(&e, 1)) == doctest::Approx(trainer.loss(batch)).epsilon(0.1));
}

TEST_CASE("the same bits on one thread and on two, and from one run to the next") {
  const TemporaryDirectory directory;
  m2lm::LlamaConfig text = m2lm::testing::small_llama();
  text.hidden_size = 96;  // large enough for the pool to be used
  text.head_dim = 24;
  text.intermediate_size = 160;
  m2lm::testing::write_synthetic_llava(directory.path(), text);
  std::map<std::string, std::vector<float>> first;
  for (const int threads : {1, 2, 1}) {
    const Vlm model = Vlm::from_pretrained(directory.path(), Cpu({.threads = threads}));
    train::Trainer<Vlm> trainer(model, {.schedule = {.peak = 1e-3}, .max_gradient_norm = 1});
    auto batch = examples(model);
    for (int i = 0; i < 60; ++i) batch[1].prompt.ids.push_back(3 + i);
    for (int i = 0; i < 3; ++i) trainer.step(batch);
    auto values = values_of(trainer.model());
    if (first.empty()) first = std::move(values);
    else CHECK(values == first);
  }
}

TEST_CASE("answers as text: the template's, ended") {
  const std::string directory = golden("llava/with_tokenizer");
  const Vlm model = Vlm::from_pretrained(directory);
  train::Trainer<Vlm> trainer(model, {.parameters = {.train = {"multi_modal_projector.*"}}}), open(model, {.parameters = {.train = {"lm_head*"}}, .end_answers = false});
  train::Example<Vlm> e{.prompt = model.prompt("<image>\nWhat is it?"), .answer = "a cat", .answer_ids = {}};
  e.prompt.attach<"image">(m2lm::load_image(directory + "/picture.png"));
  const auto tokens = static_cast<std::int64_t>(model.tokenizer().encode("a cat", false).size());
  CHECK(trainer.step({e}).targets == tokens + 1);
  CHECK(open.step({e}).targets == tokens);
  e.prompt = model.raw_prompt("Once upon");
  e.answer = " a time";
  CHECK(open.step({e}).targets == static_cast<std::int64_t>(model.tokenizer().encode("Once upon a time").size() - model.tokenizer().encode("Once upon").size()));
}

TEST_CASE("what cannot be trained is said, and nothing changes") {
  const Small files;
  const Vlm model = Vlm::from_pretrained(files.directory.path());
  CHECK(has(message_of<m2lm::OptionError>([&] { train::Trainer<Vlm>(model, {.parameters = {.freeze = {"vision.*"}}}); }), "\"vision.*\""));
  CHECK(has(message_of<m2lm::OptionError>([&] { train::Trainer<Vlm>(model, {.parameters = {.freeze = {"*"}}}); }), "nothing is left"));
  CHECK(has(message_of<m2lm::OptionError>([&] { train::Trainer<Vlm>(model, {.adamw = {.beta2 = 2}}); }), "betas"));
  CHECK(has(message_of<m2lm::OptionError>([&] { train::Trainer<Vlm>(model, {.schedule = {.decay = train::Decay::cosine}}); }), "total_steps"));
  train::Trainer<Vlm> trainer(model, {.schedule = {.peak = 1e30}});
  auto batch = examples(model);
  const auto refused = [&] { return message_of<m2lm::InputError>([&] { trainer.step(batch); }); };
  batch[0].answer_ids.clear();
  CHECK(has(refused(), "answer"));
  batch[0].answer_ids = {5000};
  CHECK(has(refused(), "5000"));
  batch[0].answer_ids = std::vector<std::int32_t>(300, 3);
  CHECK(has(refused(), "positions"));
  batch = {};
  CHECK(has(refused(), "no examples"));
  batch = examples(model);
  batch[0].prompt.ids.push_back(static_cast<std::int32_t>(model.decoder_config().vocab_size - 1));
  CHECK(has(refused(), "placeholder"));
  // A rate that throws the weights away: the next step finds out, and leaves them as they are.
  batch = examples(model);
  trainer.step(batch);
  const auto before = values_of(trainer.model());
  CHECK(has(message_of<m2lm::NumericError>([&] { trainer.step(batch); }), "not finite"));
  CHECK(trainer.steps() == 1);
  for (const auto& item : values_of(trainer.model()))
    CHECK_MESSAGE(std::memcmp(item.second.data(), before.at(item.first).data(), item.second.size() * sizeof(float)) == 0, item.first);
}

}  // namespace
