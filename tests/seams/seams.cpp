// The five user-side models of this folder, which bring what the library has not, against the same models in PyTorch: every hidden
// state, the logits, and an answer that is generated step by step, on Reference<double> and on Cpu.
#include "alignment.hpp"
#include "discrete_tokens.hpp"
#include "pyramid_hook.hpp"
#include "prefix_and_runs.hpp"
#include "two_widths.hpp"

#include <m2lm/testing/tolerance.hpp>

#include <doctest/doctest.h>

#include <support/environment.hpp>

#include <string>
#include <vector>

namespace {

using m2lm::AnyTensor;
using m2lm::Cpu;
using m2lm::IsaLevel;
using m2lm::Reference;
using m2lm::Safetensors;

constexpr m2lm::Precision f32{.weights = m2lm::DType::f32};

std::vector<std::int32_t> ids_of(const AnyTensor& tensor) {
  std::vector<std::int32_t> out;
  for (std::int64_t i = 0; i < tensor.shape().elements(); ++i) out.push_back(static_cast<std::int32_t>(tensor.at(i)));
  return out;
}

/// Attaches NAME.0, NAME.1, … of the golden.
template <m2lm::FixedString Name, class Prompt>
void attach(Prompt& prompt, const Safetensors& golden) {
  for (int i = 0; golden.contains(std::string(Name.view()) + "." + std::to_string(i)); ++i) {
    const AnyTensor values = golden.tensor(std::string(Name.view()) + "." + std::to_string(i));
    std::vector<float> input(static_cast<std::size_t>(values.shape().elements()));
    values.copy_to(input.data(), 0, values.shape().elements());
    prompt.template attach<Name>(std::move(input));
  }
}

/// `ids`: the prompt, given the model; `Names`: what to attach.
template <class M, m2lm::FixedString... Names, class Ids>
void check(const char* name, Ids&& ids, typename M::Backend backend = {}) {
  CAPTURE(name);
  const std::string folder = m2lm_test::source_file(std::string("tests/golden/seams/") + name);
  const M model = M::from_pretrained(folder, std::move(backend));
  const Safetensors golden = Safetensors::open(folder + "/golden.safetensors");
  auto prompt = model.prompt(std::vector<std::int32_t>(ids(model)));
  (attach<Names>(prompt, golden), ...);
  CHECK(model.input_ids(prompt) == ids_of(golden.tensor("input_ids")));

  const auto& c = model.decoder_config();
  // Two more blocks than the decoder has: encoder and projector. The judge computes in f32, so that binds Reference<double> too.
  const double tolerance =
      m2lm::testing::network_tolerance(m2lm::testing::epsilon_f32, m2lm::testing::epsilon_f32, std::max(c.hidden_size, c.intermediate_size), c.num_layers + 2);
  const auto states = model.hidden_states(prompt);
  REQUIRE(states.size() == static_cast<std::size_t>(c.num_layers + 1));
  for (std::size_t i = 0; i < states.size(); ++i) {
    const double error = m2lm::testing::relative_error(states[i], golden.tensor("hidden_states." + std::to_string(i)));
    CHECK_MESSAGE(error <= tolerance, "hidden_states.", i, ": ", error, " > ", tolerance);
  }
  const double error = m2lm::testing::relative_error(model.logits(prompt), golden.tensor("logits"));
  CHECK_MESSAGE(error <= tolerance, "logits: ", error, " > ", tolerance);

  const std::vector<std::int32_t> greedy = ids_of(golden.tensor("greedy"));
  const auto count = static_cast<std::int64_t>(greedy.size());
  CHECK(model.generate(prompt, {.max_new_tokens = count, .ignore_eos = true}).tokens == greedy);
  // In two calls of one session: what was attached before is still there.
  auto session = model.session();
  std::vector<std::int32_t> tokens = session.generate(prompt, {.max_new_tokens = 3, .ignore_eos = true}).tokens;
  CHECK(std::equal(tokens.begin(), tokens.end(), greedy.begin()));
  const auto next = model.prompt(std::vector<std::int32_t>{greedy[3]});
  tokens = session.generate(next, {.max_new_tokens = count - 4, .ignore_eos = true}).tokens;
  CHECK(tokens == std::vector<std::int32_t>(greedy.begin() + 4, greedy.end()));
}

/// On the oracle and on Cpu, at every level of this machine and with one and two threads. Inputs of weights in bf16 are not rounded to that.
template <template <class, m2lm::Precision> class M, m2lm::FixedString... Names, class Ids>
void check_everywhere(const char* name, Ids&& ids) {
  check<M<Reference<double>, f32>, Names...>(name, ids);
  for (int level = 0; level <= static_cast<int>(m2lm::default_isa()); ++level)
    for (const int threads : {1, 2}) check<M<Cpu, f32>, Names...>(name, ids, Cpu({.threads = threads, .max_isa = static_cast<IsaLevel>(level), .bf16_dot = false}));
}

using Ids = std::vector<std::int32_t>;

}  // namespace

