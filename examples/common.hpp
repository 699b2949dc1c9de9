// What the programs share: options, the place of the default model, progress, streaming, timings, JSON, exit codes.
// Exit codes: 0; 1 when a file, a model or an input cannot be used; 2 for a wrong command line; 130 after an interrupt.
#pragma once

#include "models.hpp"

#include <CLI/CLI.hpp>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <new>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <unistd.h>

namespace program {

inline constexpr int bad_input = 1, bad_usage = 2, interrupted = 130;

/// LLaMA or Mistral without pictures.
using TextModel = m2lm::Model<m2lm::Cpu, m2lm::Precision{.weights = m2lm::DType::bf16}, m2lm::LlamaDecoder<>>;

/// What is wrong with the command line, found after the parser has accepted each option.
class UsageError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// Options of every program.
struct Options {
  std::string program, model, packed_cache, precision = "bf16", device = "cpu", template_name, dump;
  int threads = 0;
  bool json = false, timings = false, check = false;
  m2lm::GenerateOptions generate{};
};

inline void add_version(CLI::App& app) {
  app.set_version_flag("--version", m2lm::concat(app.get_name(), " ", M2LM_VERSION_MAJOR, ".", M2LM_VERSION_MINOR, ".", M2LM_VERSION_PATCH));
}

/// What --precision may say.
inline constexpr m2lm::DType precisions[] = {m2lm::DType::f32, m2lm::DType::bf16, m2lm::DType::q8, m2lm::DType::q4, m2lm::DType::q4_128, m2lm::DType::w8a8};

inline void add_precision(CLI::App& app, std::string& precision, const char* option = "--precision", const char* help = "Format of the packed weights") {
  std::vector<std::string> names;
  for (const m2lm::DType format : precisions) names.emplace_back(m2lm::dtype_name(format));
  app.add_option(option, precision, help)->check(CLI::IsMember(names))->capture_default_str();
}

/// requires a name that add_precision has accepted.
inline m2lm::DType precision_of(std::string_view name) {
  return *std::find_if(std::begin(precisions), std::end(precisions), [&](m2lm::DType format) { return m2lm::dtype_name(format) == name; });
}

inline void add_options(CLI::App& app, Options& o) {
  o.program = app.get_name();
  add_version(app);
  app.add_option("--model", o.model, "Directory of a Hugging Face checkpoint")->envname("M2LM_MODEL")->type_name("DIR");
  add_precision(app, o.precision);
  app.add_option("--packed-cache", o.packed_cache, "Packed weights that m2lm-pack wrote; default: those beside the checkpoint, if they fit")->type_name("FILE");
  app.add_option("--template", o.template_name, "Chat template instead of the checkpoint's")->type_name("NAME");
  app.add_option("--threads", o.threads, "Threads to work with; 0 = one per core")->check(CLI::Range(0, 1024))->type_name("N");
  app.add_flag("--check", o.check, "Refuse a checkpoint with NaN or infinity among its weights, and name them");

  CLI::Option_group* sampling = app.add_option_group("Generation");
  m2lm::GenerateOptions& g = o.generate;
  sampling->add_option("--max-tokens", g.max_new_tokens, "Most tokens of an answer")
      ->check(CLI::Range(0, 1000000))
      ->type_name("N")
      ->capture_default_str();
  sampling->add_option("--temperature", g.temperature, "0 = always the most likely token")->type_name("T")->capture_default_str();
  sampling->add_option("--top-k", g.top_k, "Only the K most likely tokens; 0 = off")->type_name("K")->capture_default_str();
  sampling->add_option("--top-p", g.top_p, "Only the most likely tokens that together reach P; 1 = off")->type_name("P")->capture_default_str();
  sampling->add_option("--min-p", g.min_p, "Only tokens at least P times as likely as the best; 0 = off")->type_name("P")->capture_default_str();
  sampling->add_option("--repetition-penalty", g.repetition_penalty, "Above 1: repeats become less likely; 1 = off")
      ->type_name("R")
      ->capture_default_str();
  sampling->add_option("--seed", g.seed, "The same seed gives the same text")->type_name("S")->capture_default_str();
  sampling->add_option("--stop", g.stop, "Text that ends an answer; may be given several times")->type_name("TEXT")->allow_extra_args(false);

  CLI::Option_group* output = app.add_option_group("Output");
  output->add_flag("--json", o.json, "One JSON object per line instead of text as it comes");
  output->add_flag("--timings", o.timings, "Print times, speeds and peak memory on standard error");
  output->add_option("--dump", o.dump, "Write the prompt's tensors to this safetensors file: input_ids, features, hidden_states, logits")
      ->type_name("FILE");
}

inline void add_device(CLI::App& app, Options& o) {
  app.add_option("--device", o.device, "Where the model runs; auto = cuda where a device can be used, else cpu")
      ->check(CLI::IsMember({"cpu", "cuda", "auto"}))
      ->capture_default_str();
}

/// throws UsageError for a value outside its range; the sentences are the library's.
inline void check_options(const Options& o) {
  try {
    m2lm::validate(o.generate.sampling());
    if (!o.template_name.empty()) m2lm::chat_template(o.template_name);
  } catch (const m2lm::OptionError& error) {
    throw UsageError(error.what());
  }
}

/// The message without the library's name in front, which the program's replaces.
inline const char* plain_message(const char* message) {
  constexpr std::string_view library = "m2lm: ";
  return std::string_view(message).starts_with(library) ? message + library.size() : message;
}

/// Runs a program: parses, then `body()`, whose exceptions become a message on standard error and an exit code.
template <class Body>
int run(CLI::App& app, int argc, char** argv, Body&& body) {
  const auto complain = [&](const char* message) {
    std::fflush(stdout);
    std::fprintf(stderr, "%s: %s\n", app.get_name().c_str(), plain_message(message));
  };
  app.failure_message([](const CLI::App* failed, const CLI::Error& error) {
    return m2lm::concat(failed->get_name(), ": ", error.what(), "\nRun with --help for more information.\n");
  });
  try {
    app.parse(argc, argv);
    const int status = body();
    if (std::fflush(stdout) != 0 || std::ferror(stdout)) throw m2lm::InputError("standard output cannot be written");
    return status;
  } catch (const CLI::Success& help) {
    return app.exit(help);
  } catch (const CLI::ParseError& error) {
    app.exit(error);
    return bad_usage;
  } catch (const UsageError& error) {
    complain(error.what());
    std::fprintf(stderr, "Run with --help for more information.\n");
    return bad_usage;
  } catch (const std::bad_alloc&) {
    complain("not enough memory");
    return bad_input;
  } catch (const std::exception& error) {
    complain(error.what());
    return bad_input;
  }
}

/// The bundled model, looked for upwards from the executable: share/m2lm/easy-vqa when installed, assets/easy-vqa in a
/// source tree. throws InputError when there is none.
inline std::string find_default_model() {
  namespace fs = std::filesystem;
  std::error_code ignored;
  const fs::path executable = fs::read_symlink("/proc/self/exe", ignored);
  for (fs::path at = executable.parent_path(); !at.empty(); at = at.parent_path()) {
    for (const char* place : {"share/m2lm/easy-vqa", "assets/easy-vqa"})
      if (fs::is_regular_file(at / place / "config.json", ignored)) return (at / place).string();
    if (at == at.root_path()) break;
  }
  throw m2lm::InputError(m2lm::concat("no model is given, and neither share/m2lm/easy-vqa nor assets/easy-vqa lies beside or above ",
                                      executable.parent_path().string(), ": give --model DIR, or set M2LM_MODEL"));
}

/// A bar on standard error while a model is loaded; only on a terminal.
class ProgressBar {
  bool visible_ = isatty(STDERR_FILENO) == 1;
  int shown_ = -1;

