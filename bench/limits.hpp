// What the machine can do at most: products per second of one core by kind of instruction, and the speed of reading memory. Shared by
// bench/kernels and m2lm-bench, so that both print the same limits beside what they time.
#pragma once

#include <m2lm/core.hpp>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>

#if M2LM_X86_64
#include <immintrin.h>
#endif

namespace limits {

using Clock = std::chrono::steady_clock;

inline double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

/// A buffer as weights are allocated, written once by each thread that will read it.
class Reader {
  m2lm::ThreadPool& pool_;
  std::int64_t bytes_;
  m2lm::detail::AlignedBytes data_;

  using Line [[gnu::vector_size(16)]] = std::uint64_t;

  // Every 16 bytes once, in `streams` places in turns, four lines of each at a time.
  static std::uint64_t read_all(const std::byte* data, std::int64_t bytes, int streams) {
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

 public:
  Reader(m2lm::ThreadPool& pool, std::int64_t bytes)
      : pool_(pool), bytes_(bytes), data_(m2lm::detail::aligned_bytes(static_cast<std::size_t>(bytes))) {
    pool_.run([&](int part) {
      const m2lm::Range mine = m2lm::split(bytes_, pool_.size(), part, 4096);
      std::memset(data_.get() + mine.begin, 1, static_cast<std::size_t>(mine.end - mine.begin));
    });
  }
  /// Seconds to read the first `bytes` once: the ceiling of what a product with one row can do. streams: places read in turns.
  double run(std::int64_t bytes, int streams) {
    std::atomic<std::uint64_t> sink{0};
    const auto start = Clock::now();
    pool_.run([&](int part) {
      const m2lm::Range mine = m2lm::split(bytes, pool_.size(), part, 4096);
      sink.fetch_or(read_all(data_.get() + mine.begin, mine.end - mine.begin, streams));
    });
    return seconds_since(start);
  }
  /// GB/s of the whole buffer, the faster of reading in one and in four places.
  double gigabytes_per_second() {
    const double one = run(bytes_, 1), four = run(bytes_, 4);
    return static_cast<double>(bytes_) / (one < four ? one : four) / 1e9;
  }
};

/// Kinds of products that a core is asked for. A multiply-add counts as two operations.
enum class Products : std::uint8_t { f32, bf16_dot, int8_dot, amx_bf16, amx_int8 };

#if M2LM_X86_64
namespace detail {

constexpr int product_steps = 20000;

// product_steps times an instruction that overwrites its sum, in twelve chains, which hide every latency. In assembly: g++ 12 copies the sums
// of an intrinsic to the stack and back.
#define M2LM_TWELVE_CHAINS(instruction)                                                                                                      \
  for (int i = 0; i < product_steps; ++i)                                                                                                    \
  asm volatile(instruction " %12, %12, %0\n\t" instruction " %12, %12, %1\n\t" instruction " %12, %12, %2\n\t"                               \
               instruction " %12, %12, %3\n\t" instruction " %12, %12, %4\n\t" instruction " %12, %12, %5\n\t"                               \
               instruction " %12, %12, %6\n\t" instruction " %12, %12, %7\n\t" instruction " %12, %12, %8\n\t"                               \
               instruction " %12, %12, %9\n\t" instruction " %12, %12, %10\n\t" instruction " %12, %12, %11"                                  \
               : "+v"(s[0]), "+v"(s[1]), "+v"(s[2]), "+v"(s[3]), "+v"(s[4]), "+v"(s[5]), "+v"(s[6]), "+v"(s[7]), "+v"(s[8]), "+v"(s[9]),      \
                 "+v"(s[10]), "+v"(s[11])                                                                                                    \
               : "v"(a))

[[gnu::target("avx2,fma")]] inline double rate_of_256_bits() {
  __m256i s[12] = {};
  const __m256i a = _mm256_set1_epi32(0x3c023c02);
  const auto start = Clock::now();
  M2LM_TWELVE_CHAINS("vfmadd231ps");
  return product_steps * 12.0 * 8 / seconds_since(start);
}

[[gnu::target("avx512f,avx512bf16,avx512vnni")]] inline double rate_of_512_bits(Products kind) {
  __m512i s[12] = {};
  const __m512i a = _mm512_set1_epi32(0x3c023c02);
  const auto start = Clock::now();
  if (kind == Products::int8_dot) M2LM_TWELVE_CHAINS("vpdpbusd");
  else if (kind == Products::bf16_dot) M2LM_TWELVE_CHAINS("vdpbf16ps");
  else M2LM_TWELVE_CHAINS("vfmadd231ps");
  const double per_instruction = kind == Products::int8_dot ? 64 : kind == Products::bf16_dot ? 32 : 16;
  return product_steps * 12.0 * per_instruction / seconds_since(start);
}
#undef M2LM_TWELVE_CHAINS

// Four sums of two by two tiles of 16 x 64 bytes.
struct alignas(64) TileConfig {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

[[gnu::target("amx-tile,amx-bf16,amx-int8")]] inline double amx_rate(bool bf16) {
  alignas(64) std::byte values[1024];
  std::memset(values, 0x3c, sizeof(values));
  const TileConfig config;
  _tile_loadconfig(&config);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_loadd(4, values, 64);
  _tile_loadd(5, values, 64);
  _tile_loadd(6, values, 64);
  _tile_loadd(7, values, 64);
  constexpr int steps = 2000;
  const auto start = Clock::now();
  if (bf16) {
    for (int i = 0; i < steps; ++i) {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  } else {
    for (int i = 0; i < steps; ++i) {
      _tile_dpbssd(0, 4, 6);
      _tile_dpbssd(1, 4, 7);
      _tile_dpbssd(2, 5, 6);
      _tile_dpbssd(3, 5, 7);
    }
  }
  alignas(64) std::byte sums[1024];
  _tile_stored(0, sums, 64);
  const double seconds = seconds_since(start);
  _tile_release();
  return steps * 4.0 * 16 * 16 * (bf16 ? 32 : 64) / seconds;
}

}  // namespace detail
#endif

/// 10^9 operations per second of one core, the best of many short runs. 0 where `level` or the machine has no such instruction, or there
/// is no loop for it. requires a level that detect_isa() allows.
inline double peak([[maybe_unused]] Products kind, [[maybe_unused]] m2lm::IsaLevel level) {
  double best = 0;
#if M2LM_X86_64
  using m2lm::IsaLevel;
  const bool amx = level == IsaLevel::amx;
  for (int i = 0; i < 200; ++i) {
    double rate = 0;
    if (kind == Products::f32 && level >= IsaLevel::avx512) rate = detail::rate_of_512_bits(kind);
    if (kind == Products::f32 && level == IsaLevel::avx2) rate = detail::rate_of_256_bits();
    if (kind == Products::bf16_dot && level >= IsaLevel::avx512_bf16) rate = detail::rate_of_512_bits(kind);
    if (kind == Products::int8_dot && level >= IsaLevel::avx512 && m2lm::detail::has_int8_dot(level)) rate = detail::rate_of_512_bits(kind);
    if (kind == Products::amx_bf16 && amx) rate = detail::amx_rate(true);
    if (kind == Products::amx_int8 && amx) rate = detail::amx_rate(false);
    if (rate > best) best = rate;
  }
#endif
  return best * 2 / 1e9;
}

}  // namespace limits
