// The kernels of the CPU backend behind a C interface, so that one process can time them and another library in turns.
// Built by bench/compare/gemm.py; needs nothing but the library's headers.
#include <m2lm/core.hpp>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#if M2LM_X86_64
#include <immintrin.h>
#endif

namespace {

using namespace m2lm;
using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

CpuOptions options(int threads, int isa, int bf16_dot) {
  CpuOptions o{.threads = threads};
  if (isa >= 0) o.max_isa = static_cast<IsaLevel>(isa);
  if (bf16_dot >= 0) o.bf16_dot = bf16_dot != 0;
  return o;
}

struct Backend {
  Cpu cpu;
  Arena arena;
  Context<Cpu> ctx{cpu, arena};
  explicit Backend(const CpuOptions& o) : cpu(o) {}
};

struct Gemm : Backend {
  PackedMatrix weight;
  Matrix<const float> x;
  using Backend::Backend;
};

struct Attention : Backend {
  Tensor<float> q;
  std::vector<std::byte> keys, values;
  KeyValues kv;
  std::int64_t tokens = 0, count = 0;
  AttentionMask mask{};
  double scale = 1;
  using Backend::Backend;
};

struct Reader {
  ThreadPool pool;
  detail::AlignedBytes data;
  Reader(std::int64_t bytes, int threads) : pool(threads), data(detail::aligned_bytes(static_cast<std::size_t>(bytes))) {}
};

using Line [[gnu::vector_size(16)]] = std::uint64_t;

// Every 16 bytes once, in `streams` places in turns, four lines of each at a time.
std::uint64_t read_all(const std::byte* data, std::int64_t bytes, int streams) {
  const std::int64_t each = bytes / streams / 256 * 256;
  Line sum[4] = {};
  for (std::int64_t i = 0; i < each; i += 256)
    for (int s = 0; s < streams; ++s) {
      const Line* p = reinterpret_cast<const Line*>(data + s * each + i);
#pragma GCC unroll 16
      for (int j = 0; j < 16; ++j) sum[j % 4] |= p[j];
    }
  const Line all = (sum[0] | sum[1]) | (sum[2] | sum[3]);
  return all[0] | all[1];
}

#if M2LM_X86_64
// Multiply-adds per second of one core: 24 chains hide every latency.
[[gnu::target("avx512f")]] double f32_rate() {
  __m512 sum[24];
  for (auto& s : sum) s = _mm512_set1_ps(1.0F);
  const __m512 a = _mm512_set1_ps(0.5F), b = _mm512_set1_ps(0.25F);
  constexpr int steps = 20000;
  const auto start = Clock::now();
  for (int i = 0; i < steps; ++i) {
#pragma GCC unroll 24
    for (auto& s : sum) s = _mm512_fmadd_ps(s, a, b);
  }
  const double seconds = seconds_since(start);
  float total = 0;
  for (const auto& s : sum) total += _mm512_cvtss_f32(s);
  return total < 0 ? 0 : steps * 24.0 * 16 / seconds;
}

[[gnu::target("avx512f,avx512bf16")]] double bf16_dot_rate() {
  __m512 sum[24];
  for (auto& s : sum) s = _mm512_set1_ps(1.0F);
  const auto a = (__m512bh)_mm512_set1_epi32(0x3c003c00);
  constexpr int steps = 10000;
  const auto start = Clock::now();
  for (int i = 0; i < steps; ++i) {
#pragma GCC unroll 24
    for (auto& s : sum) s = _mm512_dpbf16_ps(s, a, a);
  }
  const double seconds = seconds_since(start);
  float total = 0;
  for (const auto& s : sum) total += _mm512_cvtss_f32(s);
  return total < 0 ? 0 : steps * 24.0 * 32 / seconds;
}

[[gnu::target("avx2,fma")]] double f32_rate_avx2() {
  __m256 sum[12];
  for (auto& s : sum) s = _mm256_set1_ps(1.0F);
  const __m256 a = _mm256_set1_ps(0.5F), b = _mm256_set1_ps(0.25F);
  constexpr int steps = 40000;
  const auto start = Clock::now();
  for (int i = 0; i < steps; ++i) {
#pragma GCC unroll 12
    for (auto& s : sum) s = _mm256_fmadd_ps(s, a, b);
  }
  const double seconds = seconds_since(start);
  float total = 0;
  for (const auto& s : sum) total += _mm256_cvtss_f32(s);
  return total < 0 ? 0 : steps * 12.0 * 8 / seconds;
}
#endif

}  // namespace