 public:
  ProgressBar() = default;
  ProgressBar(const ProgressBar&) = delete;
  ProgressBar& operator=(const ProgressBar&) = delete;
  ~ProgressBar() {
    if (visible_ && shown_ >= 0) std::fputs("\r\033[K", stderr);
  }
  void operator()(double done) {
    constexpr int width = 40;
    const int percent = static_cast<int>(done * 100);
    if (!visible_ || percent == shown_) return;
    shown_ = percent;
    const int filled = percent * width / 100;
    std::fprintf(stderr, "\rloading [%s%s] %3d %%", std::string(static_cast<std::size_t>(filled), '#').c_str(),
                 std::string(static_cast<std::size_t>(width - filled), ' ').c_str(), percent);
    std::fflush(stderr);
  }
};

class Stopwatch {
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();

 public:
  double seconds() const { return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count(); }
};

/// Most memory this process has had resident, in bytes; 0 where the system does not say.
inline std::size_t peak_memory() {
  std::FILE* status = std::fopen("/proc/self/status", "r");
  if (status == nullptr) return 0;
  char line[256];
  unsigned long long kib = 0;
  while (std::fgets(line, sizeof(line), status))
    if (std::sscanf(line, "VmHWM: %llu", &kib) == 1) break;
  std::fclose(status);
  return static_cast<std::size_t>(kib) * 1024;
}

/// Seconds and counts of a whole run.
struct Report {
  double load_seconds = 0, image_seconds = 0;
  m2lm::Timings generation{};

