// Arena: alignment, scopes, growth, merging; and no allocation once it has seen the largest piece of work.
#include <doctest/doctest.h>

#include <m2lm/core.hpp>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <span>
#include <utility>

namespace {

std::atomic<long> allocations{0};

void* counted(std::size_t size, std::size_t alignment) {
  allocations.fetch_add(1);
  void* p = nullptr;
  if (posix_memalign(&p, alignment < sizeof(void*) ? sizeof(void*) : alignment, size ? size : 1) != 0) throw std::bad_alloc();
  return p;
}

}  // namespace

void* operator new(std::size_t size) { return counted(size, alignof(std::max_align_t)); }
void* operator new(std::size_t size, std::align_val_t alignment) { return counted(size, static_cast<std::size_t>(alignment)); }
void operator delete(void* p) noexcept { std::free(p); }
void operator delete(void* p, std::size_t) noexcept { std::free(p); }
void operator delete(void* p, std::align_val_t) noexcept { std::free(p); }
void operator delete(void* p, std::size_t, std::align_val_t) noexcept { std::free(p); }

namespace {

using namespace m2lm;

TEST_CASE("memory is aligned, apart, and given back in scopes") {
  Arena arena;
  float* first = nullptr;
  {
    const Arena::Scope scope(arena);
    first = arena.take<float>(3);
    char* second = arena.take<char>(1);
    double* none = arena.take<double>(0);
    CHECK(reinterpret_cast<std::uintptr_t>(first) % 64 == 0);
    CHECK(reinterpret_cast<std::uintptr_t>(second) % 64 == 0);
    CHECK(none != nullptr);
    CHECK(static_cast<void*>(second) != static_cast<void*>(first));
    {
      const Arena::Scope inner(arena);
      CHECK(arena.take<char>(64) == second + 64);
    }
    CHECK(arena.take<char>(1) == second + 64);  // what the inner scope took is free again
    const Matrix<float> m = arena.matrix<float>(5, 7);
    CHECK(m.shape() == Shape{5, 7});
    CHECK(m.contiguous());
    CHECK(arena.peak_bytes() == 64 + 64 + 64 + 192);
  }
  const Arena::Scope scope(arena);
  CHECK(arena.take<float>(1) == first);
  CHECK(arena.peak_bytes() == 64 + 64 + 64 + 192);
}

void work(Arena& arena, std::int64_t depth) {
  const Arena::Scope scope(arena);
  std::byte* mine = arena.take<std::byte>(40000);
  std::memset(mine, static_cast<int>(depth), 40000);
  if (depth > 0) work(arena, depth - 1);
  std::int64_t wrong = 0;
  for (std::int64_t i = 0; i < 40000; ++i) wrong += mine[i] != static_cast<std::byte>(depth);
  CHECK(wrong == 0);
}

TEST_CASE("it grows while in use, then merges, then allocates nothing") {
  Arena arena;
  work(arena, 20);  // 840 KB in blocks of 64 KB: pointers taken before a growth stay good
  const std::size_t peak = arena.peak_bytes();
  CHECK(peak == 21 * 40000);
  const long before = allocations.load();
  for (int i = 0; i < 5; ++i) work(arena, 20);
  for (int i = 0; i < 5; ++i) work(arena, 3);
  const long after = allocations.load();
  CHECK(after == before);
  CHECK(arena.peak_bytes() == peak);
  {  // one block now: consecutive pieces are neighbours across the old borders
    const Arena::Scope scope(arena);
    std::byte* p = arena.take<std::byte>(64);
    for (int i = 1; i < 5000; ++i) {
      std::byte* next = arena.take<std::byte>(64);
      if (next != p + 64) FAIL("piece " << i << " lies elsewhere");
      p = next;
    }
  }
  work(arena, 60);  // larger than ever: it grows again
  const long grown = allocations.load();
  CHECK(grown > before);
  work(arena, 60);
  const long steady = allocations.load();
  CHECK(steady == grown);
}

TEST_CASE("a piece larger than a block, and a moved arena") {
  Arena arena;
  {
    const Arena::Scope scope(arena);
    CHECK(arena.take<float>(10) != nullptr);
    float* large = arena.take<float>(1000000);
    large[999999] = 1;
  }
  Arena moved = std::move(arena);
  const long before = allocations.load();
  {
    const Arena::Scope scope(moved);
    CHECK(moved.take<float>(10) != nullptr);
    CHECK(moved.take<float>(1000000) != nullptr);
  }
  const long after = allocations.load();
  CHECK(after == before);
}

TEST_CASE("ops of the CPU backend allocate nothing after the first call") {
  for (const DType format : {DType::f32, DType::bf16}) {
    Cpu cpu(CpuOptions{.threads = 2});
    Arena arena;
    Context<Cpu> ctx{cpu, arena};
    const std::int64_t m = 90, k = 1031, n = 300, heads = 4, d = 133;
    const AnyTensor weight(Tensor<float>(Shape{n, k}));
    const PackedMatrix w = ops::pack(ctx, std::span(&weight, 1), format);
    const KeyValuesPlan plan = ops::plan_key_values(ctx, format, heads, d, 300);
    Tensor<std::byte> keys(Shape{static_cast<std::int64_t>(plan.bytes)}), values(Shape{static_cast<std::int64_t>(plan.bytes)});
    const KeyValues kv{format, heads, d, plan.capacity, keys.data(), values.data()};
    Tensor<float> x(Shape{m, k}), y(Shape{m, n}), q(Shape{m, heads * d}), out(Shape{m, heads * d}), one(Shape{k});
    const auto step = [&](std::int64_t rows) {
      const Matrix<const float> xv = std::as_const(x).view<2>().rows(0, rows), qv = std::as_const(q).view<2>().rows(0, rows);
      ops::linear(ctx, xv, w, Epilogue<float>{.bias = nullptr, .activation = Activation::gelu, .residual = {}}, y.view<2>().rows(0, rows));
      ops::append_key_values(ctx, qv, qv, 200, kv);
      ops::attention(ctx, qv, kv, 200 + rows, 200, {.causal = true, .window = 0}, 0.2, out.view<2>().rows(0, rows));
      ops::rms_norm(ctx, xv, std::as_const(one).view<1>(), 1e-5, x.view<2>().rows(0, rows));
    };
    step(m);
    const long before = allocations.load();
    for (int i = 0; i < 3; ++i) step(m);
    for (int i = 0; i < 3; ++i) step(1);
    const long after = allocations.load();
    CHECK_MESSAGE(after == before, std::string(dtype_name(format)));
  }
}

}  // namespace