TEST_CASE("a projector attends over the decoder's embedding table") {
  check_everywhere<lab::AlignedModel, "sound">("alignment", [](const auto&) { return Ids{1, 17, 90, 90, 5, 40, 90, 33}; });
}

TEST_CASE("a hook of the decoder reads the pyramid of an encoder") {
  check_everywhere<lab::MapModel, "map">("pyramid_hook", [](const auto&) { return Ids{1, 8, 21, 91, 60, 11, 91, 60, 11}; });
}

TEST_CASE("a modality yields ids of the decoder's own vocabulary") {
  check_everywhere<lab::CodeModel, "picture">("discrete_tokens", [](const auto&) { return Ids{1, 30, 93, 31, 93}; });
}

TEST_CASE("prefixes behind the first token, and runs of placeholders that are no tokens") {
  check_everywhere<lab::PrefixModel, "image", "sound", "video">("prefix_and_runs", [](const auto& model) {
    const std::int32_t run = model.template placeholder_id<"sound">();
    CHECK(run < 0);
    return Ids{1, 44, run, run, run, run, run, run, 45, 46, run, run, run, 47};
  });
}

TEST_CASE("two modalities of different widths, one in a precision of its own, and a head with rows of its own") {
  check_everywhere<lab::TwoModel, "near", "far">("two_widths", [](const auto&) { return Ids{1, 9, 90, 91, 91, 10, 90, 90}; });
}

TEST_CASE("what stands beside a component must be a token") {
  using Model = m2lm::Model<Cpu, f32, m2lm::LlamaDecoder<>, m2lm::Modality<"sound", lab::Rows<5>, m2lm::LinearProjector, m2lm::PrefixAfterBos<"<open>">>>;
  const std::string folder = m2lm_test::source_file("tests/golden/seams/alignment");
  CHECK_THROWS_WITH_AS(Model::from_pretrained(folder), doctest::Contains("has no token \"<open>\", which stands beside every <sound>"), m2lm::CheckpointError);
}

TEST_CASE("runs of another length than the instances are refused") {
  using Model = lab::PrefixModel<Cpu, f32>;
  const Model model = Model::from_pretrained(m2lm_test::source_file("tests/golden/seams/prefix_and_runs"));
  const std::int32_t run = model.placeholder_id<"sound">();
  auto prompt = model.prompt(Ids{1, run, run, 5});
  prompt.attach<"sound">(std::vector<float>(5));
  CHECK_THROWS_WITH_AS(model.input_ids(prompt), doctest::Contains("hold 2 <sound> placeholders, but the 1 attached (sound) have 3 rows"), m2lm::InputError);
  auto split = model.prompt(Ids{1, run, run, 5, run});
  split.attach<"sound">(std::vector<float>(5));
  CHECK_THROWS_WITH_AS(model.input_ids(split), doctest::Contains("takes 3 placeholders in a row; the token ids have 2"), m2lm::InputError);
}
