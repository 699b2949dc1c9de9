// Models with weights in 8 and 4 bits: what is packed in what, what it takes, and that the bits depend on nothing else.
#include "models_support.hpp"

#include <cmath>
#include <cstdio>
#include <string>

namespace {

using namespace m2lm_test;

constexpr DType block_formats[] = {DType::q8, DType::q4, DType::q4_128, DType::w8a8};

Lm load(const std::string& directory, const Precision& precision, int threads = 2) {
  return Lm::from_pretrained(directory, Cpu({.threads = threads}), {.precision = precision});
}

/// |a - b| / |b| of all elements together.
double relative_distance(const Tensor<float>& a, const Tensor<float>& b) {
  REQUIRE(a.shape() == b.shape());
  double difference = 0, norm = 0;
  for (std::int64_t i = 0; i < a.elements(); ++i) {
    const double x = static_cast<double>(a.data()[i]), y = static_cast<double>(b.data()[i]);
    difference += (x - y) * (x - y);
    norm += y * y;
  }
  return std::sqrt(difference / norm);
}

std::vector<std::int32_t> some_ids(std::int64_t count, std::int64_t vocabulary) {
  std::vector<std::int32_t> ids;
  for (std::int64_t i = 0; i < count; ++i) ids.push_back(static_cast<std::int32_t>((i * 37 + 11) % vocabulary));
  return ids;
}

TEST_CASE("weights in blocks: near the model in f32, and the same bits alone, in a batch, on any number of threads") {
  const TemporaryDirectory directory;
  m2lm::testing::write_synthetic_llama(directory.path());
  const std::vector<std::int32_t> ids = some_ids(40, 96);
  const Lm exact = load(directory.path(), in_f32);
  const Tensor<float> wanted = exact.logits(exact.prompt(ids));
  for (const DType format : block_formats) {
    CAPTURE(m2lm::dtype_name(format));
    const Lm model = load(directory.path(), {.weights = format});
    const Tensor<float> logits = model.logits(model.prompt(ids));
    const double distance = relative_distance(logits, wanted);
    std::printf("%s: logits of a random model differ by %.3g of their norm\n", std::string(m2lm::dtype_name(format)).c_str(), distance);
    // A step is 1/127 or 1/8 of a block's largest value (2.2 deviations): rounding is noise of 1 % (weights and inputs) or 8 % of a product's
    // norm, and eight products follow each other in the two layers. What is wrong differs by the whole norm or more.
    const bool in_bytes = format == DType::q8 || format == DType::w8a8;
    CHECK(distance < (in_bytes ? 0.08 : 0.7));
    CHECK(distance > (in_bytes ? 0.01 : 0.08));
    const Lm alone = load(directory.path(), {.weights = format}, 1), four = load(directory.path(), {.weights = format}, 4);
    CHECK(same_bits(alone.logits(alone.prompt(ids)), logits));
    CHECK(same_bits(four.logits(four.prompt(ids)), logits));
    // Step by step, each token alone: the greedy run is what the rows of one pass say. Where a prompt rounds otherwise than a step, by about 2 % of
    // the logits' norm, nearly so: a token that the rows do not choose is within four deviations of that, on both sides, of the one they do.
    const bool otherwise = model.backend().kernels().format(format, m2lm::Phase::prefill) != model.backend().kernels().format(format);
    const m2lm::Generation told = model.generate(model.prompt(ids), {.max_new_tokens = 20, .ignore_eos = true});
    std::vector<std::int32_t> all = ids;
    all.insert(all.end(), told.tokens.begin(), told.tokens.end());
    const Tensor<float> rows = model.logits(model.prompt(all));
    for (std::size_t i = 0; i < told.tokens.size(); ++i) {
      const float* row = rows.data() + static_cast<std::int64_t>(ids.size() + i - 1) * 96;
      const float largest = *std::max_element(row, row + 96);
      double squares = 0;
      for (std::int64_t j = 0; j < 96; ++j) squares += std::pow(static_cast<double>(row[j]), 2);
      const double near = otherwise ? 8 * 0.02 * std::sqrt(squares / 96) : 0;
      CHECK(static_cast<double>(largest - row[told.tokens[i]]) <= near);
      // The first token comes from the prompt's last row in both.
      if (i == 0) CHECK(row[told.tokens[i]] == largest);
    }
  }
}

TEST_CASE("weights in blocks are the decoder's and its head's: encoder, projector and KV cache inherit bf16") {
  const TemporaryDirectory directory;
  m2lm::testing::write_synthetic_llava(directory.path());
  const m2lm::Image picture = [] {
    m2lm::Image image{.width = 28, .height = 28, .pixels = {}};
    for (std::size_t i = 0; i < 28 * 28 * 3; ++i) image.pixels.push_back(static_cast<std::uint8_t>(i * 7 % 256));
    return image;
  }();
  const auto load_vlm = [&](const Precision& precision) { return Vlm::from_pretrained(directory.path(), Cpu({.threads = 2}), {.precision = precision}); };
  const auto logits = [&](const Vlm& model) {
    auto prompt = model.prompt(std::vector<std::int32_t>{1, 95, 5, 6, 7});
    prompt.attach<"image">(picture);
    return model.logits(prompt);
  };
  const auto plain = load_vlm({.weights = DType::bf16}).encode<"image">(picture);
  for (const DType format : block_formats) {
    const Vlm model = load_vlm({.weights = format});
    CHECK(same_bits(model.encode<"image">(picture), plain));
    const Vlm spelled_out = load_vlm({.weights = format, .encoders = DType::bf16, .projectors = DType::bf16, .lm_head = format, .kv_cache = DType::bf16});
    CHECK(same_bits(logits(model), logits(spelled_out)));
    const Vlm other_head = load_vlm({.weights = format, .lm_head = DType::f32});
    CHECK_FALSE(same_bits(logits(model), logits(other_head)));
    const Vlm other_cache = load_vlm({.weights = format, .kv_cache = DType::f32});
    CHECK_FALSE(same_bits(logits(model), logits(other_cache)));
    // Asked for, an encoder in blocks is one.
    CHECK_FALSE(same_bits(load_vlm({.weights = format, .encoders = format}).encode<"image">(picture), plain));
    CHECK(message_of<m2lm::OptionError>([&] { load_vlm({.weights = DType::bf16, .kv_cache = format}); }).find("KV cache") != std::string::npos);
  }
}

TEST_CASE("the memory that packed blocks take is what is counted") {
  const TemporaryDirectory directory;
  m2lm::LlamaConfig config = m2lm::testing::small_llama();
  config.hidden_size = 128;  // 4 heads of 32, 2 of keys and values
  config.head_dim = 32;
  config.intermediate_size = 320;
  config.vocab_size = 512;
  m2lm::testing::write_synthetic_llama(directory.path(), config);
  const std::int64_t matrices = 2 * (128 * 128 * 2 + 64 * 128 * 2 + 3 * 320 * 128) + 512 * 128, vectors = 5 * 128;
  for (const auto& [format, bytes_of_32] : {std::pair<DType, std::int64_t>{DType::q4, 18}, {DType::q8, 34}, {DType::bf16, 64}, {DType::f32, 128}}) {
    const auto needed = static_cast<std::size_t>(matrices / 32 * bytes_of_32 + vectors * 4);
    const auto with_limit = [&](std::size_t limit) { Lm::from_pretrained(directory.path(), Cpu({.threads = 1}), {.precision = Precision{.weights = format}, .memory_limit = limit}); };
    CHECK_NOTHROW(with_limit(needed));
    CHECK(message_of<m2lm::CapacityError>([&] { with_limit(needed - 1); }).find(std::string("memory in ") + std::string(m2lm::dtype_name(format))) != std::string::npos);
  }
}

TEST_CASE("a GGUF model with blocks of 4 and 8 bits keeps its mix, unless f32 or fewer bits are asked for") {
  const std::string path = asset_file("llama/stories15M-Q4_0.gguf");
  M2LM_SKIP_WITHOUT(path);
  const m2lm::Checkpoint file = m2lm::Checkpoint::open(path);
  REQUIRE(file.find("model.layers.0.mlp.up_proj.weight")->dtype() == DType::q4);
  REQUIRE(file.find("model.layers.0.self_attn.q_proj.weight")->dtype() == DType::q4);
  REQUIRE(file.find("lm_head.weight")->dtype() == DType::q8);
  const std::vector<std::int32_t> ids = some_ids(30, 32000);
  const auto logits = [&](const Precision& precision) {
    const Lm model = load(path, precision);
    return model.logits(model.prompt(ids));
  };
  const Tensor<float> kept = logits({.weights = DType::bf16});
  CHECK(same_bits(kept, logits({.weights = DType::q4, .lm_head = DType::q8})));
  CHECK(same_bits(kept, logits({.weights = DType::q8, .kv_cache = DType::bf16})));
  CHECK_FALSE(same_bits(kept, logits({.weights = DType::q4})));
  // The same values in f32: all that differs is the rounding of what enters the products, and the cache.
  const double distance = relative_distance(kept, logits(in_f32));
  std::printf("stories15M-Q4_0: logits differ by %.3g of their norm from those in f32\n", distance);
  CHECK(distance < 0.05);
}

}  // namespace