  void add(const m2lm::Timings& t) {
    image_seconds += t.encode_seconds;
    generation.prefill_seconds += t.prefill_seconds;
    generation.prefill_tokens += t.prefill_tokens;
    generation.decode_seconds += t.decode_seconds;
    generation.decode_tokens += t.decode_tokens;
  }
  void print() const {
    const auto rate = [](const char* name, std::int64_t tokens, double seconds) {
      std::fprintf(stderr, "%-8s %10.1f tok/s  (%lld tokens in %.3f s)\n", name, seconds > 0 ? static_cast<double>(tokens) / seconds : 0.0,
                   static_cast<long long>(tokens), seconds);
    };
    std::fflush(stdout);
    std::fprintf(stderr, "%-8s %10.3f s\n%-8s %10.3f s\n", "load", load_seconds, "image", image_seconds);
    rate("prefill", generation.prefill_tokens, generation.prefill_seconds);
    rate("decode", generation.decode_tokens, generation.decode_seconds);
    if (const std::size_t peak = peak_memory())
      std::fprintf(stderr, "%-8s %10.1f MiB at its peak\n", "memory", static_cast<double>(peak) / (1 << 20));
  }
};

/// Loads o.model with a progress bar and notes the seconds.
template <class M>
M load_model(const Options& o, Report& report, typename M::Backend backend) {
  const Stopwatch watch;
  m2lm::LoadOptions options{.precision = m2lm::Precision{.weights = precision_of(o.precision)}, .template_name = o.template_name, .check = o.check};
  if (!o.packed_cache.empty()) {
    options.packed_cache_mode = m2lm::PackedCacheMode::required;
    options.packed_cache = o.packed_cache;
  }
  ProgressBar bar;
  options.progress = bar;
  M model = M::from_pretrained(o.model, std::move(backend), options);
  if (const std::string& why = model.load_report().packed_cache; !why.empty())
    std::fprintf(stderr, "%s: packed weights are not used: %s\n", o.program.c_str(), why.c_str());
  report.load_seconds = watch.seconds();
  return model;
}
template <class M>
M load_model(const Options& o, Report& report) {
  return load_model<M>(o, report, m2lm::Cpu{{.threads = o.threads}});
}

/// Whether --device means CUDA on this machine. `auto` says on standard error why it does not; throws DeviceError when `cuda` cannot be.
inline bool runs_on_cuda(const Options& o) {
  if (o.device == "cpu") return false;
  std::string reason;
#if defined(M2LM_PROGRAMS_HAVE_CUDA)
  if (m2lm::cuda::device_count(&reason) > 0) return true;
#else
  reason = "this build of the program has no CUDA: it was compiled where no nvcc was found";
#endif
  if (o.device == "cuda") throw m2lm::DeviceError(m2lm::concat("--device cuda: ", reason));
  std::fprintf(stderr, "%s: --device auto: the CPU is used, as %s\n", o.program.c_str(), reason.c_str());
  return false;
}

/// body(model), with o.model loaded where --device says.
template <class Body>
int with_vlm(const Options& o, Report& report, Body&& body) {
  if (runs_on_cuda(o)) {
#if defined(M2LM_PROGRAMS_HAVE_CUDA)
    return body(load_model<CudaVlm>(o, report, m2lm::Cuda()));
#endif
  }
  return body(load_model<Vlm>(o, report));
}

/// The embeddings of one picture. They can be attached to any number of prompts.
template <class M>
m2lm::AnyTensor encode_image(const M& model, const std::string& path, Report& report) {
  const Stopwatch watch;
  m2lm::AnyTensor features(model.template encode<"image">(m2lm::load_image(path)));
  report.image_seconds += watch.seconds();
  return features;
}

/// A user's turn about pictures, with a placeholder for each of them in front of the text.
template <class M>
typename M::PromptType image_prompt(const M& model, std::string_view text, std::span<const m2lm::AnyTensor> features) {
  const std::vector<std::string_view> placeholders(features.size(), "<image>");
  auto prompt = model.prompt(m2lm::with_media(model.chat_template(), placeholders, text));
  for (const m2lm::AnyTensor& f : features) prompt.template attach_embeddings<"image">(f);
  return prompt;
}

/// --dump: the tensors of a prompt, named as the README of tests/golden names them. `features` are those of its pictures.
template <class M>
void write_dump(const M& model, const typename M::PromptType& prompt, std::span<const m2lm::AnyTensor> features, const std::string& path) {
  std::vector<m2lm::NamedTensor> tensors;
  const std::vector<std::int32_t> ids = model.input_ids(prompt);
  m2lm::Tensor<std::int32_t> input_ids(m2lm::Shape{static_cast<std::int64_t>(ids.size())});
  std::copy(ids.begin(), ids.end(), input_ids.data());
  tensors.push_back({"input_ids", m2lm::AnyTensor(std::move(input_ids))});
  for (std::size_t i = 0; i < features.size(); ++i) tensors.push_back({m2lm::concat("features.image.", i), features[i]});
  std::size_t layer = 0;
  for (auto& state : model.hidden_states(prompt)) tensors.push_back({m2lm::concat("hidden_states.", layer++), m2lm::AnyTensor(std::move(state))});
  tensors.push_back({"logits", m2lm::AnyTensor(model.logits(prompt))});
  m2lm::write_safetensors(path, tensors);
}

/// While one lives, the first interrupt sets a flag that ends the answer; the second ends the program.
class InterruptGuard {
  static inline std::atomic<bool> requested_{false};
  struct sigaction before_ {};

