// m2lm-bench: how fast a model is on this machine, beside what the machine can do at most.
#include "../bench/limits.hpp"
#include "common.hpp"

#include <m2lm/testing/synthetic.hpp>

#include <cmath>
#include <cstdlib>
#include <functional>
#include <iostream>
#include <memory>
#include <optional>

namespace {

namespace fs = std::filesystem;
using program::Stopwatch;

struct BenchOptions {
  std::string model, random, write_checkpoint, precision = "bf16", encoders, isa, dump;
  std::vector<std::int64_t> prompt{512}, tokens{128}, depth{0}, lengths;
  std::vector<std::int32_t> ids;
  std::int64_t batch = 1, text_tokens = 33;
  int threads = 0, repetitions = 5;
  bool clip = false, picture = false, json = false, interactive = false;
  std::int64_t hidden = 0, intermediate = 0, layers = 0, heads = 0, kv_heads = 0, vocabulary = 0;  // 0: as --random says
};

// ---- random checkpoints -----------------------------------------------------------------------------------------------------

m2lm::LlamaConfig llama_1b() {
  m2lm::LlamaConfig c;
  c.vocab_size = 32000;
  c.hidden_size = 2048;
  c.intermediate_size = 5632;
  c.num_layers = 22;
  c.num_heads = 32;
  c.num_kv_heads = 4;
  c.max_position_embeddings = 8192;
  c.rms_norm_eps = 1e-5;
  return c;
}

m2lm::ClipVisionConfig clip_l14_336() {
  m2lm::ClipVisionConfig c;
  c.hidden_size = 1024;
  c.intermediate_size = 4096;
  c.num_layers = 24;
  c.num_heads = 16;
  c.image_size = 336;
  c.patch_size = 14;
  c.projection_dim = 768;
  return c;
}

/// Dims that are given take the place of `config`'s.
template <class Config>
void replace_dims(const BenchOptions& o, Config& config) {
  const auto replace = [](std::int64_t given, std::int64_t& value) {
    if (given > 0) value = given;
  };
  replace(o.hidden, config.hidden_size);
  replace(o.intermediate, config.intermediate_size);
  replace(o.layers, config.num_layers);
  replace(o.heads, config.num_heads);
  if (config.hidden_size % config.num_heads != 0)
    throw program::UsageError(m2lm::concat("--hidden ", config.hidden_size, " is not a multiple of --heads ", config.num_heads));
}

/// Weights in bf16, as the checkpoints of today are.
void write_random(const BenchOptions& o, const std::string& directory) {
  fs::create_directories(directory);
  if (o.random == "clip-l14-336") {
    m2lm::ClipVisionConfig vision = clip_l14_336();
    replace_dims(o, vision);
    m2lm::testing::write_synthetic_clip(directory, vision, 1, m2lm::DType::bf16);
    return;
  }
  m2lm::LlamaConfig text = llama_1b();
  replace_dims(o, text);
  if (o.kv_heads > 0) text.num_kv_heads = o.kv_heads;
  if (o.vocabulary > 0) text.vocab_size = o.vocabulary;
  if (text.num_heads % text.num_kv_heads != 0)
    throw program::UsageError(m2lm::concat("--heads ", text.num_heads, " is not a multiple of --kv-heads ", text.num_kv_heads));
  text.head_dim = text.hidden_size / text.num_heads;
  if (o.random == "llava-1.1b")
    m2lm::testing::write_synthetic_llava(directory, text, clip_l14_336(), 1, m2lm::DType::bf16);
  else
    m2lm::testing::write_synthetic_llama(directory, text, 1, m2lm::DType::bf16);
}

/// A checkpoint that is there for one run.
class TemporaryCheckpoint {
  std::string path_;

 public:
  explicit TemporaryCheckpoint(const BenchOptions& o) : path_((fs::temp_directory_path() / "m2lm-bench-XXXXXX").string()) {
    if (mkdtemp(path_.data()) == nullptr) throw m2lm::InputError(m2lm::concat("no directory can be made in ", fs::temp_directory_path().string()));
    write_random(o, path_);
  }
  ~TemporaryCheckpoint() {
    std::error_code ignored;
    fs::remove_all(path_, ignored);
  }
  TemporaryCheckpoint(const TemporaryCheckpoint&) = delete;
  TemporaryCheckpoint& operator=(const TemporaryCheckpoint&) = delete;
  const std::string& path() const { return path_; }
};

// ---- what is timed ----------------------------------------------------------------------------------------------------------

/// One thing that is timed: `run` does it once and returns the seconds.
struct Test {
  std::string name;
  std::int64_t tokens = 0, depth = 0, batch = 1;  ///< tokens: of all sequences together
  std::function<double()> run;
  std::vector<double> seconds{};

