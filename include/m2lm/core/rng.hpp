// Random numbers: Philox4x32-10, counter-based, the same on every machine.
// Floor: core. May include: config.
#pragma once

#include <m2lm/config.hpp>

#include <array>
#include <cstdint>

namespace m2lm::inline M2LM_ABI {

/// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011). State is a key and a counter, so a
/// session's generator can be copied, stored and compared.
class Rng {
  std::uint64_t seed_ = 0;
  std::uint64_t counter_ = 0;

 public:
  constexpr Rng() = default;
  /// Equal seeds give equal numbers, on every machine.
  constexpr explicit Rng(std::uint64_t seed) : seed_(seed) {}

  /// What it was made with.
  constexpr std::uint64_t seed() const { return seed_; }
  /// How many numbers were drawn.
  constexpr std::uint64_t counter() const { return counter_; }

  /// The generator itself: counter `c` under `key` after ten rounds.
  static constexpr std::array<std::uint32_t, 4> block(std::array<std::uint32_t, 4> c, std::array<std::uint32_t, 2> key) {
    for (int round = 0; round < 10; ++round) {
      const std::uint64_t p0 = std::uint64_t{0xD2511F53U} * c[0];
      const std::uint64_t p1 = std::uint64_t{0xCD9E8D57U} * c[2];
      c = {static_cast<std::uint32_t>(p1 >> 32) ^ c[1] ^ key[0], static_cast<std::uint32_t>(p1),
           static_cast<std::uint32_t>(p0 >> 32) ^ c[3] ^ key[1], static_cast<std::uint32_t>(p0)};
      key[0] += 0x9E3779B9U;
      key[1] += 0xBB67AE85U;
    }
    return c;
  }

  /// 64 uniformly random bits.
  constexpr std::uint64_t next() {
    const auto r = block({static_cast<std::uint32_t>(counter_), static_cast<std::uint32_t>(counter_ >> 32), 0, 0},
                         {static_cast<std::uint32_t>(seed_), static_cast<std::uint32_t>(seed_ >> 32)});
    ++counter_;
    return (static_cast<std::uint64_t>(r[1]) << 32) | r[0];
  }
  /// Uniform in [0, 1), 53 bits.
  constexpr double uniform() { return static_cast<double>(next() >> 11) * 0x1.0p-53; }

  friend constexpr bool operator==(const Rng&, const Rng&) = default;
};

}  // namespace m2lm
