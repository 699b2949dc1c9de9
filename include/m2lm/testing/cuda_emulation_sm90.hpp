// The vocabulary of backends/cuda/device_sm90.cuh for a host without CUDA, over cuda_emulation.hpp. Empty under nvcc.
// Floor: testing. May include: models, train.
#pragma once

// What it finds besides what cuda_emulation.hpp finds:
// - a missing or wrong wait for a barrier: boxes arrive as late as can be, and are NaN until then;
// - memory that is asked for again while a product reads it, and a product of what is not there: operands of wgmma are read when it begins,
//   and must be the same when it is waited for;
// - a missing wgmma_wait (sums are NaN until then), wgmma_commit or wgmma_fence (a product behind a wait without one);
// - stores in shared memory that a product reads without fence_proxy_async;
// - descriptors of another swizzle than 128 bytes, boxes on no border, barriers without barrier_init or with too many arrivals.
// What it cannot find: a missing fence_barrier_init, and registers that the compiler moves while a product uses them (`hold`).

#if !defined(__CUDACC__)

#include <m2lm/testing/cuda_emulation.hpp>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#define M2LM_HAS_WARPGROUPS 1
#define M2LM_GRID_CONSTANT const

namespace m2lm::inline M2LM_ABI::cuda {

struct TensorMap {
  const std::byte* data;
  std::int64_t columns, rows, planes;
  int box_rows;
};

template <class E>
TensorMap make_tile_map(Device&, const E* data, std::int64_t columns, std::int64_t rows, std::int64_t planes, int box_rows) {
  static_assert(sizeof(E) == 2);
  require<DeviceError>(
      reinterpret_cast<std::uintptr_t>(data) % 16 == 0 && columns % 8 == 0 && box_rows >= 1 && box_rows <= 256 && rows >= 1 && planes >= 1,
      "m2lm::cuda::make_tile_map of [", planes, ", ", rows, ", ", columns, "]");
  return {reinterpret_cast<const std::byte*>(data), columns, rows, planes, box_rows};
}

template <class... Parameter>
bool has_body(Device&, void (*)(Parameter...)) {
  return true;
}

using Barrier = std::uint64_t;

namespace detail {
inline std::uint32_t shared_address(const void* p) {
  return static_cast<std::uint32_t>(reinterpret_cast<std::uintptr_t>(p) & emulation::Engine::shared_mask);
}
}  // namespace detail

namespace emulation {

/// What a Barrier holds.
struct BarrierState {
  std::uint64_t parity : 1, pending : 20, count : 20;
  std::uint64_t bytes : 23;  ///< expected and not yet there, modulo 2^23: they may come first

  void expect(unsigned more) { bytes = (bytes + more) & 0x7FFFFF; }
  void arrived(unsigned some) { bytes = (bytes - some) & 0x7FFFFF; }

  static BarrierState read(const Barrier* from, const char* what, Place place) {
    const auto state = std::bit_cast<BarrierState>(*from);
    if (state.count == 0 || state.count == 0xFFFFF) Engine::instance().fail(concat(what, " at ", place, " of a barrier without barrier_init"));
    return state;
  }
  void write(Barrier* to) {
    if (pending == 0 && bytes == 0) {
      parity = parity == 0 ? 1 : 0;
      pending = count;
    }
    *to = std::bit_cast<Barrier>(*this);
  }
};
static_assert(sizeof(BarrierState) == sizeof(Barrier));

inline void arrive(Barrier* barrier, unsigned bytes, const char* what, Place place) {
  auto state = BarrierState::read(barrier, what, place);
  if (state.pending == 0)
    Engine::instance().fail(concat(what, " at ", place, ": more arrivals than the ", std::uint64_t{state.count}, " of a phase"));
  state.pending = (state.pending - 1) & 0xFFFFF;
  state.expect(bytes);
  state.write(barrier);
}

/// 16-byte piece `address` of a swizzle of 128 bytes: bits 4 to 6 change with bits 7 to 9.
constexpr std::uintptr_t swizzle_128(std::uintptr_t address) { return address ^ (address >> 3 & 0x70U); }

/// One wgmma that has begun.
struct WarpgroupProduct {
  std::array<const std::uint32_t*, 128> a{};
  std::array<std::array<std::uint32_t, 4>, 128> a_then{};
  std::vector<const std::byte*> b;  ///< where each element lies, [columns][16]
  std::vector<std::uint16_t> b_then;
  Place place{};
};

/// Accumulators of products in flight: the registers are NaN, the sums are here.
struct Accumulators {
  std::array<float*, 128> registers{};
  std::vector<float> sums;                ///< [128][columns / 2]
  std::array<unsigned, 4> outstanding{};  ///< products that a warp has not waited for
};

/// Of one block.
struct WarpgroupState {
  struct Pending {
    std::shared_ptr<WarpgroupProduct> product;
    std::shared_ptr<Accumulators> accumulators;
    std::uint64_t group;
  };
  struct Warp {
    std::vector<Pending> pending;
    std::uint64_t groups = 0;  ///< committed
    bool fenced = false;
  };
  std::uint64_t block = 0;
  std::array<Warp, 32> warps{};