  std::string title() const {
    std::string text = m2lm::concat(name, " ", tokens / batch);
    if (depth > 0) text += m2lm::concat(" behind ", depth);
    if (batch > 1) text += m2lm::concat(", ", batch, " sequences");
    return text;
  }
};

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const std::size_t half = values.size() / 2;
  return values.size() % 2 == 1 ? values[half] : (values[half - 1] + values[half]) / 2;
}

/// Ids without meaning, the same in every run; `variant` changes the first, so that nothing behind it is found in a cache.
std::vector<std::int32_t> random_ids(std::int64_t count, std::int64_t vocabulary, std::uint64_t variant = 0) {
  m2lm::Rng rng(7);
  std::vector<std::int32_t> ids;
  for (std::int64_t i = 0; i < count; ++i) ids.push_back(static_cast<std::int32_t>(rng.next() % static_cast<std::uint64_t>(vocabulary)));
  if (!ids.empty()) ids[0] = static_cast<std::int32_t>((static_cast<std::uint64_t>(ids[0]) + variant) % static_cast<std::uint64_t>(vocabulary));
  return ids;
}

/// A picture of noise, another for each `variant`.
m2lm::Image random_image(std::uint64_t variant) {
  constexpr std::int64_t side = 336;
  m2lm::Image image{.width = side, .height = side, .pixels = std::vector<std::uint8_t>(static_cast<std::size_t>(3 * side * side))};
  m2lm::Rng rng(variant);
  for (std::uint8_t& value : image.pixels) value = static_cast<std::uint8_t>(rng.next());
  return image;
}

/// What is loaded, and what can be timed with it.
struct Loaded {
  double load_seconds = 0, first_token_seconds = 0;  ///< both from the beginning of loading
  std::vector<Test> tests{};
  std::function<void(const std::string&)> dump{};  ///< writes what the model computes, to be compared
};

/// `m` computes `count` tokens behind the first `depth`, which the session keeps, and then chooses one.
template <class M>
std::function<double()> time_prefill(const M& m, std::int64_t count, std::int64_t depth) {
  struct State {
    typename M::Session session;
    std::vector<std::int32_t> before;
    std::uint64_t round = 0;
  };
  auto state = std::make_shared<State>(
      State{m.session({.max_positions = depth + count + 1}), random_ids(depth, m.decoder_config().vocab_size)});
  return [m, count, depth, state] {
    const std::int64_t vocabulary = m.decoder_config().vocab_size;
    if (depth > 0 && state->round == 0) state->session.complete(m.prompt(state->before), {.max_new_tokens = 0});
    std::vector<std::int32_t> ids = state->before;
    const std::vector<std::int32_t> own = random_ids(count, vocabulary, ++state->round);
    ids.insert(ids.end(), own.begin(), own.end());
    const auto prompt = m.prompt(std::move(ids));
    const Stopwatch watch;
    state->session.complete(prompt, {.max_new_tokens = 1});
    return watch.seconds();
  };
}

/// `m` chooses `count` tokens behind `depth` others, one by one.
template <class M>
std::function<double()> time_decode(const M& m, std::int64_t count, std::int64_t depth) {
  const std::int64_t before = std::max<std::int64_t>(depth, 1);
  auto session = std::make_shared<typename M::Session>(m.session({.max_positions = before + count + 1}));
  const auto prompt = m.prompt(random_ids(before, m.decoder_config().vocab_size));
  return [m, count, session, prompt] { return session->complete(prompt, {.max_new_tokens = count + 1, .ignore_eos = true}).timings.decode_seconds; };
}

/// The same for several sequences at once, each behind a number of tokens of its own.
template <class M>
std::function<double()> time_batch(const M& m, std::int64_t count, const std::vector<std::int64_t>& lengths) {
  std::vector<typename M::PromptType> prompts;
  for (const std::int64_t length : lengths) prompts.push_back(m.prompt(random_ids(length, m.decoder_config().vocab_size, prompts.size())));
  return [m, count, prompts] { return m.generate(prompts, {.max_new_tokens = count + 1, .ignore_eos = true}).front().timings.decode_seconds; };
}

