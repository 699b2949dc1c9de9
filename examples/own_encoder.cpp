// An encoder of one's own: readings of a sensor (any number of channels over time) as a modality "sensor" of a LLaMA decoder.
// The input type, the config, the encoder and the preprocessing are all in the user's namespace or about the user's types.
// To run anywhere, the program first writes a tiny checkpoint with random weights; what it says is therefore noise.
#include <m2lm/m2lm.hpp>

#include <cmath>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

#include <unistd.h>

namespace mine {

/// The input that is attached to a prompt: samples [time, channels].
struct Reading {
  std::int64_t channels = 0;
  std::vector<float> samples;
};

/// What config.json says about the encoder. The library calls read_config, found by argument-dependent lookup.
struct SensorConfig {
  std::int64_t channels = 0, width = 0, window = 0;
};
void read_config(const m2lm::ConfigValue& root, SensorConfig& config) {
  const m2lm::ConfigValue sensor = root["sensor_config"];
  config = {
      .channels = sensor.get<std::int64_t>("channels"), .width = sensor.get<std::int64_t>("width"), .window = sensor.get<std::int64_t>("window")};
}

/// Spec: every `window` samples become one token: LayerNorm, then one linear layer.
struct SensorEncoder {
  using Input = Reading;
  using Config = SensorConfig;

  template <class B, m2lm::Precision P>
  class On {
    using S = m2lm::ScalarOf<B>;
    SensorConfig config_;
    m2lm::LayerNorm<B> norm_;
    m2lm::Linear<B> embed_;

   public:
    explicit On(const SensorConfig& c) : config_(c), norm_(c.channels * c.window, 1e-5), embed_(c.channels * c.window, c.width, true) {}

    // In the checkpoint: sensor_encoder.norm.weight, sensor_encoder.embed.bias, …
    template <class V, class Self>
    static void fields(V&& visit, Self& self) {
      visit("norm", self.norm_);
      visit("embed", self.embed_);
    }
    void prepare(m2lm::Context<B>& ctx, m2lm::DType format) {
      norm_.prepare(ctx);
      embed_.prepare(ctx, format);
    }

    /// Values per output token, and how many tokens an input gives.
    std::int64_t width() const { return config_.width; }
    std::int64_t tokens(const Reading& x) const { return static_cast<std::int64_t>(x.samples.size()) / (config_.channels * config_.window); }

    /// requires features [tokens(x), width()].
    void forward(m2lm::Context<B>& ctx, const Reading& x, m2lm::Matrix<S> features) const {
      m2lm::require<m2lm::InputError>(x.channels == config_.channels, "mine::SensorEncoder: a reading of ", x.channels,
                                      " channels, the checkpoint takes ", config_.channels);
      const m2lm::Arena::Scope scope(ctx.arena);
      const m2lm::Matrix<S> windows = ctx.arena.template matrix<S>(features.extent(0), config_.channels * config_.window);
      for (std::int64_t i = 0; i < windows.elements(); ++i) windows.data()[i] = static_cast<S>(x.samples[static_cast<std::size_t>(i)]);
      norm_.forward(ctx, windows, windows);
      embed_.forward(ctx, windows, features);
    }
  };
};

}  // namespace mine

/// Optional: what happens to an input before the encoder sees it. Here: the mean is taken out.
template <>
struct m2lm::Preprocessor<mine::Reading> {
  static Preprocessor from_directory(std::string_view /*directory*/, const mine::SensorConfig&) { return {}; }
  mine::Reading operator()(mine::Reading reading) const {
    double mean = 0;
    for (const float x : reading.samples) mean += static_cast<double>(x) / static_cast<double>(reading.samples.size());
    for (float& x : reading.samples) x -= static_cast<float>(mean);
    return reading;
  }
};

using SensorModel = m2lm::Model<m2lm::Cpu, m2lm::Precision{.weights = m2lm::DType::f32}, m2lm::LlamaDecoder<>,
                                m2lm::Modality<"sensor", mine::SensorEncoder, m2lm::MlpProjector<2>>>;

namespace {

constexpr std::int32_t placeholder = 99;  // config.json's sensor_token_id: stands for "<sensor>"

/// Writes a checkpoint with random weights. The layers themselves say which tensors there are.
void write_checkpoint(const std::string& directory) {
  const std::string config = R"({
  "model_type": "llama", "vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
  "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
  "sensor_token_id": 99, "sensor_config": {"channels": 3, "width": 16, "window": 8}
})";
  m2lm::write_file(directory + "/config.json", config);

  const m2lm::ConfigValue root = m2lm::ConfigValue::parse_text(config, "config.json");
  m2lm::LlamaConfig decoder_config;
  m2lm::read_config(root, decoder_config);
  mine::SensorConfig sensor_config;
  mine::read_config(root, sensor_config);
  constexpr m2lm::Precision precision{};
  m2lm::LlamaDecoder<>::On<m2lm::Cpu, precision> decoder(decoder_config);
  mine::SensorEncoder::On<m2lm::Cpu, precision> encoder(sensor_config);
  m2lm::MlpProjector<2>::On<m2lm::Cpu, precision> projector({.input_width = encoder.width(), .output_width = decoder_config.hidden_size});

  std::vector<m2lm::NamedTensor> tensors;
  m2lm::Rng rng(3);
  const auto add = [&](std::string_view name, m2lm::Parameter& p) {
    m2lm::Tensor<float> t(p.shape);
    const bool norm_weight = p.shape.rank() == 1 && name.ends_with("weight");
    for (float& x : t.span()) x = norm_weight ? 1.0F : static_cast<float>(rng.uniform() - 0.5) / 2;
    tensors.push_back({std::string(name), m2lm::AnyTensor(std::move(t))});
  };
  m2lm::for_each_parameter(add, decoder);
  m2lm::for_each_parameter(add, encoder, "sensor_encoder");
  m2lm::for_each_parameter(add, projector, "sensor_projector");
  m2lm::write_safetensors(directory + "/model.safetensors", tensors);
}

/// Three waves, `time` samples long.
mine::Reading waves(std::int64_t time) {
  mine::Reading reading{.channels = 3, .samples = {}};
  for (std::int64_t t = 0; t < time; ++t)
    for (const double frequency : {0.1, 0.25, 0.7}) reading.samples.push_back(static_cast<float>(std::sin(frequency * static_cast<double>(t))));
  return reading;
}

}  // namespace

int main() try {
  const std::string directory = (std::filesystem::temp_directory_path() / m2lm::concat("m2lm-own-encoder-", getpid())).string();
  std::filesystem::create_directories(directory);
  write_checkpoint(directory);

  const SensorModel model = SensorModel::from_pretrained(directory);
  std::filesystem::remove_all(directory);
  // Token ids, because this checkpoint has no tokenizer; with one, "<sensor>" in the text does the same.
  auto prompt = model.prompt({1, 17, placeholder, 18, placeholder, 19});
  prompt.attach<"sensor">(waves(40)).attach<"sensor">(waves(16));

  const std::vector<std::int32_t> ids = model.input_ids(prompt);
  std::printf("the decoder sees %zu tokens: 4 of text and the readings' 5 and 2\n", ids.size());
  const m2lm::Generation answer = model.generate(prompt, {.max_new_tokens = 8, .ignore_eos = true});
  std::printf("answer:");
  for (const std::int32_t id : answer.tokens) std::printf(" %d", id);
  std::printf("\n");
  return ids.size() == 11 && answer.tokens.size() == 8 ? 0 : 1;
} catch (const std::exception& error) {
  std::fprintf(stderr, "own_encoder: %s\n", error.what());
  return 1;
}
