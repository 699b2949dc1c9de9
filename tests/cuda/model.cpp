// Model on the CUDA backend: the goldens of the CPU's tests, recorded steps, sampling on the device, sessions and batches.
// labels: host-compiled
#if defined(M2LM_TEST_ON_DEVICE)
#include <m2lm/m2lm.hpp>
#else
#include <m2lm/testing/cuda_emulation_runtime.hpp>

#include <m2lm/m2lm.cuh>
#endif

#include "../unit/models_support.hpp"

#include <atomic>
#include <cstdio>
#include <stdexcept>
#include <thread>

namespace {

using namespace m2lm_test;
using m2lm::BasicCuda;
using m2lm::Bf16;
using m2lm::Reference;
namespace t = m2lm::testing;

constexpr const char* llama_names[] = {"mha_plain",           "gqa_linear_tied_sharded", "mqa_llama3_hd10", "gqa_llama3_tied_f16",
                                       "mha_wide_heads_bf16", "mqa_linear_tied_hd6",     "mistral_window",  "mistral_nowindow"};
constexpr const char* llava_names[] = {"old_keys_m2_default", "new_keys_m1_full", "saved_keys_mistral_p1_default"};

/// bf16: beside the two factors of its products, which network_tolerance counts, a block rounds at most as many stored activations again: q, k
/// and v, twice q and k, probabilities, gate and up, and h twice. Independent errors: √2. The judge computes in f32, as E = float does.
template <class E, class M>
double tolerance(const M& model) {
  const auto& c = model.decoder_config();
  const bool exact = std::is_same_v<E, float>;
  return (exact ? 1 : std::sqrt(2.0)) * t::network_tolerance(exact ? t::epsilon_f32 : t::epsilon_bf16 / 2, t::epsilon_f32,
                                                             std::max(c.hidden_size, c.intermediate_size), c.num_layers);
}

template <class E>
constexpr Precision in_element{.weights = m2lm::dtype_of<E>};

template <class E, class M>
M load(const std::string& directory) {
  return M::from_pretrained(directory, BasicCuda<E>(), {.precision = in_element<E>});
}

template <class E, class M>
void check_decoder(const M& model, const typename M::PromptType& prompt, const Safetensors& golden, double bound, const std::string& what) {
  CHECK(model.input_ids(prompt) == ids_of(golden.tensor("input_ids")));
  const auto states = model.hidden_states(prompt);
  REQUIRE(states.size() == static_cast<std::size_t>(model.decoder_config().num_layers + 1));
  for (std::size_t i = 0; i < states.size(); ++i)
    M2LM_CHECK_CLOSE(states[i], golden.tensor("hidden_states." + std::to_string(i)), bound, what + " hidden_states." + std::to_string(i));
  M2LM_CHECK_CLOSE(model.logits(prompt), golden.tensor("logits"), bound, what + " logits");
  if (!std::is_same_v<E, float>) return;  // rounding may choose another token
  const std::vector<std::int32_t> greedy = ids_of(golden.tensor("greedy"));
  const m2lm::Generation answer = model.generate(prompt, {.max_new_tokens = static_cast<std::int64_t>(greedy.size()), .ignore_eos = true});
  CHECK_MESSAGE(answer.tokens == greedy, what);
  CHECK(answer.finish_reason == m2lm::FinishReason::length);
}

template <class E>
void check_goldens() {
  for (const std::string name : llama_names) {
    const Safetensors record = Safetensors::open(golden("llama/" + name) + "/golden.safetensors");
    const auto model = load<E, TextModel<BasicCuda<E>>>(golden("llama/" + name));
    check_decoder<E>(model, model.prompt(ids_of(record.tensor("input_ids"))), record, tolerance<E>(model), name);
  }
  for (const std::string name : llava_names) {
    const auto model = load<E, ImageModel<BasicCuda<E>>>(golden("llava/" + name));
    const Safetensors record = Safetensors::open(golden("llava/" + name) + "/golden_2img.safetensors");
    check_decoder<E>(model, with_features(model, record, "features"), record, tolerance<E>(model), name);
  }
}

using CudaF32 = BasicCuda<float>;
using CudaLm = TextModel<CudaF32>;
using CudaVlm = ImageModel<CudaF32>;

struct Synthetic {
  TemporaryDirectory directory;
  Synthetic() { t::write_synthetic_llama(directory.path()); }
};

}  // namespace

TEST_CASE("goldens: hidden states, logits and greedy tokens in f32") { check_goldens<float>(); }
TEST_CASE("goldens: bf16 activations stay within their rounding") { check_goldens<Bf16>(); }

TEST_CASE("our bf16 is no further from the truth than PyTorch's is, by more than its own rounding") {
  const Safetensors record = Safetensors::open(golden("llama/mha_plain/golden.safetensors"));
  const auto model = load<Bf16, TextModel<m2lm::Cuda>>(golden("llama/mha_plain"));
  const double theirs = t::relative_error(record.tensor("logits_bf16").to<float>(), record.tensor("logits"));
  const double ours = t::relative_error(model.logits(model.prompt(ids_of(record.tensor("input_ids")))), record.tensor("logits"));
  std::printf("bf16 logits: ours %.2g, PyTorch's %.2g\n", ours, theirs);
  CHECK(ours <= 2 * theirs);
}