m2lm::LoadOptions load_options(const BenchOptions& o) {
  m2lm::Precision precision{.weights = program::precision_of(o.precision)};
  if (!o.encoders.empty()) precision.encoders = precision.projectors = program::precision_of(o.encoders);
  return {.precision = precision, .media_cache_bytes = 0};
}

template <class M>
void write_logits(const M& m, const BenchOptions& o, const std::string& path) {
  const std::vector<std::int32_t> ids = o.ids.empty() ? random_ids(o.prompt.front(), m.decoder_config().vocab_size) : o.ids;
  m2lm::Tensor<std::int32_t> shown(m2lm::Shape{static_cast<std::int64_t>(ids.size())});
  std::copy(ids.begin(), ids.end(), shown.data());
  std::vector<m2lm::NamedTensor> tensors;
  tensors.push_back({"input_ids", m2lm::AnyTensor(std::move(shown))});
  tensors.push_back({"logits", m2lm::AnyTensor(m.logits(m.prompt(ids)))});
  m2lm::write_safetensors(path, tensors);
}

Loaded load_decoder(const BenchOptions& o, const std::string& directory, const m2lm::Cpu& cpu) {
  using M = program::TextModel;
  Loaded out;
  const Stopwatch watch;
  const M m = M::from_pretrained(directory, cpu, load_options(o));
  out.load_seconds = watch.seconds();
  m.generate(m.prompt(random_ids(1, m.decoder_config().vocab_size)), {.max_new_tokens = 1});
  out.first_token_seconds = watch.seconds();
  if (o.batch > 1 || !o.lengths.empty()) {
    std::vector<std::int64_t> lengths = o.lengths;
    if (lengths.empty()) lengths.assign(static_cast<std::size_t>(o.batch), std::max<std::int64_t>(o.depth.front(), 1));
    const auto sequences = static_cast<std::int64_t>(lengths.size());
    for (const std::int64_t n : o.tokens)
      if (n > 0) out.tests.push_back({.name = "decode", .tokens = n * sequences, .depth = *std::max_element(lengths.begin(), lengths.end()), .batch = sequences,
                                      .run = time_batch(m, n, lengths)});
  } else {
    for (const std::int64_t depth : o.depth) {
      for (const std::int64_t p : o.prompt)
        if (p > 0) out.tests.push_back({.name = "prefill", .tokens = p, .depth = depth, .run = time_prefill(m, p, depth)});
      for (const std::int64_t n : o.tokens)
        if (n > 0) out.tests.push_back({.name = "decode", .tokens = n, .depth = depth, .run = time_decode(m, n, depth)});
    }
  }
  out.dump = [m, &o](const std::string& path) { write_logits(m, o, path); };
  return out;
}

/// A picture and text in, a token out.
Loaded load_picture(const BenchOptions& o, const std::string& directory, const m2lm::Cpu& cpu) {
  using M = program::Vlm;
  Loaded out;
  const Stopwatch watch;
  const M m = M::from_pretrained(directory, cpu, load_options(o));
  out.load_seconds = watch.seconds();
  std::vector<std::int32_t> ids = random_ids(o.text_tokens, m.placeholder_id<"image">());  // below the placeholder
  ids.insert(ids.begin() + (ids.empty() ? 0 : 1), m.placeholder_id<"image">());
  auto round = std::make_shared<std::uint64_t>(0);
  const auto run = [m, ids, round] {
    auto prompt = m.prompt(ids);
    prompt.attach<"image">(random_image(++*round));
    const Stopwatch one;
    m.generate(prompt, {.max_new_tokens = 1});
    return one.seconds();
  };
  run();
  out.first_token_seconds = watch.seconds();
  out.tests.push_back({.name = "picture", .tokens = o.text_tokens, .run = run});
  out.dump = [m, &o](const std::string& path) { write_logits(m, o, path); };
  return out;
}

