// Several sessions of one model from several threads: the same tokens as alone. Runs under ThreadSanitizer too.
#include "models_support.hpp"

#include <atomic>
#include <thread>

namespace {

using namespace m2lm_test;

namespace t = m2lm::testing;

struct Work {
  std::vector<std::int32_t> ids;
  std::uint64_t seed = 0;
};

std::vector<Work> some_work(std::int64_t vocab) {
  std::vector<Work> out;
  for (std::uint64_t i = 0; i < 6; ++i) out.push_back({some_ids(static_cast<std::int64_t>(3 + 40 * i), vocab, i + 1), i});
  return out;
}

template <class M>
std::vector<std::int32_t> answer(const M& model, const Work& work) {
  auto session = model.session({.seed = work.seed});
  const m2lm::GenerateOptions options{.max_new_tokens = 8, .temperature = 0.8, .top_k = 20, .ignore_eos = true};
  std::vector<std::int32_t> tokens = session.generate(model.prompt(work.ids), options).tokens;
  const std::vector<std::int32_t> more = session.generate(model.prompt(std::vector<std::int32_t>{7, 8, 9}), options).tokens;
  tokens.insert(tokens.end(), more.begin(), more.end());
  return tokens;
}

/// Runs f(i) for i < count, each on a thread of its own, all starting together.
template <class F>
void together(std::size_t count, F&& f) {
  std::atomic<bool> go{false};
  std::vector<std::thread> threads;
  for (std::size_t i = 0; i < count; ++i)
    threads.emplace_back([&, i] {
      while (!go.load()) std::this_thread::yield();
      f(i);
    });
  go = true;
  for (std::thread& thread : threads) thread.join();
}

}  // namespace

TEST_CASE("sessions of one model on several threads give the tokens that they give alone") {
  const TemporaryDirectory directory;
  m2lm::LlamaConfig config = t::small_llama();
  config.hidden_size = 64;
  config.intermediate_size = 128;
  config.vocab_size = 300;
  config.max_position_embeddings = 512;
  t::write_synthetic_llama(directory.path(), config);
  for (const DType weights : {DType::f32, DType::bf16})
    for (const int pool : {1, 2, 3}) {
      const Lm model = Lm::from_pretrained(directory.path(), Cpu({.threads = pool}), {.precision = Precision{.weights = weights}});
      const std::vector<Work> work = some_work(config.vocab_size);
      std::vector<std::vector<std::int32_t>> alone, parallel(work.size());
      for (const Work& w : work) alone.push_back(answer(model, w));
      together(work.size(), [&](std::size_t i) { parallel[i] = answer(model, work[i]); });
      for (std::size_t i = 0; i < work.size(); ++i) CHECK(parallel[i] == alone[i]);
    }
}

TEST_CASE("text and pictures from several threads; two models on one pool") {
  const Cpu backend({.threads = 2});
  const Vlm first = Vlm::from_pretrained(golden("llava/with_tokenizer"), backend);
  const Vlm second = Vlm::from_pretrained(golden("llava/with_tokenizer"), backend, {.precision = Precision{.weights = DType::bf16}});
  const m2lm::Image picture = m2lm::load_image(golden("llava/with_tokenizer/picture.png"));
  const auto say = [&](const Vlm& model) {
    auto prompt = model.prompt("<image>\nWhat is shown in this image?");
    prompt.attach<"image">(picture);
    return model.generate(prompt, {.max_new_tokens = 12, .ignore_eos = true}).text;
  };
  const std::string expected[] = {say(first), say(second)};
  std::string said[4];
  together(4, [&](std::size_t i) { said[i] = say(i % 2 ? second : first); });
  for (std::size_t i = 0; i < 4; ++i) CHECK(said[i] == expected[i % 2]);
}

TEST_CASE("cancelled from another thread") {
  const TemporaryDirectory directory;
  m2lm::LlamaConfig config = t::small_llama();
  config.max_position_embeddings = 1 << 20;
  t::write_synthetic_llama(directory.path(), config);
  const Lm model = Lm::from_pretrained(directory.path(), Cpu({.threads = 1}));
  std::atomic<bool> cancel{false};
  std::thread stopper([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    cancel = true;
  });
  const m2lm::Generation answer = model.generate(model.prompt(some_ids(4, 96)), {.max_new_tokens = 1 << 19, .ignore_eos = true, .cancel = &cancel});
  stopper.join();
  CHECK(answer.finish_reason == m2lm::FinishReason::cancelled);
  CHECK(answer.tokens.size() < 1 << 19);
}