TEST_CASE("a picture file and text: features, logits and text") {
  const std::string directory = golden("llava/with_tokenizer");
  const m2lm::ConfigValue json = m2lm::ConfigValue::parse_file(directory + "/golden.json");
  const Safetensors record = Safetensors::open(directory + "/golden.safetensors");
  const m2lm::Image picture = m2lm::load_image(directory + "/picture.png");
  const CudaVlm model = load<float, CudaVlm>(directory);
  M2LM_CHECK_CLOSE(model.encode<"image">(picture), record.tensor("features"), tolerance<float>(model), "features");
  auto prompt = model.prompt("<image>\n" + json.get<std::string>("question"));
  prompt.attach<"image">(picture);
  std::string streamed;
  const std::vector<std::int32_t> greedy = json.get_list<std::int32_t>("greedy_ids");
  const m2lm::Generation answer =
      model.generate(prompt, {.max_new_tokens = static_cast<std::int64_t>(greedy.size()), .ignore_eos = true, .on_text = [&](std::string_view piece) {
                                streamed += piece;
                              }});
  CHECK(answer.tokens == greedy);
  CHECK(answer.text == json.get<std::string>("greedy_text"));
  CHECK(streamed == answer.text);
}

TEST_CASE("a decode step makes the host wait for nothing, and is recorded once per bucket of keys") {
  const Synthetic s;
  const CudaLm model = CudaLm::from_pretrained(s.directory.path());
  const Lm cpu = Lm::from_pretrained(s.directory.path());
  const auto prompt = model.prompt(some_ids(5, 96));
  const auto waits_of = [&](std::int64_t tokens) {
    auto session = model.session();
    const std::uint64_t before = model.backend().device().waits();
    CHECK(session.generate(prompt, {.max_new_tokens = tokens, .ignore_eos = true}).tokens ==
          cpu.generate(cpu.prompt(some_ids(5, 96)), {.max_new_tokens = tokens, .ignore_eos = true}).tokens);
    return model.backend().device().waits() - before;
  };
  const std::uint64_t short_answer = waits_of(8);
  CHECK(waits_of(40) == short_answer);
}

TEST_CASE("tokens that the device chooses equal those of the host's sampler") {
  const Synthetic s;
  const CudaLm model = CudaLm::from_pretrained(s.directory.path());
  const Lm cpu = Lm::from_pretrained(s.directory.path());
  const m2lm::GenerateOptions choices[] = {
      {.max_new_tokens = 24, .temperature = 0.7, .seed = 3, .ignore_eos = true},
      {.max_new_tokens = 24, .temperature = 1.3, .top_k = 7, .seed = 4, .ignore_eos = true},
      {.max_new_tokens = 24, .temperature = 1.0, .top_p = 0.8, .seed = 5, .ignore_eos = true},
      {.max_new_tokens = 24, .temperature = 1.1, .top_k = 20, .top_p = 0.9, .min_p = 0.02, .repetition_penalty = 1.3, .seed = 6, .ignore_eos = true},
      {.max_new_tokens = 24, .repetition_penalty = 1.5, .ignore_eos = true},
  };
  for (const m2lm::GenerateOptions& options : choices)
    CHECK(model.generate(model.prompt(some_ids(9, 96)), options).tokens == cpu.generate(cpu.prompt(some_ids(9, 96)), options).tokens);
}