/// The vision encoder alone, of a LLaVA or a CLIP checkpoint: features of normalised pixels.
Loaded load_clip(const BenchOptions& o, const std::string& directory, const m2lm::Cpu& cpu) {
  using Encoder = m2lm::ClipVit<>::On<m2lm::Cpu, m2lm::Precision{}>;
  struct State {
    m2lm::Cpu cpu;
    m2lm::Arena arena{};
    Encoder encoder;
    m2lm::Tensor<float> pixels, features;
  };
  const Stopwatch watch;
  const m2lm::ConfigValue config = m2lm::ConfigValue::parse_file(m2lm::join_path(directory, "config.json"));
  m2lm::ClipVisionConfig vision;
  read_config(config, vision);
  Encoder encoder(vision);
  const m2lm::Checkpoint checkpoint = m2lm::Checkpoint::open(directory);
  m2lm::require_complete(m2lm::load_parameters(encoder, checkpoint, "vision_tower"), directory);
  const std::int64_t rows = encoder.tokens(), width = encoder.width();
  auto state = std::make_shared<State>(
      State{.cpu = cpu, .encoder = std::move(encoder),
            .pixels = m2lm::Tensor<float>(m2lm::Shape{vision.num_channels, vision.image_size, vision.image_size}),
            .features = m2lm::Tensor<float>(m2lm::Shape{rows, width})});
  m2lm::Context<m2lm::Cpu> ctx{state->cpu, state->arena};
  state->encoder.prepare(ctx, program::precision_of(o.precision));
  checkpoint.release_pages();
  Loaded out;
  out.load_seconds = watch.seconds();
  m2lm::Rng rng(7);
  for (float& value : state->pixels.span()) value = static_cast<float>((rng.uniform() - 0.5) * 3.4);  // a picture's range and deviation
  const auto run = [state] {
    m2lm::Context<m2lm::Cpu> here{.backend = state->cpu, .arena = state->arena, .phase = m2lm::Phase::prefill};
    const Stopwatch one;
    state->encoder.forward(here, state->pixels, state->features.view<2>());
    return one.seconds();
  };
  run();
  out.first_token_seconds = watch.seconds();
  out.tests.push_back({.name = "clip", .tokens = rows, .run = run});
  out.dump = [state](const std::string& path) {
    std::vector<m2lm::NamedTensor> tensors;
    tensors.push_back({"pixels", m2lm::AnyTensor(state->pixels.clone())});
    tensors.push_back({"features", m2lm::AnyTensor(state->features.clone())});
    m2lm::write_safetensors(path, tensors);
  };
  return out;
}

// ---- what is printed --------------------------------------------------------------------------------------------------------

/// The processor, and what its kernels and its memory can do at most.
class Machine {
  struct Peak {
    const char* name;
    limits::Products kind;
    double rate = 0;  ///< of one core, 10^9 operations per second
  };
  m2lm::Cpu cpu_;
  limits::Reader reader_;
  Peak peaks_[5] = {{"f32", limits::Products::f32}, {"bf16_dot", limits::Products::bf16_dot}, {"int8_dot", limits::Products::int8_dot},
                    {"amx_bf16", limits::Products::amx_bf16}, {"amx_int8", limits::Products::amx_int8}};
  static constexpr std::int64_t read_bytes = std::int64_t{1} << 28;

  static std::string processor() {
    std::FILE* file = std::fopen("/proc/cpuinfo", "r");
    std::string name = "unknown", family;
    if (file == nullptr) return name;
    char line[256], value[200];
    while (std::fgets(line, sizeof(line), file) && family.empty()) {
      if (std::sscanf(line, "cpu family : %199[^\n]", value) == 1 || std::sscanf(line, "cpu family\t: %199[^\n]", value) == 1) family = value;
      if (std::sscanf(line, "model name : %199[^\n]", value) == 1) name = value;
    }
    // The family stands before the name.
    while (name == "unknown" && std::fgets(line, sizeof(line), file))
      if (std::sscanf(line, "model name : %199[^\n]", value) == 1) name = value;
    std::fclose(file);
    return family.empty() ? name : m2lm::concat(name, " (family ", family, ")");
  }

 public:
  explicit Machine(const m2lm::Cpu& cpu) : cpu_(cpu), reader_(cpu_.pool(), read_bytes) {
    for (Peak& p : peaks_) p.rate = limits::peak(p.kind, cpu_.isa());
  }
  double probe() { return reader_.gigabytes_per_second(); }