  static WarpgroupState& of_block() {
    static WarpgroupState state;
    if (state.block != Engine::instance().blocks_begun()) {
      state.warps.fill({});
      state.block = Engine::instance().blocks_begun();
    }
    return state;
  }
  static Warp& of_warp() { return of_block().warps[Engine::instance().thread_number() / 32]; }
};

struct WarpgroupOperands {
  float* d;
  const std::uint32_t* a;
  std::uint64_t b;
  bool accumulate;
  Place place;
};

inline std::uint16_t element_at(const std::byte* p) {
  std::uint16_t bits = 0;
  std::memcpy(&bits, p, sizeof(bits));
  return bits;
}

/// Row of a [64, …] and column of d [64, …] that register i of a thread's accumulators is.
constexpr int row_of_sum(int thread, int i) { return thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8; }
constexpr int column_of_sum(int thread, int i) { return i / 4 * 8 + thread % 4 * 2 + i % 2; }

/// Where element (k, n) of b lies. PTX ISA, "Strides": between 8 rows of 128 bytes the stride offset; of rows of N, between 64 columns the
/// leading offset.
template <bool Transposed>
const std::byte* element_of_b(std::uint64_t descriptor, int k, int n) {
  const auto field = [&](int bit) { return static_cast<std::uintptr_t>(descriptor >> bit & 0x3FFFU) << 4; };
  const int across = Transposed ? n % 64 : k, along = Transposed ? k : n;
  const std::uintptr_t offset = static_cast<std::uintptr_t>(along % 8 * 128 + across * 2) + static_cast<std::uintptr_t>(along / 8) * field(32) +
                                (Transposed ? static_cast<std::uintptr_t>(n / 64) * field(16) : 0);
  return Engine::instance().at_shared_address(swizzle_128(field(0) + offset));
}

template <class E, int N, bool Transposed>
void begin_product(const WarpgroupThreads& threads) {
  const auto of = [&](std::size_t thread) -> const WarpgroupOperands& { return *static_cast<WarpgroupOperands*>(threads[thread]); };
  Engine& engine = Engine::instance();
  WarpgroupState& state = WarpgroupState::of_block();
  const unsigned first_warp = engine.thread_number() / 128 * 4;
  auto product = std::make_shared<WarpgroupProduct>();
  product->place = of(0).place;
  for (unsigned w = 0; w < 4; ++w)
    if (!state.warps[first_warp + w].fenced) engine.fail(concat("wgmma at ", product->place, " without wgmma_fence since the last wgmma_wait"));
  if (of(0).b >> 62 != 1 || (of(0).b >> 49 & 7U) != 0)
    engine.fail(concat("wgmma at ", product->place, ": a descriptor of another layout than 128 bytes"));
  float a[64][16], b[N][16];
  const auto value = [](std::uint32_t word, int i) { return to_float(E{static_cast<std::uint16_t>(word >> (16 * i) & 0xffffU)}); };
  for (std::size_t t = 0; t < 128; ++t) {
    if (of(t).b != of(0).b || of(t).accumulate != of(0).accumulate)
      engine.fail(concat("wgmma at ", product->place, ": threads have different operands"));
    product->a[t] = of(t).a;
    const int row = row_of_sum(static_cast<int>(t), 0), column = static_cast<int>(t) % 4 * 2;
    for (int r = 0; r < 4; ++r) {
      product->a_then[t][static_cast<std::size_t>(r)] = of(t).a[r];
      for (int i = 0; i < 2; ++i) a[row + r % 2 * 8][column + r / 2 * 8 + i] = value(of(t).a[r], i);
    }
  }
  for (int n = 0; n < N; ++n)
    for (int k = 0; k < 16; ++k) {
      const std::byte* const at = element_of_b<Transposed>(of(0).b, k, n);
      if (!engine.is_fenced(at)) engine.fail(concat("wgmma at ", product->place, " of what was stored without fence_proxy_async"));
      product->b.push_back(at);
      product->b_then.push_back(element_at(at));
      b[n][k] = to_float(E{product->b_then.back()});
    }

  std::shared_ptr<Accumulators> sums;
  for (const WarpgroupState::Pending& pending : state.warps[first_warp].pending)
    if (pending.accumulators->registers[0] == of(0).d) sums = pending.accumulators;
  if (!sums) {
    sums = std::make_shared<Accumulators>();
    sums->sums.resize(128 * N / 2);
    for (std::size_t t = 0; t < 128; ++t) {
      sums->registers[t] = of(t).d;
      std::memcpy(sums->sums.data() + t * (N / 2), of(t).d, N / 2 * sizeof(float));
      std::memset(of(t).d, 0xFF, N / 2 * sizeof(float));
    }
  }
  for (int t = 0; t < 128; ++t)
    for (int i = 0; i < N / 2; ++i) {
      float& sum = sums->sums[static_cast<std::size_t>(t * (N / 2) + i)];
      double total = of(0).accumulate ? static_cast<double>(sum) : 0.0;
      const float* const row = a[row_of_sum(t, i)];
      const float* const column = b[column_of_sum(t, i)];
      for (int k = 0; k < 16; ++k) total += static_cast<double>(row[k]) * static_cast<double>(column[k]);
      sum = static_cast<float>(total);
    }
  for (unsigned w = 0; w < 4; ++w) {
    ++sums->outstanding[w];
    state.warps[first_warp + w].pending.push_back({product, sums, state.warps[first_warp + w].groups});
  }
}

/// The lanes of a warp get the sums of the groups but the newest.
inline void finish_products(unsigned newest) {
  Engine& engine = Engine::instance();
  const unsigned warp = engine.thread_number() / 32, of_group = warp % 4;
  WarpgroupState::Warp& state = WarpgroupState::of_block().warps[warp];
  state.fenced = false;
  std::vector<WarpgroupState::Pending> kept;
  for (WarpgroupState::Pending& pending : state.pending) {
    if (pending.group + newest >= state.groups) {
      kept.push_back(std::move(pending));
      continue;
    }
    const WarpgroupProduct& product = *pending.product;
    for (std::size_t t = of_group * 32; t < of_group * 32 + 32; ++t)
      if (std::memcmp(product.a[t], product.a_then[t].data(), sizeof(product.a_then[t])) != 0)
        engine.fail(concat("registers of the wgmma at ", product.place, " have changed before its wgmma_wait"));
    for (std::size_t i = 0; i < product.b.size(); ++i)
      if (element_at(product.b[i]) != product.b_then[i])
        engine.fail(concat("shared memory of the wgmma at ", product.place, " has changed before its wgmma_wait"));
    Accumulators& sums = *pending.accumulators;
    if (--sums.outstanding[of_group] != 0) continue;
    const std::size_t count = sums.sums.size() / 128;
    for (std::size_t t = of_group * 32; t < of_group * 32 + 32; ++t) {
      for (std::size_t i = 0; i < count; ++i)
        if (bits_of_float(sums.registers[t][i]) != 0xFFFFFFFFU)
          engine.fail(concat("sums of the wgmma at ", product.place, " were written before its wgmma_wait"));
      std::memcpy(sums.registers[t], sums.sums.data() + t * count, count * sizeof(float));
    }
  }
  state.pending = std::move(kept);
}

}  // namespace emulation

inline void barrier_init(Barrier* barrier, unsigned count) {
  emulation::BarrierState state{};
  state.pending = state.count = count & 0xFFFFF;
  *barrier = std::bit_cast<Barrier>(state);
  emulation::Engine::instance().watch_stores();
}
inline void fence_barrier_init() {}
inline void barrier_arrive(Barrier* barrier, emulation::Place place = emulation::Place::here()) {
  emulation::arrive(barrier, 0, "barrier_arrive", place);
}
inline void barrier_arrive_expect(Barrier* barrier, unsigned bytes, emulation::Place place = emulation::Place::here()) {
  emulation::arrive(barrier, bytes, "barrier_arrive_expect", place);
}
inline void barrier_wait(Barrier* barrier, unsigned parity, emulation::Place place = emulation::Place::here()) {
  emulation::Engine::instance().wait_until("barrier_wait", place,
                                           [=] { return emulation::BarrierState::read(barrier, "barrier_wait", place).parity != (parity & 1U); });
}
inline void fence_proxy_async() { emulation::Engine::instance().fence_stores(); }

inline void copy_box(void* shared, const TensorMap& map, int column, int row, int plane, Barrier* barrier,
                     emulation::Place place = emulation::Place::here()) {
  emulation::Engine& engine = emulation::Engine::instance();
  engine.require_aligned(shared, 1024, "copy_box");
  auto* const to = static_cast<std::byte*>(shared);
  std::memset(to, 0xFF, static_cast<std::size_t>(map.box_rows) * 128);  // a device may write from here on
  engine.do_later("copy_box", place, [=] {
    for (int r = 0; r < map.box_rows; ++r)
      for (int c = 0; c < 64; c += 8) {
        const std::uintptr_t at = emulation::swizzle_128(reinterpret_cast<std::uintptr_t>(to) + static_cast<std::uintptr_t>(r * 128 + c * 2));
        void* const piece = reinterpret_cast<void*>(at);
        const bool inside = row + r >= 0 && row + r < map.rows && column + c >= 0 && column + c < map.columns && plane >= 0 && plane < map.planes;
        if (inside)
          std::memcpy(piece, map.data + ((plane * map.rows + row + r) * map.columns + column + c) * 2, 16);
        else
          std::memset(piece, 0, 16);
        emulation::Engine::instance().forget_store(piece);
      }
    auto state = emulation::BarrierState::read(barrier, "copy_box", place);
    state.arrived(static_cast<unsigned>(map.box_rows) * 128);
    state.write(barrier);
  });
}

inline void wgmma_fence(emulation::Place place = emulation::Place::here()) {
  emulation::Engine::instance().meet_warp("wgmma_fence", place, nullptr,
                                          [](const emulation::Lanes&) { emulation::WarpgroupState::of_warp().fenced = true; });
}
inline void wgmma_commit(emulation::Place place = emulation::Place::here()) {
  emulation::Engine::instance().meet_warp("wgmma_commit", place, nullptr,
                                          [](const emulation::Lanes&) { ++emulation::WarpgroupState::of_warp().groups; });
}
template <int N>
void wgmma_wait(emulation::Place place = emulation::Place::here()) {
  emulation::Engine::instance().meet_warp("wgmma_wait", place, nullptr, [](const emulation::Lanes&) { emulation::finish_products(N); });
}
template <int N>
void release_registers(emulation::Place place = emulation::Place::here()) {
  emulation::Engine::instance().meet_warpgroup("release_registers", place, nullptr, [](const emulation::WarpgroupThreads&) {});
}
template <int N>
void claim_registers(emulation::Place place = emulation::Place::here()) {
  emulation::Engine::instance().meet_warpgroup("claim_registers", place, nullptr, [](const emulation::WarpgroupThreads&) {});
}
template <int N>
void hold(float (&)[N]) {}
template <int N>
void hold(std::uint32_t (&)[N][4]) {}

template <class E, int N, bool Transposed>
void wgmma(float (&d)[N / 2], const std::uint32_t (&a)[4], std::uint64_t b, bool accumulate, emulation::Place place = emulation::Place::here()) {
  static_assert(N == 64 || N == 128);
  emulation::WarpgroupOperands mine{d, a, b, accumulate, place};
  emulation::Engine::instance().meet_warpgroup("wgmma", place, &mine, &emulation::begin_product<E, N, Transposed>);
}

}  // namespace m2lm::cuda

#endif  // !defined(__CUDACC__)