TEST_CASE("sessions: turns, forks, whole sequences, cancelling and what a caller throws") {
  const Synthetic s;
  const CudaLm model = CudaLm::from_pretrained(s.directory.path());
  const Lm cpu = Lm::from_pretrained(s.directory.path());
  auto session = model.session();
  auto expected = cpu.session();
  const m2lm::GenerateOptions eight{.max_new_tokens = 8, .ignore_eos = true};
  for (int turn = 0; turn < 3; ++turn) {
    const auto ids = some_ids(4 + turn, 96, static_cast<std::uint64_t>(turn) + 1);
    CHECK(session.generate(model.prompt(ids), eight).tokens == expected.generate(cpu.prompt(ids), eight).tokens);
    CHECK(std::equal(session.history().begin(), session.history().end(), expected.history().begin(), expected.history().end()));
  }
  auto branch = session.fork();
  auto expected_branch = expected.fork();
  const auto more = some_ids(3, 96, 11);
  CHECK(branch.generate(model.prompt(more), eight).tokens == expected_branch.generate(cpu.prompt(more), eight).tokens);
  CHECK(session.generate(model.prompt(some_ids(2, 96, 12)), eight).tokens == expected.generate(cpu.prompt(some_ids(2, 96, 12)), eight).tokens);
  const auto whole = some_ids(20, 96, 13);
  CHECK(session.complete(model.prompt(whole), eight).tokens == expected.complete(cpu.prompt(whole), eight).tokens);
  // A stop token in the middle: what was computed ahead is forgotten.
  const auto tokens = model.generate(model.prompt(whole), eight).tokens;
  const m2lm::GenerateOptions stopping{.max_new_tokens = 8, .stop_tokens = {tokens[3]}, .ignore_eos = true};
  auto a = model.session();
  auto b = cpu.session();
  CHECK(a.generate(model.prompt(whole), stopping).tokens == b.generate(cpu.prompt(whole), stopping).tokens);
  CHECK(a.length() == b.length());
  CHECK(a.generate(model.prompt(more), eight).tokens == b.generate(cpu.prompt(more), eight).tokens);
  std::atomic<bool> cancel{true};
  const std::int64_t length = a.length();
  CHECK(a.generate(model.prompt(more), {.max_new_tokens = 8, .cancel = &cancel}).finish_reason == m2lm::FinishReason::cancelled);
  CHECK(a.length() > length);
  const auto scores = model.score(model.prompt(whole), std::vector<std::vector<std::int32_t>>{{5, 6}, {7}});
  const auto judged = cpu.score(cpu.prompt(whole), std::vector<std::vector<std::int32_t>>{{5, 6}, {7}});
  for (std::size_t i = 0; i < scores.size(); ++i) CHECK(scores[i].log_probability == doctest::Approx(judged[i].log_probability).epsilon(1e-4));
}

TEST_CASE("several prompts of any lengths, which end at different times, answer as alone") {
  const Synthetic s;
  const CudaLm model = CudaLm::from_pretrained(s.directory.path());
  std::vector<CudaLm::PromptType> prompts;
  for (int i = 0; i < 4; ++i) prompts.push_back(model.prompt(some_ids(3 + 5 * i, 96, static_cast<std::uint64_t>(i) + 20)));
  const auto first = model.generate(prompts[1], {.max_new_tokens = 12, .ignore_eos = true}).tokens;
  const m2lm::GenerateOptions options{.max_new_tokens = 12, .stop_tokens = {first[4], first[7]}, .ignore_eos = true};
  const auto together = model.generate(prompts, options);
  for (std::size_t i = 0; i < prompts.size(); ++i) CHECK(together[i].tokens == model.generate(prompts[i], options).tokens);
}

TEST_CASE("the context's end and a precision that the backend has not are errors with a reason") {
  const Synthetic s;
  const CudaLm model = CudaLm::from_pretrained(s.directory.path());
  auto session = model.session({.max_positions = 12});
  CHECK_THROWS_AS(session.generate(model.prompt(some_ids(6, 96)), {.max_new_tokens = 20, .ignore_eos = true}), m2lm::CapacityError);
  CHECK(session.length() == 0);
  CHECK(session.generate(model.prompt(some_ids(6, 96)), {.max_new_tokens = 7, .ignore_eos = true}).tokens.size() == 7);
  const std::string message =
      message_of<m2lm::OptionError>([&] { CudaLm::from_pretrained(s.directory.path(), CudaF32(), {.precision = in_element<Bf16>}); });
  CHECK_MESSAGE(has(message, "BasicCuda<Bf16>"), message);
}

TEST_CASE("sessions of several threads take turns on one device") {
  const Synthetic s;
  const CudaLm model = CudaLm::from_pretrained(s.directory.path());
  const m2lm::GenerateOptions options{.max_new_tokens = 10, .ignore_eos = true};
  std::vector<std::vector<std::int32_t>> expected, got(4);
  for (std::size_t i = 0; i < got.size(); ++i) expected.push_back(model.generate(model.prompt(some_ids(5, 96, i + 1)), options).tokens);
  std::vector<std::thread> threads;
  for (std::size_t i = 0; i < got.size(); ++i)
    threads.emplace_back([&, i] {
      for (int again = 0; again < 3; ++again) got[i] = model.session().generate(model.prompt(some_ids(5, 96, i + 1)), options).tokens;
    });
  for (std::thread& thread : threads) thread.join();
  CHECK(got == expected);
}

TEST_CASE("weights in blocks: what cannot be in blocks is in the type of the activations") {
  const Synthetic s;
  for (const DType format : {DType::q8, DType::q4}) {
    const CudaLm model = CudaLm::from_pretrained(s.directory.path(), CudaF32(), {.precision = Precision{.weights = format}});
    const auto exact = TextModel<Reference<double>>::from_pretrained(s.directory.path(), Reference<double>{});
    const double error = t::relative_error(model.logits(model.prompt(some_ids(9, 96))), exact.logits(exact.prompt(some_ids(9, 96))));
    // A block's step is 1/127 or 1/8 of its largest value; half a step at most is lost.
    CHECK(error < t::network_tolerance(format == DType::q8 ? 1.0 / 254 : 1.0 / 16, t::epsilon_f32, 48, 2));
    CHECK(error > 1e-4);  // they are in blocks
  }
}
