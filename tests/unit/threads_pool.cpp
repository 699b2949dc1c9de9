// ThreadPool: every part once per run, writes seen by the caller, many runs, several callers, more threads than cores.
#include <doctest/doctest.h>

#include <m2lm/core.hpp>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <set>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace {

using namespace m2lm;

TEST_CASE("every part runs once per call, and what it wrote is there afterwards") {
  for (const int threads : {1, 2, 3, 7}) {
    ThreadPool pool(threads);
    CHECK(pool.size() == threads);
    std::vector<long> count(static_cast<std::size_t>(threads));  // plain: run() must order the writes before its return
    for (int i = 0; i < 2000; ++i) pool.run([&](int part) { ++count[static_cast<std::size_t>(part)]; });
    for (const long n : count) CHECK(n == 2000);
  }
}

TEST_CASE("a part sees what the caller wrote before the call, also after the threads have parked") {
  ThreadPool pool(3);
  std::vector<int> in(3), out(3);
  for (int i = 0; i < 30; ++i) {
    for (int& x : in) x = i;
    if (i % 3 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(2));
    pool.run([&](int part) { out[static_cast<std::size_t>(part)] = in[static_cast<std::size_t>(part)] + part; });
    for (int part = 0; part < 3; ++part) CHECK(out[static_cast<std::size_t>(part)] == i + part);
  }
}

TEST_CASE("more parts than cores: no more threads than cores run them, each its own in order") {
  const int cores = ThreadPool::available_cores();
  ThreadPool pool(4 * cores + 1);
  std::vector<std::thread::id> ran_by(static_cast<std::size_t>(pool.size()));
  for (int i = 0; i < 100; ++i) {
    pool.run([&](int part) { ran_by[static_cast<std::size_t>(part)] = std::this_thread::get_id(); });
    CHECK(std::set<std::thread::id>(ran_by.begin(), ran_by.end()).size() == static_cast<std::size_t>(cores));
    CHECK(ran_by.front() == std::this_thread::get_id());
  }
}

TEST_CASE("several callers at once: every call runs all its parts") {
  ThreadPool pool(2);
  std::vector<std::thread> callers;
  std::atomic<long> total{0};
  for (int c = 0; c < 4; ++c)
    callers.emplace_back([&] {
      for (int i = 0; i < 500; ++i) {
        long parts[2] = {0, 0};
        pool.run([&](int part) { ++parts[part]; });
        total.fetch_add(parts[0] + parts[1]);
      }
    });
  for (std::thread& t : callers) t.join();
  CHECK(total.load() == 4 * 500 * 2);
}

TEST_CASE("pools come and go; one that never ran ends too") {
  for (int i = 0; i < 50; ++i) {
    ThreadPool pool(i % 4 + 1);
    std::atomic<int> parts{0};
    if (i % 2 == 0) pool.run([&](int) { parts.fetch_add(1); });
    CHECK(parts.load() == (i % 2 == 0 ? pool.size() : 0));
  }
}

TEST_CASE("two pools at once do not disturb each other, nor does one inside the other") {
  ThreadPool outer(2), inner(2);
  std::atomic<int> parts{0};
  for (int i = 0; i < 100; ++i)
    outer.run([&](int) { inner.run([&](int) { parts.fetch_add(1); }); });
  CHECK(parts.load() == 100 * 2 * 2);
}

TEST_CASE("sizes outside 0 to 1024 are errors; 0 is one per core") {
  CHECK_THROWS_WITH_AS(ThreadPool(-2), "m2lm: threads = -2: give 0 (one per core) or 1 to 1024", OptionError);
  CHECK_THROWS_AS(ThreadPool(1025), OptionError);
  CHECK(ThreadPool::available_cores() >= 1);
  CHECK(ThreadPool(0).size() == ThreadPool::available_cores());
}

TEST_CASE("split covers the range in order, at multiples of the grain") {
  for (const std::int64_t count : {0, 1, 2, 7, 64, 1000, 1001})
    for (const int parts : {1, 2, 3, 8, 13})
      for (const std::int64_t grain : {1, 8, 32}) {
        std::int64_t at = 0;
        for (int part = 0; part < parts; ++part) {
          const Range r = split(count, parts, part, grain);
          CHECK(r.begin == at);
          CHECK(r.end >= r.begin);
          CHECK((r.begin % grain == 0 || r.begin == count));
          at = r.end;
        }
        CHECK(at == count);
      }
  static_assert(split(10, 3, 1).begin == 3 && split(10, 3, 1).end == 6);
}

TEST_CASE("a Cpu shared by several threads gives each the bits it would get alone") {
  const Cpu cpu(CpuOptions{.threads = 2});
  const std::int64_t m = 9, k = 220, n = 200;  // enough for the pool to be used
  Tensor<float> weights(Shape{n, k}), x(Shape{m, k});
  Rng rng(5);
  for (float& v : weights.span()) v = static_cast<float>(rng.uniform() - 0.5);
  for (float& v : x.span()) v = static_cast<float>(rng.uniform() - 0.5);
  const AnyTensor weight(std::move(weights));
  for (const DType format : {DType::f32, DType::bf16}) {
    Cpu own(CpuOptions{.threads = 1});
    Arena own_arena;
    Context<Cpu> own_ctx{own, own_arena};
    const PackedMatrix w = ops::pack(own_ctx, std::span(&weight, 1), format);
    Tensor<float> expected(Shape{m, n});
    ops::linear(own_ctx, std::as_const(x).view<2>(), w, {}, expected.view<2>());
    std::atomic<int> wrong{0};
    std::vector<std::thread> sessions;
    for (int s = 0; s < 3; ++s)
      sessions.emplace_back([&] {
        Cpu mine = cpu;  // shares the pool
        Arena arena;
        Context<Cpu> ctx{mine, arena};
        Tensor<float> y(Shape{m, n});
        for (int i = 0; i < 50; ++i) {
          ops::linear(ctx, std::as_const(x).view<2>(), w, {}, y.view<2>());
          if (std::memcmp(y.data(), expected.data(), static_cast<std::size_t>(m * n) * sizeof(float)) != 0) wrong.fetch_add(1);
        }
      });
    for (std::thread& t : sessions) t.join();
    CHECK_MESSAGE(wrong.load() == 0, std::string(dtype_name(format)));
  }
}

}  // namespace
