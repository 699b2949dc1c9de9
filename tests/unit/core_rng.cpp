// Philox4x32-10 against the known answers of its authors (Random123, file kat_vectors), and what a generator promises.
#include <doctest/doctest.h>

#include <m2lm/core.hpp>

#include <array>
#include <cstdint>

namespace {

using namespace m2lm;
using Four = std::array<std::uint32_t, 4>;

TEST_CASE("known answers") {
  static_assert(Rng::block({0, 0, 0, 0}, {0, 0}) == Four{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8});
  CHECK(Rng::block({0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff}, {0xffffffff, 0xffffffff}) ==
        Four{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd});
  CHECK(Rng::block({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}) ==
        Four{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1});
}

TEST_CASE("a generator is a value: equal states give equal numbers") {
  Rng a(12345), b(12345), c(12346), d(std::uint64_t{12345} << 32);
  CHECK(a == b);
  CHECK(a.next() == b.next());
  CHECK(Rng(12345) != a);
  Rng copy = a;
  for (int i = 0; i < 100; ++i) CHECK(copy.next() == a.next());
  CHECK(Rng(12345).next() != c.next());
  CHECK(Rng(12345).next() != d.next());  // the upper half of the seed counts
  CHECK(Rng().next() == ((std::uint64_t{0xe169c58d} << 32) | 0x6627e8d5U));
}

TEST_CASE("uniform numbers lie in [0, 1) and fill it evenly") {
  Rng rng(7);
  std::array<int, 16> bins{};
  double sum = 0;
  for (int i = 0; i < 160000; ++i) {
    const double x = rng.uniform();
    REQUIRE(x >= 0);
    REQUIRE(x < 1);
    ++bins[static_cast<std::size_t>(x * 16)];
    sum += x;
  }
  // Mean 1/2 with standard deviation 1/sqrt(12·160000) = 7.2e-4; chi² of 15 degrees of freedom exceeds 44 in 1 of 10,000.
  CHECK(sum / 160000 == doctest::Approx(0.5).epsilon(0.006));
  double chi = 0;
  for (const int n : bins) chi += (n - 10000.0) * (n - 10000.0) / 10000.0;
  CHECK(chi < 44);
}

}  // namespace