  void write(m2lm::JsonWriter& json) {
    json.key("machine").begin_object().member("processor", processor()).member("level", m2lm::isa_name(cpu_.isa()));
    json.member("cores", m2lm::ThreadPool::available_cores()).member("threads", cpu_.threads()).key("peak_gops_of_one_core").begin_object();
    for (const Peak& p : peaks_)
      if (p.rate > 0) json.member(p.name, p.rate);
    json.end_object().member("read_gb_per_second", probe()).end_object();
  }
  void print() {
    std::printf("%s, level %s, %d of %d cores\n", processor().c_str(), std::string(m2lm::isa_name(cpu_.isa())).c_str(), cpu_.threads(),
                m2lm::ThreadPool::available_cores());
    std::printf("one core at its best, 10^9 operations per second:");
    for (const Peak& p : peaks_)
      if (p.rate > 0) std::printf("  %s %.0f", p.name, p.rate);
    std::printf("\nreading memory: %.1f GB/s\n", probe());
  }
};

void write_test(m2lm::JsonWriter& json, const Test& t) {
  json.member("test", t.name).member("tokens", t.tokens).member("depth", t.depth).member("batch", t.batch);
}

/// Waits for a line before each round, so that rounds of several processes can be taken in turns: an empty line asks for all tests, another
/// for those of that name.
void run_interactively(std::vector<Test>& tests, Machine& machine) {
  std::string line;
  while (std::getline(std::cin, line)) {
    m2lm::JsonWriter json;
    json.begin_object().member("read_gb_per_second", machine.probe()).key("results").begin_array();
    for (const Test& t : tests) {
      if (!line.empty() && line != t.name) continue;
      const double seconds = t.run();
      json.begin_object();
      write_test(json, t);
      json.member("seconds", seconds).member("tokens_per_second", static_cast<double>(t.tokens) / seconds).end_object();
    }
    json.end_array().member("peak_memory_bytes", program::peak_memory());
    program::print_line(json.end_object().text());
  }
}

void run_rounds(const BenchOptions& o, std::vector<Test>& tests, Machine& machine) {
  for (Test& t : tests) t.run();  // warms up
  std::vector<double> probes;
  for (int i = 0; i < o.repetitions; ++i) {
    probes.push_back(machine.probe());
    for (Test& t : tests) t.seconds.push_back(t.run());
  }
  if (!o.json) std::printf("%-44s %12s %12s %10s\n", "", "tokens/s", "seconds", "spread");
  for (const Test& t : tests) {
    const double middle = median(t.seconds), rate = static_cast<double>(t.tokens) / middle;
    if (o.json) {
      m2lm::JsonWriter json;
      json.begin_object();
      write_test(json, t);
      json.member("seconds", middle).member("tokens_per_second", rate).key("rounds").begin_array();
      for (const double s : t.seconds) json.value(s);
      program::print_line(json.end_array().member("read_gb_per_second", median(probes)).end_object().text());
    } else {
      const auto [least, most] = std::minmax_element(t.seconds.begin(), t.seconds.end());
      std::printf("%-44s %12.2f %12.4f %9.1f%%\n", t.title().c_str(), rate, middle, (*most - *least) / middle * 100);
    }
  }
  if (!o.json) std::printf("reading memory meanwhile: %.1f GB/s; most memory: %.0f MiB\n", median(probes), static_cast<double>(program::peak_memory()) / (1 << 20));
}

