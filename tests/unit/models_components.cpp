// Several components in one model: instances of both, in any order, each where its placeholder stands; a user's own encoders, one
// with another number of tokens per input, one with a precision of its own.
#include "models_support.hpp"

namespace user {

using m2lm::Context;
using m2lm::DType;
using m2lm::Matrix;
using m2lm::Precision;

/// Rows of 32 numbers are their own features.
struct RowsEncoder {
  using Input = std::vector<float>;

  template <class B, Precision P>
  struct On {
    static std::int64_t width() { return 32; }
    static std::int64_t tokens(const Input& rows) { return static_cast<std::int64_t>(rows.size()) / 32; }
    template <class V, class Self>
    static void fields(V&&, Self&) {}
    void prepare(Context<B>&, DType) {}
    void forward(Context<B>&, const Input& rows, Matrix<m2lm::ScalarOf<B>> features) const {
      for (std::int64_t i = 0; i < features.extent(0); ++i)
        for (std::int64_t j = 0; j < 32; ++j) features(i, j) = static_cast<m2lm::ScalarOf<B>>(rows[static_cast<std::size_t>(i * 32 + j)]);
    }
  };
};

}  // namespace user

namespace {

using namespace m2lm_test;

using Two = m2lm::Model<Cpu, in_f32, m2lm::LlamaDecoder<>, m2lm::Modality<"left", user::RowsEncoder, m2lm::IdentityProjector>,
                        m2lm::With<m2lm::Modality<"right", user::RowsEncoder, m2lm::MlpProjector<1>>, Precision{.weights = DType::bf16}>>;

constexpr std::int32_t left_id = 90, right_id = 91;

std::vector<float> rows(std::int64_t count, float start) {
  std::vector<float> out(static_cast<std::size_t>(count * 32));
  for (std::size_t i = 0; i < out.size(); ++i) out[i] = start + static_cast<float>(i % 7) / 8.0F;
  return out;
}

Two load() {
  const TemporaryDirectory directory;
  m2lm::testing::write_synthetic_llama(directory.path());
  const m2lm::ConfigValue config = m2lm::ConfigValue::parse_file(directory / "config.json");
  REQUIRE(config.get<int>("hidden_size") == 32);
  std::string text = m2lm::read_file(directory / "config.json");
  text.insert(text.find('{') + 1, "\"left_token_index\": 90, \"right_token_id\": 91, ");
  directory.write("config.json", text);
  // The right projector doubles: weight 2·I.
  auto file = Safetensors::open(directory / "model.safetensors");
  std::vector<m2lm::NamedTensor> tensors;
  for (const std::string& name : file.names()) tensors.push_back({name, file.tensor(name)});
  Tensor<float> weight(Shape{32, 32}), bias(Shape{32});
  for (std::int64_t i = 0; i < 32; ++i) weight.view<2>()(i, i) = 2.0F;
  tensors.push_back({"right_projector.linear_1.weight", AnyTensor(std::move(weight))});
  tensors.push_back({"right_projector.linear_1.bias", AnyTensor(std::move(bias))});
  m2lm::write_safetensors(directory / "model.safetensors", tensors);
  return Two::from_pretrained(directory.path(), Cpu({.threads = 1}));
}

}  // namespace

