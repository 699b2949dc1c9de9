// The kernels of the CPU backend behind a C interface, so that one process can time them and another library in turns.
// Built by bench/compare; needs nothing but the library's headers.
#include "../limits.hpp"

#include <m2lm/core.hpp>

#include <cstdint>
#include <cstring>
#include <memory>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

namespace {

using namespace m2lm;
using limits::Clock, limits::seconds_since;

CpuOptions options(int threads, int isa, int bf16_dot) {
  CpuOptions o{.threads = threads};
  if (isa >= 0) o.max_isa = static_cast<IsaLevel>(isa);
  if (bf16_dot >= 0) o.bf16_dot = bf16_dot != 0;
  return o;
}

/// throws OptionError for a name that no format of weights has.
DType format_of(std::string_view name) {
  for (const DType format : {DType::f32, DType::bf16, DType::q8, DType::q4, DType::q4_128, DType::w8a8})
    if (dtype_name(format) == name) return format;
  throw OptionError(concat("no format of weights is named ", name));
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
  Tensor<float> q, k, v;
  std::vector<std::byte> keys, values;
  KeyValues kv;
  std::int64_t tokens = 0, count = 0;
  AttentionMask mask{};
  double scale = 1;
  using Backend::Backend;
};

struct Reader {
  ThreadPool pool;
  limits::Reader reader;
  Reader(std::int64_t bytes, int threads) : pool(threads), reader(pool, bytes) {}
};

}  // namespace

extern "C" {

/// The level that a backend without options uses, as its number.
int bench_isa() { return static_cast<int>(default_isa()); }

/// limits::peak. kind: 0 f32, 1 VDPBF16PS, 2 VPDPBUSD, 3 and 4 AMX with bf16 and with bytes.
double bench_peak(int kind, int isa) { return limits::peak(static_cast<limits::Products>(kind), static_cast<IsaLevel>(isa)); }

void* bench_read_new(std::int64_t bytes, int threads) { return std::make_unique<Reader>(bytes, threads).release(); }
/// limits::Reader::run.
double bench_read_run(void* reader, std::int64_t bytes, int streams) { return static_cast<Reader*>(reader)->reader.run(bytes, streams); }
void bench_read_free(void* reader) { delete static_cast<Reader*>(reader); }

/// y = x·wᵀ with x [m, k] and w [n, k], w packed in the format of that name; one row as a step of decoding, more as a prompt.
void* bench_gemm_new(int threads, int isa, int bf16_dot, const char* format, std::int64_t m, std::int64_t n, std::int64_t k, const float* x,
                     const float* w) {
  auto g = std::make_unique<Gemm>(options(threads, isa, bf16_dot));
  const AnyTensor weight(DType::f32, Shape{n, k}, reinterpret_cast<const std::byte*>(w), nullptr);
  g->weight = ops::pack(g->ctx, std::span(&weight, 1), format_of(format));
  g->x = Matrix<const float>(x, {m, k});
  g->ctx.phase = m == 1 ? Phase::decode : Phase::prefill;
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
  const auto copy = [](const float* from, std::int64_t rows, std::int64_t columns) {
    Tensor<float> out(Shape{rows, columns});
    std::memcpy(out.data(), from, static_cast<std::size_t>(out.elements()) * sizeof(float));
    return out;
  };
  a->q = copy(q, tokens, heads * head_dim);
  a->k = copy(k, keys, kv_heads * head_dim);
  a->v = copy(v, keys, kv_heads * head_dim);
  const KeyValuesPlan plan = ops::plan_key_values(a->ctx, format, kv_heads, head_dim, keys);
  a->keys.resize(plan.bytes);
  a->values.resize(plan.bytes);
  a->kv = {format, kv_heads, head_dim, plan.capacity, a->keys.data(), a->values.data()};
  ops::append_key_values(a->ctx, std::as_const(a->k).view<2>(), std::as_const(a->v).view<2>(), 0, a->kv);
  return a.release();
}
/// Seconds. append: with the time of laying out keys and values, as an encoder does for every picture.
double bench_attention_run(void* attention, int append, float* y) {
  Attention& a = *static_cast<Attention*>(attention);
  const auto start = Clock::now();
  if (append != 0) ops::append_key_values(a.ctx, std::as_const(a.k).view<2>(), std::as_const(a.v).view<2>(), 0, a.kv);
  ops::attention(a.ctx, std::as_const(a.q).view<2>(), a.kv, a.count, a.mask.causal ? a.count - a.tokens : 0, a.mask, a.scale,
                 Matrix<float>(y, {a.tokens, a.q.shape()[1]}));
  return seconds_since(start);
}
void bench_attention_free(void* attention) { delete static_cast<Attention*>(attention); }

}  // extern "C"