extern "C" {

/// The level that a backend without options uses, as its number.
int bench_isa() { return static_cast<int>(default_isa()); }

/// 10^9 floating-point operations (a product and a sum are two) per second of one core, the best of many short runs.
/// kind 0: f32 at `isa`; 1: VDPBF16PS. 0 where the machine has no such instruction or there is no loop for it.
double bench_peak(int kind, int isa) {
  double best = 0;
#if M2LM_X86_64
  const IsaLevel level = static_cast<IsaLevel>(isa);
  for (int i = 0; i < 200; ++i) {
    double rate = 0;
    if (kind == 1 && level >= IsaLevel::avx512_bf16) rate = bf16_dot_rate();
    if (kind == 0 && level >= IsaLevel::avx512) rate = f32_rate();
    if (kind == 0 && level == IsaLevel::avx2) rate = f32_rate_avx2();
    if (rate > best) best = rate;
  }
#endif
  return best * 2 / 1e9;
}

/// A buffer as weights are allocated, written once by each thread that will read it.
void* bench_read_new(std::int64_t bytes, int threads) {
  auto r = std::make_unique<Reader>(bytes, threads);
  r->pool.run([&](int part) {
    const Range mine = split(bytes, threads, part, 4096);
    std::memset(r->data.get() + mine.begin, 1, static_cast<std::size_t>(mine.end - mine.begin));
  });
  return r.release();
}
/// Seconds to read the first `bytes` of it once: the ceiling of what a product with one row can do. streams: places read in turns.
double bench_read_run(void* reader, std::int64_t bytes, int streams) {
  Reader& r = *static_cast<Reader*>(reader);
  std::atomic<std::uint64_t> sink{0};
  const auto start = Clock::now();
  r.pool.run([&](int part) {
    const Range mine = split(bytes, r.pool.size(), part, 4096);
    sink.fetch_or(read_all(r.data.get() + mine.begin, mine.end - mine.begin, streams));
  });
  return seconds_since(start);
}
void bench_read_free(void* reader) { delete static_cast<Reader*>(reader); }

void* bench_gemm_new(int threads, int isa, int bf16_dot, int bf16, std::int64_t m, std::int64_t n, std::int64_t k, const float* x, const float* w) {
  auto g = std::make_unique<Gemm>(options(threads, isa, bf16_dot));
  const AnyTensor weight(DType::f32, Shape{n, k}, reinterpret_cast<const std::byte*>(w), nullptr);
  g->weight = ops::pack(g->ctx, std::span(&weight, 1), bf16 ? DType::bf16 : DType::f32);
  g->x = Matrix<const float>(x, {m, k});
  return g.release();
}
/// Seconds of one product.
double bench_gemm_run(void* gemm, float* y) {
  Gemm& g = *static_cast<Gemm*>(gemm);
  const auto start = Clock::now();
  ops::linear(g.ctx, g.x, g.weight, {}, Matrix<float>(y, {g.x.extent(0), g.weight.rows}));
  return seconds_since(start);
}
void bench_gemm_free(void* gemm) { delete static_cast<Gemm*>(gemm); }

/// q, k, v: [tokens, heads·head_dim], [keys, kv_heads·head_dim] twice. Queries are the last `tokens` of the keys if causal.
void* bench_attention_new(int threads, int isa, int bf16_dot, int bf16, std::int64_t tokens, std::int64_t heads, std::int64_t kv_heads,
                          std::int64_t head_dim, std::int64_t keys, int causal, double scale, const float* q, const float* k, const float* v) {
  auto a = std::make_unique<Attention>(options(threads, isa, bf16_dot));
  const DType format = bf16 ? DType::bf16 : DType::f32;
  a->tokens = tokens;
  a->count = keys;
  a->mask.causal = causal != 0;
  a->scale = scale;
  a->q = Tensor<float>(Shape{tokens, heads * head_dim});
  std::memcpy(a->q.data(), q, static_cast<std::size_t>(a->q.elements()) * sizeof(float));
  const KeyValuesPlan plan = ops::plan_key_values(a->ctx, format, kv_heads, head_dim, keys);
  a->keys.resize(plan.bytes);
  a->values.resize(plan.bytes);
  a->kv = {format, kv_heads, head_dim, plan.capacity, a->keys.data(), a->values.data()};
  ops::append_key_values(a->ctx, Matrix<const float>(k, {keys, kv_heads * head_dim}), Matrix<const float>(v, {keys, kv_heads * head_dim}), 0, a->kv);
  return a.release();
}
double bench_attention_run(void* attention, float* y) {
  Attention& a = *static_cast<Attention*>(attention);
  const auto start = Clock::now();
  ops::attention(a.ctx, std::as_const(a.q).view<2>(), a.kv, a.count, a.mask.causal ? a.count - a.tokens : 0, a.mask, a.scale,
                 Matrix<float>(y, {a.tokens, a.q.shape()[1]}));
  return seconds_since(start);
}
void bench_attention_free(void* attention) { delete static_cast<Attention*>(attention); }

}  // extern "C"