 public:
  InterruptGuard() {
    requested_ = false;
    struct sigaction action {};
    action.sa_handler = [](int) { requested_ = true; };
    action.sa_flags = static_cast<int>(SA_RESETHAND);
    sigemptyset(&action.sa_mask);
    sigaction(SIGINT, &action, &before_);
  }
  ~InterruptGuard() { sigaction(SIGINT, &before_, nullptr); }
  InterruptGuard(const InterruptGuard&) = delete;
  InterruptGuard& operator=(const InterruptGuard&) = delete;
  static const std::atomic<bool>& requested() { return requested_; }
};

/// Answers with `generate(options)`: on standard output as it comes, or with nothing printed for --json.
template <class Generate>
m2lm::Generation answer(const Options& o, Report& report, Generate&& generate) {
  const InterruptGuard guard;
  m2lm::GenerateOptions options = o.generate;
  options.cancel = &InterruptGuard::requested();
  const auto print = [](std::string_view piece) {
    std::fwrite(piece.data(), 1, piece.size(), stdout);
    std::fflush(stdout);
  };
  if (!o.json) options.on_text = print;
  m2lm::Generation result = generate(options);
  if (!o.json) print("\n");
  report.add(result.timings);
  return result;
}

/// Adds "tokens" (the ids), "finish_reason" and "timings" to an open object.
inline void write_generation(m2lm::JsonWriter& json, const m2lm::Generation& result, double image_seconds) {
  json.key("tokens").begin_array();
  for (const std::int32_t id : result.tokens) json.value(id);
  json.end_array().member("finish_reason", m2lm::finish_reason_name(result.finish_reason));
  const m2lm::Timings& t = result.timings;
  json.key("timings").begin_object().member("image_seconds", image_seconds + t.encode_seconds);
  json.member("prefill_seconds", t.prefill_seconds).member("prefill_tokens", t.prefill_tokens);
  json.member("decode_seconds", t.decode_seconds).member("decode_tokens", t.decode_tokens).end_object();
}

inline void print_line(const std::string& text) {
  std::fwrite(text.data(), 1, text.size(), stdout);
  std::fputc('\n', stdout);
  std::fflush(stdout);
}

}  // namespace program
