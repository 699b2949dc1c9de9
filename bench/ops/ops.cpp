// The ops of Cpu by Google Benchmark, named op/format/shape; one thread unless M2LM_BENCH_THREADS says how many. M2LM_MAX_ISA caps the level.
// Built with -DM2LM_BENCH=ON: `build/dev/bin/bench_ops --benchmark_filter=linear/q4`. Rates are of arithmetic (FLOP/s) or memory (bytes/s).
#include "../workload.hpp"

#include <m2lm/core.hpp>

#include <benchmark/benchmark.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <span>
#include <string>
#include <vector>

namespace {

using namespace m2lm;
using workload::Machine;
using workload::matrix;
using workload::values;

int threads() {
  const char* value = std::getenv("M2LM_BENCH_THREADS");
  return value != nullptr ? std::atoi(value) : 1;
}

void count(benchmark::State& state, const char* what, double per_iteration) {
  state.counters[what] = benchmark::Counter(per_iteration, benchmark::Counter::kIsIterationInvariantRate);
}

void linear(benchmark::State& state, DType format, std::int64_t m, std::int64_t n, std::int64_t k) {
  Machine machine({.threads = threads()});
  machine.ctx.phase = workload::phase_of(m);
  const AnyTensor source(values(n, k, 1));
  const PackedMatrix w = ops::pack(machine.ctx, std::span(&source, 1), format);
  const Tensor<float> x = values(m, k, 2);
  Tensor<float> y(Shape{m, n});
  for (auto _ : state) {
    ops::linear(machine.ctx, matrix(x), w, {}, y.view<2>());
    benchmark::ClobberMemory();
  }
  count(state, "FLOP/s", 2.0 * static_cast<double>(m) * static_cast<double>(n) * static_cast<double>(k));
}

struct Heads {
  std::int64_t heads, kv_heads, head_dim;
};

/// `tokens` queries, the last of `keys` positions when causal.
void attention(benchmark::State& state, DType format, std::int64_t tokens, std::int64_t keys, const Heads& heads, bool causal) {
  Machine machine({.threads = threads()});
  const KeyValuesPlan plan = ops::plan_key_values(machine.ctx, format, heads.kv_heads, heads.head_dim, keys);
  std::vector<std::byte> of_keys(plan.bytes), of_values(plan.bytes);
  const KeyValues kv{format, heads.kv_heads, heads.head_dim, plan.capacity, of_keys.data(), of_values.data()};
  const Tensor<float> q = values(tokens, heads.heads * heads.head_dim, 1);
  const Tensor<float> k = values(keys, heads.kv_heads * heads.head_dim, 2), v = values(keys, heads.kv_heads * heads.head_dim, 3);
  ops::append_key_values(machine.ctx, matrix(k), matrix(v), 0, kv);
  Tensor<float> y(q.shape());
  for (auto _ : state) {
    ops::attention(machine.ctx, matrix(q), kv, keys, causal ? keys - tokens : 0, {.causal = causal, .window = 0}, 0.125, y.view<2>());
    benchmark::ClobberMemory();
  }
  const double seen = static_cast<double>(keys) - (causal ? static_cast<double>(tokens - 1) / 2 : 0);
  count(state, "FLOP/s", 4.0 * static_cast<double>(tokens) * seen * static_cast<double>(heads.heads * heads.head_dim));
}

void rows(benchmark::State& state, bool rope, std::int64_t count_of_rows, std::int64_t columns) {
  Machine machine({.threads = threads()});
  const Tensor<float> x = values(count_of_rows, columns, 1), weight = values(1, columns, 2), angles = values(count_of_rows, 32, 3);
  Tensor<float> y = x.clone();
  for (auto _ : state) {
    if (rope)
      ops::rope(machine.ctx, y.view<2>(), 64, matrix(angles), matrix(angles));
    else
      ops::rms_norm(machine.ctx, matrix(x), Vector<const float>(weight.data(), {columns}), 1e-5, y.view<2>());
    benchmark::ClobberMemory();
  }
  count(state, "bytes/s", 8.0 * static_cast<double>(x.elements()));
}

std::string by(std::initializer_list<std::int64_t> sizes) {
  std::string out;
  for (const std::int64_t size : sizes) out += (out.empty() ? "" : "x") + std::to_string(size);
  return out;
}

void register_all() {
  struct Product {
    std::int64_t m, n, k;
  };
  for (const DType format : {DType::f32, DType::bf16, DType::q8, DType::q4, DType::q4_128, DType::w8a8})
    for (const Product p : {Product{1, 5632, 2048}, Product{512, 5632, 2048}, Product{577, 4096, 1024}, Product{1500, 5120, 1280}})
      benchmark::RegisterBenchmark(("linear/" + std::string(dtype_name(format)) + "/" + by({p.m, p.n, p.k})).c_str(), linear, format, p.m, p.n, p.k);
  struct Shape {
    std::int64_t tokens, keys;
    Heads heads;
    bool causal;
  };
  for (const DType format : {DType::f32, DType::bf16})
    for (const Shape& s : {Shape{577, 577, {16, 16, 64}, false}, Shape{1500, 1500, {20, 20, 64}, false}, Shape{512, 512, {32, 4, 64}, true},
                           Shape{1, 512, {32, 4, 64}, true}, Shape{1, 4096, {32, 4, 64}, true}})
      benchmark::RegisterBenchmark(("attention/" + std::string(dtype_name(format)) + "/" + by({s.tokens, s.keys, s.heads.heads, s.heads.kv_heads, s.heads.head_dim})).c_str(),
                                   attention, format, s.tokens, s.keys, s.heads, s.causal);
  for (const std::int64_t count_of_rows : {1, 512}) {
    benchmark::RegisterBenchmark(("rms_norm/f32/" + by({count_of_rows, 2048})).c_str(), rows, false, count_of_rows, 2048);
    benchmark::RegisterBenchmark(("rope/f32/" + by({count_of_rows, 2048})).c_str(), rows, true, count_of_rows, 2048);
  }
}

}  // namespace

int main(int argc, char** argv) {
  register_all();
  benchmark::AddCustomContext("level", std::string(isa_name(default_isa())));
  benchmark::AddCustomContext("threads", std::to_string(threads()));
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 2;
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return 0;
}
