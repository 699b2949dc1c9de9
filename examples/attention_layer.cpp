// One attention layer alone, on random data: grouped-query attention with rotary positions and a KV cache, first for all tokens
// at once, then token by token. Shows the layers without models and files, and that both ways give the same bits.
#include <m2lm/core.hpp>

#include <cstdio>
#include <cstring>
#include <vector>

namespace {

/// Small random values, as a checkpoint would give them.
m2lm::AnyTensor random_values(m2lm::Shape shape, m2lm::Rng& rng) {
  m2lm::Tensor<float> t(shape);
  for (float& x : t.span()) x = static_cast<float>(rng.uniform() - 0.5) / 8;
  return m2lm::AnyTensor(std::move(t));
}

}  // namespace

int main() {
  using m2lm::Cpu;
  using m2lm::Matrix;
  using m2lm::Shape;
  constexpr std::int64_t tokens = 20, hidden = 96, heads = 6, kv_heads = 2, head_dim = 16;

  Cpu cpu;
  m2lm::Arena arena;
  m2lm::Context<Cpu> ctx{cpu, arena};

  // Every parameter of the layer, by its name in a checkpoint.
  m2lm::CausalAttention<Cpu> attention({.hidden_size = hidden, .heads = heads, .kv_heads = kv_heads, .head_dim = head_dim});
  m2lm::Rng rng(7);
  m2lm::for_each_parameter(
      [&](std::string_view name, m2lm::Parameter& p) {
        p.value = random_values(p.shape, rng);
        std::printf("%-14.*s %s\n", static_cast<int>(name.size()), name.data(), p.shape.string().c_str());
      },
      attention);
  attention.prepare(ctx, m2lm::DType::bf16);

  const m2lm::Tensor<float> x = random_values(Shape{tokens, hidden}, rng).to<float>();
  const std::vector<float> frequencies = m2lm::rope_frequencies({}, head_dim);
  m2lm::Tensor<float> cos(Shape{tokens, head_dim / 2}), sin(Shape{tokens, head_dim / 2});
  m2lm::rope_angles<float>(frequencies, 0, cos.view<2>(), sin.view<2>());

  // y += attention(x) for rows [begin, end), whose keys and values go into the cache.
  const auto forward = [&](m2lm::KvCache<Cpu>& cache, std::int64_t begin, std::int64_t end, Matrix<float> y) {
    const m2lm::SequenceRows<Cpu> rows{.cache = &cache, .begin = 0, .count = end - begin};
    const auto part = [&](const m2lm::Tensor<float>& t) { return t.view<2>().rows(begin, end); };
    attention.forward(ctx, 0, part(x), {&rows, 1}, part(cos), part(sin), y.rows(begin, end));
    cache.advance(end - begin);
  };
  const auto new_cache = [&] { return m2lm::KvCache<Cpu>(ctx, m2lm::DType::bf16, 1, kv_heads, head_dim, tokens); };

  m2lm::Tensor<float> at_once(Shape{tokens, hidden}), one_by_one(Shape{tokens, hidden});
  m2lm::KvCache<Cpu> cache = new_cache(), other_cache = new_cache();
  forward(cache, 0, tokens, at_once.view<2>());
  for (std::int64_t t = 0; t < tokens; ++t) forward(other_cache, t, t + 1, one_by_one.view<2>());

  const bool equal = std::memcmp(at_once.data(), one_by_one.data(), static_cast<std::size_t>(at_once.elements()) * sizeof(float)) == 0;
  std::printf("%lld tokens, %d threads, %s: at once and one by one are %s\n", static_cast<long long>(tokens), cpu.threads(),
              m2lm::isa_name(cpu.isa()).data(), equal ? "bit-equal" : "different");
  return equal ? 0 : 1;
}
