// ik_llama.cpp as a worker (protocol.py): ik_llama MODEL.gguf THREADS CONTEXT BATCH SEQUENCES FLASH REPACK, the last two 0 or 1. install.sh builds it
// against the headers and the library of a checkout, which have another interface than llama.cpp's by now.
#include <llama.h>

#include <nlohmann/json.hpp>

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iostream>
#include <string>
#include <vector>

namespace {

using Json = nlohmann::json;
using Clock = std::chrono::steady_clock;
using Ids = std::vector<llama_token>;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

std::int64_t peak_memory() {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);)
    if (line.rfind("VmHWM", 0) == 0) return std::atoll(line.c_str() + 6) * 1024;
  return 0;
}

/// A row of numbers as numpy.save writes it.
void write_npy(const std::string& path, const float* data, int count) {
  std::string header = "{'descr': '<f4', 'fortran_order': False, 'shape': (" + std::to_string(count) + ",), }";
  header.resize((header.size() + 10 + 1 + 63) / 64 * 64 - 10 - 1, ' ');
  header += '\n';
  const auto length = static_cast<std::uint16_t>(header.size());
  std::ofstream file(path, std::ios::binary);
  file.write("\x93NUMPY\x01\x00", 8).write(reinterpret_cast<const char*>(&length), 2) << header;
  file.write(reinterpret_cast<const char*>(data), static_cast<std::streamsize>(count) * 4);
}

struct State {
  llama_model* model;
  llama_context* context;
  llama_batch batch;
  int most, vocabulary;

  explicit State(char** argv) : most(std::atoi(argv[4])) {
    llama_backend_init();
    llama_log_set([](ggml_log_level, const char*, void*) {}, nullptr);
    llama_model_params m = llama_model_default_params();
    m.n_gpu_layers = 0;
    m.repack_tensors = std::atoi(argv[7]) != 0;
    m.use_mmap = !m.repack_tensors;
    model = llama_model_load_from_file(argv[1], m);
    llama_context_params c = llama_context_default_params();
    c.n_threads = c.n_threads_batch = static_cast<std::uint32_t>(std::atoi(argv[2]));
    c.n_ctx = static_cast<std::uint32_t>(std::atoi(argv[3]));
    c.n_batch = c.n_ubatch = static_cast<std::uint32_t>(most);
    c.n_seq_max = static_cast<std::uint32_t>(std::atoi(argv[5]));
    c.flash_attn = std::atoi(argv[6]) != 0;
    context = model == nullptr ? nullptr : llama_init_from_model(model, c);
    if (context == nullptr) {
      std::fprintf(stderr, "ik_llama.cpp cannot load %s\n", argv[1]);
      std::exit(1);
    }
    batch = llama_batch_init(most, 0, 1);
    vocabulary = llama_n_vocab(model);
  }

  void run() {
    if (llama_decode(context, batch) == 0) return;
    std::fprintf(stderr, "llama_decode failed\n");
    std::exit(1);
  }
  void add(llama_token token, int position, int sequence, bool wanted) {
    const int i = batch.n_tokens++;
    batch.token[i] = token;
    batch.pos[i] = position;
    batch.n_seq_id[i] = 1;
    batch.seq_id[i][0] = sequence;
    batch.logits[i] = wanted;
  }
  void prompt(const Ids& ids, int sequence) {
    for (std::size_t i = 0; i < ids.size();) {
      batch.n_tokens = 0;
      for (; i < ids.size() && batch.n_tokens < most; ++i) add(ids[i], static_cast<int>(i), sequence, i + 1 == ids.size());
      run();
    }
    llama_synchronize(context);
  }
  /// Seconds of n steps of all prompts together.
  double steps(const std::vector<Ids>& prompts, int n) {
    llama_kv_cache_clear(context);
    for (std::size_t s = 0; s < prompts.size(); ++s) prompt(prompts[s], static_cast<int>(s));
    const auto start = Clock::now();
    for (int step = 0; step < n; ++step) {
      batch.n_tokens = 0;
      for (std::size_t s = 0; s < prompts.size(); ++s) add(1 + step, static_cast<int>(prompts[s].size()) + step, static_cast<int>(s), true);
      run();
      for (int s = 0; s < batch.n_tokens; ++s) {
        const float* logits = llama_get_logits_ith(context, s);
        volatile auto best = std::max_element(logits, logits + vocabulary) - logits;
        (void)best;
      }
    }
    return seconds_since(start);
  }

  double job(const Json& request) {
    const std::string what = request.at("do");
    if (what == "decode") return steps({request.at("ids").get<Ids>()}, request.at("n"));
    if (what == "batch") return steps(request.at("prompts").get<std::vector<Ids>>(), request.at("n"));
    llama_kv_cache_clear(context);
    const auto start = Clock::now();
    prompt(request.at("ids").get<Ids>(), 0);
    const float* logits = llama_get_logits_ith(context, batch.n_tokens - 1);
    const double seconds = seconds_since(start);
    if (request.contains("logits")) write_npy(request.at("logits"), logits, vocabulary);
    return seconds;
  }
};

}  // namespace

int main(int argc, char** argv) {
  if (argc != 8) {
    std::fprintf(stderr, "usage: %s MODEL.gguf THREADS CONTEXT BATCH SEQUENCES FLASH REPACK\n", argv[0]);
    return 2;
  }
  // Whatever the library prints does not disturb the answers.
  std::FILE* channel = fdopen(dup(1), "w");
  dup2(2, 1);
  const auto say = [&](const Json& answer) {
    std::fprintf(channel, "%s\n", answer.dump().c_str());
    std::fflush(channel);
  };
  const auto start = Clock::now();
  State state(argv);
  say({{"load_seconds", seconds_since(start)}, {"peak_memory_bytes", peak_memory()}});
  for (std::string line; std::getline(std::cin, line);)
    say({{"seconds", state.job(Json::parse(line))}, {"peak_memory_bytes", peak_memory()}});
  return 0;
}
