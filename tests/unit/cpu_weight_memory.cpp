// Where a Cpu lays packed weights: one behind the other, so that huge pages hold all of them; each stays as long as it is used.
#include <doctest/doctest.h>

#include <m2lm/core.hpp>

#include <cstdint>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

namespace {

using namespace m2lm;

constexpr std::size_t kib = 1024, mib = 1024 * kib;

TEST_CASE("matrices of some size lie behind each other, on borders of cache lines") {
  detail::WeightMemory memory;
  const std::shared_ptr<std::byte> first = memory.take(3 * mib - 1), second = memory.take(mib), third = memory.take(2 * mib);
  CHECK(second.get() == first.get() + 3 * mib);
  CHECK(third.get() == second.get() + mib);
  CHECK(reinterpret_cast<std::uintptr_t>(first.get()) % (2 * mib) == 0);
}

TEST_CASE("small ones and very large ones have memory of their own") {
  detail::WeightMemory memory;
  const std::shared_ptr<std::byte> first = memory.take(mib), small = memory.take(kib), large = memory.take(100 * mib), none = memory.take(0), last = memory.take(mib);
  CHECK(last.get() == first.get() + mib);
  for (const auto& p : {small, large, none}) CHECK(p != nullptr);
}

TEST_CASE("a buffer that is full is followed by another, and nothing overlaps") {
  detail::WeightMemory memory;
  std::vector<std::pair<std::shared_ptr<std::byte>, std::size_t>> all;
  for (std::size_t i = 0; i < 60; ++i) {
    const std::size_t bytes = 600 * kib + i * 100 * kib + i;
    all.emplace_back(memory.take(bytes), bytes);
    std::memset(all.back().first.get(), static_cast<int>(i), bytes);
  }
  for (std::size_t i = 0; i < all.size(); ++i) {
    bool same = true;
    for (std::size_t j = 0; j < all[i].second; j += 509) same = same && all[i].first.get()[j] == static_cast<std::byte>(i);
    CHECK_MESSAGE(same, i);
  }
}

TEST_CASE("what is taken outlives the memory, and what was taken before and after it") {
  std::shared_ptr<std::byte> kept;
  std::weak_ptr<std::byte> buffer;
  {
    detail::WeightMemory memory;
    const std::shared_ptr<std::byte> before = memory.take(mib);
    kept = memory.take(mib);
    buffer = memory.take(mib);
  }
  std::memset(kept.get(), 7, mib);
  CHECK(!buffer.expired());
  kept.reset();
  CHECK(buffer.expired());
}

TEST_CASE("a buffer whose matrices are gone is given back: the next begins anew") {
  detail::WeightMemory memory;
  std::weak_ptr<std::byte> gone = memory.take(mib);
  CHECK(gone.expired());
  const std::shared_ptr<std::byte> first = memory.take(mib), second = memory.take(mib);
  CHECK(second.get() == first.get() + mib);
}

}  // namespace