int bench(const BenchOptions& o) {
  if (!o.isa.empty()) setenv("M2LM_MAX_ISA", o.isa.c_str(), 1);
  if (!o.write_checkpoint.empty()) {
    if (o.random.empty()) throw program::UsageError("--write-checkpoint writes what --random says");
    write_random(o, o.write_checkpoint);
    return 0;
  }
  if (o.model.empty() == o.random.empty()) throw program::UsageError("give either --model or --random");
  std::optional<TemporaryCheckpoint> temporary;
  if (o.model.empty()) temporary.emplace(o);
  const std::string& directory = temporary ? temporary->path() : o.model;
  const m2lm::Cpu cpu{{.threads = o.threads}};

  const bool clip = o.clip || o.random == "clip-l14-336";
  Loaded loaded = clip ? load_clip(o, directory, cpu) : o.picture ? load_picture(o, directory, cpu) : load_decoder(o, directory, cpu);
  const std::size_t memory_of_loading = program::peak_memory();
  if (!o.dump.empty()) loaded.dump(o.dump);
  Machine machine(cpu);
  if (o.json || o.interactive) {
    m2lm::JsonWriter json;
    json.begin_object();
    machine.write(json);
    json.member("model", o.model.empty() ? o.random : o.model).member("precision", o.precision);
    json.member("load_seconds", loaded.load_seconds).member("first_token_seconds", loaded.first_token_seconds);
    json.member("peak_memory_bytes", memory_of_loading);
    program::print_line(json.end_object().text());
  } else {
    machine.print();
    std::printf("%s in %s: loaded in %.3f s, first token after %.3f s, %.0f MiB\n", o.model.empty() ? o.random.c_str() : o.model.c_str(), o.precision.c_str(),
                loaded.load_seconds, loaded.first_token_seconds, static_cast<double>(memory_of_loading) / (1 << 20));
  }
  if (o.interactive)
    run_interactively(loaded.tests, machine);
  else
    run_rounds(o, loaded.tests, machine);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Times a model: prefill, decoding, encoding a picture, loading.", "m2lm-bench");
  BenchOptions o;
  program::add_version(app);
  app.add_option("--model", o.model, "Directory of a Hugging Face checkpoint, or a GGUF file; no tokenizer is needed")->type_name("DIR");
  app.add_option("--random", o.random, "Random weights of a model's dims instead")->check(CLI::IsMember({"llama-1.1b", "clip-l14-336", "llava-1.1b"}));
  app.add_option("--write-checkpoint", o.write_checkpoint, "Write what --random says to this directory, in bf16, and end")->type_name("DIR");
  program::add_precision(app, o.precision);
  program::add_precision(app, o.encoders, "--encoders", "Format of an encoder's and a projector's weights; without it --precision, and bf16 beside integers");
  app.add_option("--threads", o.threads, "Threads to work with; 0 = one per core")->check(CLI::Range(0, 1024))->type_name("N");
  app.add_option("--isa", o.isa, "Highest instruction-set level to use, as M2LM_MAX_ISA")->type_name("LEVEL");

  CLI::Option_group* tests = app.add_option_group("What is timed");
  const auto count = [&](CLI::Option* option) { option->check(CLI::Range(0, 1 << 24))->type_name("N"); };
  count(tests->add_option("-p,--prompt", o.prompt, "Tokens of a prompt, up to the first token of the answer; several with commas; 0 = none")
            ->delimiter(',')
            ->capture_default_str());
  count(tests->add_option("-n,--tokens", o.tokens, "Tokens of an answer; several with commas; 0 = none")->delimiter(',')->capture_default_str());
  count(tests->add_option("--depth", o.depth, "Tokens that stand before; several with commas")->delimiter(',')->capture_default_str());
  tests->add_option("--batch", o.batch, "Answers that are decoded together")->check(CLI::Range(1, 4096))->type_name("N")->capture_default_str();
  tests->add_option("--lengths", o.lengths, "The same, with a length of its own for each prompt: L,L,…")->delimiter(',')->check(CLI::Range(1, 1 << 24));
  tests->add_flag("--clip", o.clip, "The vision encoder alone");
  tests->add_flag("--picture", o.picture, "A picture and --text-tokens in, a token out");
  tests->add_option("--text-tokens", o.text_tokens, "Tokens beside the picture")->check(CLI::Range(0, 1 << 20))->type_name("N")->capture_default_str();
  tests->add_option("-r,--repetitions", o.repetitions, "Rounds; the median is shown")->check(CLI::Range(1, 100000))->type_name("N")->capture_default_str();

  CLI::Option_group* dims = app.add_option_group("Dims instead of those of --random");
  const auto dim = [&](const char* name, std::int64_t& value) { dims->add_option(name, value)->check(CLI::Range(1, 1 << 24))->type_name("N"); };
  dim("--hidden", o.hidden);
  dim("--intermediate", o.intermediate);
  dim("--layers", o.layers);
  dim("--heads", o.heads);
  dim("--kv-heads", o.kv_heads);
  dim("--vocabulary", o.vocabulary);

  CLI::Option_group* output = app.add_option_group("Output");
  output->add_flag("--json", o.json, "One JSON object per line: the machine, then each test");
  output->add_flag("--interactive", o.interactive, "Wait for a line before each round, and print each round as one line of JSON");
  output->add_option("--dump", o.dump, "Write what the model computes to this safetensors file: input_ids and logits, or pixels and features")->type_name("FILE");
  output->add_option("--ids", o.ids, "--dump: of these tokens instead of random ones: ID,ID,…")->delimiter(',')->check(CLI::Range(0, 1 << 30));

  return program::run(app, argc, argv, [&] { return bench(o); });
}