TEST_CASE("instances of two components stand where their placeholders are, in any order and number") {
  const Two model = load();
  auto prompt = model.prompt(std::vector<std::int32_t>{1, right_id, 5, left_id, left_id, 6, right_id, left_id, 7});
  prompt.attach<"left">(rows(1, 0.0F)).attach<"left">(rows(3, 1.0F)).attach<"left">(rows(2, 2.0F));
  prompt.attach<"right">(rows(2, 3.0F)).attach<"right">(rows(1, 4.0F));
  const std::vector<std::int32_t> expected{1, right_id, right_id, 5, left_id, left_id, left_id, left_id, 6, right_id, left_id, left_id, 7};
  CHECK(model.input_ids(prompt) == expected);

  const auto states = model.hidden_states(prompt, std::vector<int>{0});
  const Tensor<float>& embeddings = states.front();
  const auto view = embeddings.view<2>();
  const auto check = [&](std::int64_t row, const std::vector<float>& input, std::int64_t input_row, float factor) {
    CAPTURE(row);
    for (std::int64_t j = 0; j < 32; ++j) CHECK(view(row, j) == factor * input[static_cast<std::size_t>(input_row * 32 + j)]);
  };
  check(1, rows(2, 3.0F), 0, 2.0F);  // multiples of 1/8 below 16 are exact in bf16
  check(2, rows(2, 3.0F), 1, 2.0F);
  check(4, rows(1, 0.0F), 0, 1.0F);
  for (std::int64_t i = 0; i < 3; ++i) check(5 + i, rows(3, 1.0F), i, 1.0F);
  check(9, rows(1, 4.0F), 0, 2.0F);
  for (std::int64_t i = 0; i < 2; ++i) check(10 + i, rows(2, 2.0F), i, 1.0F);

  // An answer follows; the same with the embeddings given.
  auto given = model.prompt(prompt.ids);
  for (const auto& [count, start] : {std::pair{1, 0.0F}, std::pair{3, 1.0F}, std::pair{2, 2.0F}})
    given.attach_embeddings<"left">(AnyTensor(model.encode<"left">(rows(count, start))));
  given.attach_embeddings<"right">(AnyTensor(model.encode<"right">(rows(2, 3.0F)))).attach_embeddings<"right">(AnyTensor(model.encode<"right">(rows(1, 4.0F))));
  const m2lm::GenerateOptions options{.max_new_tokens = 6, .ignore_eos = true};
  CHECK(model.generate(prompt, options).tokens == model.generate(given, options).tokens);
}

TEST_CASE("each component's placeholders are counted for themselves") {
  const Two model = load();
  auto prompt = model.prompt(std::vector<std::int32_t>{1, right_id, left_id, 7});
  prompt.attach<"left">(rows(1, 0.0F)).attach<"left">(rows(1, 0.0F));
  CHECK_THROWS_WITH_AS(model.input_ids(prompt), doctest::Contains("1 <left> placeholders, but 2 attached"), m2lm::InputError);
  auto other = model.prompt(std::vector<std::int32_t>{1, right_id, left_id, 7});
  other.attach<"left">(rows(1, 0.0F));
  CHECK_THROWS_WITH_AS(model.input_ids(other), doctest::Contains("1 <right> placeholders, but 0 attached"), m2lm::InputError);
}

TEST_CASE("a placeholder that config.json names, and the tokenizer does not, stands in text all the same") {
  using Own = m2lm::Model<Cpu, in_f32, m2lm::LlamaDecoder<>, m2lm::Modality<"left", user::RowsEncoder, m2lm::IdentityProjector>>;
  for (const bool named : {false, true}) {
    const TemporaryDirectory directory;
    m2lm::LlamaConfig config = m2lm::testing::small_llama();
    config.vocab_size = m2lm::Tokenizer::from_directory(golden("llava/with_tokenizer")).vocab_size();
    m2lm::testing::write_synthetic_llama(directory.path(), config);
    for (const char* file : {"tokenizer.model", "tokenizer_config.json", "added_tokens.json"})
      if (readable(golden(std::string("llava/with_tokenizer/") + file))) directory.write(file, m2lm::read_file(golden(std::string("llava/with_tokenizer/") + file)));
    if (named) change_text(directory, "config.json", "{", "{\"left_token_id\": 7, ");
    const Own model = Own::from_pretrained(directory.path(), Cpu({.threads = 1}));
    CHECK(model.placeholder_id<"left">() == (named ? 7 : -1));
    auto prompt = model.raw_prompt("One <left> two");
    prompt.attach<"left">(rows(3, 0.0F));
    const std::vector<std::int32_t> ids = model.input_ids(prompt), text = model.tokenizer().encode("One ", true);
    CHECK(std::equal(text.begin(), text.end(), ids.begin()));
    CHECK(std::count(ids.begin(), ids.end(), model.placeholder_id<"left">()) == 3);
    CHECK(ids[text.size()] == model.placeholder_id<"left">());
  }
}
