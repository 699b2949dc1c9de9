// What kernels for sm_90 are written in (backends/cuda/device_sm90.cuh) against plain loops, on a device or on the emulator; and what the emulator
// finds in kernels that use it wrongly.
#include "device_support.hpp"

#include <m2lm/backends/cuda/device_sm90.cuh>

#include <support/environment.hpp>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace m2lm::inline M2LM_ABI::cuda {
namespace {

enum class Mistake {
  none,
  no_fence,
  no_commit,
  no_product_wait,
  no_barrier_wait,
  other_parity,
  less_expected,
  more_expected,
  no_init,
  second_arrival,
  copied_over,
  changed_registers,
  changed_sums,
  stored_without_fence,
  stored_and_fenced,
  other_swizzle,
  unaligned,
  part_of_a_warpgroup
};

/// y [64, N] = a [64, 64]·b, b [N, 64] in rows, or [64, N] if Transposed. One warpgroup; shared memory: b, on a border.
template <class E, int N, bool Transposed, Mistake mistake>
M2LM_KERNEL void multiply_tiles([[maybe_unused]] const E* a, [[maybe_unused]] M2LM_GRID_CONSTANT TensorMap map, [[maybe_unused]] float* y) {
#if defined(M2LM_HAS_WARPGROUPS)
  constexpr int boxes = Transposed ? N / 64 : 1, box_bytes = (Transposed ? 64 : N) * 128, bytes = boxes * box_bytes;
  M2LM_SHARED Barrier arrived[2];
  std::byte* const unaligned = dynamic_shared<std::byte>();
  std::byte* tile = unaligned + (1024 - reinterpret_cast<std::uintptr_t>(unaligned) % 1024) % 1024;
  if constexpr (mistake == Mistake::unaligned) tile += 128;
  const int thread = static_cast<int>(threadIdx.x);
  Barrier* const barrier = &arrived[mistake == Mistake::no_init ? 1 : 0];
  if (thread == 0) {
    barrier_init(&arrived[0], 1);
    arrived[1] = 0;
    fence_barrier_init();
  }
  __syncthreads();
  const auto ask = [&] {
    if (thread != 0) return;
    barrier_arrive_expect(barrier, bytes + (mistake == Mistake::more_expected ? 16 : mistake == Mistake::less_expected ? -128 : 0));
    for (int b = 0; b < boxes; ++b) copy_box(tile + b * box_bytes, map, 64 * b, 0, 0, barrier);
    if constexpr (mistake == Mistake::second_arrival) barrier_arrive(barrier);
    if constexpr (mistake == Mistake::second_arrival) barrier_arrive(barrier);
  };
  ask();
  if constexpr (mistake != Mistake::no_barrier_wait) barrier_wait(barrier, mistake == Mistake::other_parity ? 1 : 0);
  if constexpr (mistake == Mistake::stored_without_fence || mistake == Mistake::stored_and_fenced) {
    store16(tile + thread % (bytes / 16) * 16, load16(tile + thread % (bytes / 16) * 16));
    if constexpr (mistake == Mistake::stored_and_fenced) fence_proxy_async();
    __syncthreads();
  }
  if constexpr (mistake == Mistake::part_of_a_warpgroup)
    if (thread >= 96) return;

  const int row = thread / 32 * 16 + thread % 32 / 4, column = thread % 4 * 2;
  std::uint32_t left[4][4];
  for (int step = 0; step < 4; ++step)
    for (int i = 0; i < 4; ++i) {
      std::uint32_t pair[1];
      load_words(a + (row + i % 2 * 8) * 64 + step * 16 + i / 2 * 8 + column, pair);
      left[step][i] = pair[0];
    }
  float sum[N / 2] = {};
  if constexpr (mistake != Mistake::no_fence) wgmma_fence();
  M2LM_UNROLL
  for (int step = 0; step < 4; ++step) {
    std::uint64_t b = tile_descriptor(tile + step * (Transposed ? 2048 : 32), box_bytes);
    if constexpr (mistake == Mistake::other_swizzle) b ^= std::uint64_t{3} << 62;
    wgmma<E, N, Transposed>(sum, left[step], b, step > 0);
  }
  if constexpr (mistake == Mistake::copied_over) ask();
  if constexpr (mistake == Mistake::changed_registers) left[1][2] ^= 1U;
  if constexpr (mistake == Mistake::changed_sums) sum[3] = 0;
  if constexpr (mistake != Mistake::no_commit) wgmma_commit();
  if constexpr (mistake != Mistake::no_product_wait) wgmma_wait<0>();
  hold(sum);
  hold(left);
  for (int i = 0; i < N / 2; ++i) y[(row + i / 2 % 2 * 8) * N + i / 4 * 8 + column + i % 2] = sum[i];
#endif
}

constexpr std::size_t shared_bytes = 128 * 128 + 1024;

/// What the device says of the launch when the host waits for it; y is empty then.
template <Mistake mistake, class E = Bf16, int N = 64, bool Transposed = false>
std::string run(std::vector<float>& y, const std::vector<E>& a, const std::vector<E>& b) {
  Device device(0);
  const m2lm_test::DeviceArray<E> a_device(device, a), b_device(device, b);
  const m2lm_test::DeviceArray<float> y_device(device, 64 * N);
  const TensorMap map = make_tile_map(device, b_device.data(), Transposed ? N : 64, Transposed ? 64 : N, 1, Transposed ? 64 : N);
  launch(device, "multiply_tiles", multiply_tiles<E, N, Transposed, mistake>, {.block_x = 128, .shared_bytes = shared_bytes}, a_device.data(), map,
         y_device.data());
  y.clear();
  try {
    y = y_device.read();
  } catch (const DeviceError& error) {
    return error.what();
  }
  return "";
}

/// Whole numbers, so that sums are exact.
template <class E>
std::vector<E> whole_numbers(std::size_t count, std::uint64_t seed) {
  Rng rng(seed);
  std::vector<E> values(count);
  for (E& value : values) value = m2lm_test::element<E>(static_cast<float>(static_cast<int>(rng.next() % 33) - 16));
  return values;
}

template <class E, int N, bool Transposed>
void check_products() {
  Device device(0);
  if (device.properties().compute_capability != 90 || !has_body(device, multiply_tiles<E, N, Transposed, Mistake::none>)) {
    m2lm_test::skipped().push_back("no device of compute capability 9.0, or no image for it: products of a warpgroup");
    return;
  }
  const auto a = whole_numbers<E>(64 * 64, 1), b = whole_numbers<E>(64 * N, 2);
  std::vector<float> y;
  CHECK(run<Mistake::none, E, N, Transposed>(y, a, b) == "");
  REQUIRE(y.size() == 64 * N);
  std::size_t wrong = 0;
  for (std::size_t i = 0; i < 64; ++i)
    for (std::size_t j = 0; j < N; ++j) {
      float sum = 0;
      for (std::size_t k = 0; k < 64; ++k) sum += to_float(a[i * 64 + k]) * to_float(b[Transposed ? k * N + j : j * 64 + k]);
      wrong += y[i * N + j] != sum;
    }
  CHECK(wrong == 0);
}

TEST_CASE("products of a warpgroup with tiles that the device copies") {
  SUBCASE("bf16, [64, 64] in rows") { check_products<Bf16, 64, false>(); }
  SUBCASE("bf16, [64, 64] transposed") { check_products<Bf16, 64, true>(); }
  SUBCASE("bf16, [128, 64] in rows") { check_products<Bf16, 128, false>(); }
  SUBCASE("bf16, [64, 128] transposed: two boxes") { check_products<Bf16, 128, true>(); }
  SUBCASE("half, [128, 64] in rows") { check_products<Half, 128, false>(); }
  SUBCASE("half, [64, 128] transposed: two boxes") { check_products<Half, 128, true>(); }
}

#if !defined(__CUDACC__)
template <Mistake mistake>
std::string fault_of(std::vector<float>& y) {
  return run<mistake>(y, whole_numbers<Bf16>(64 * 64, 1), whole_numbers<Bf16>(64 * 64, 2));
}
bool has(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

TEST_CASE("what is wrong with barriers, copies and products of a warpgroup is a fault with a name") {
  std::vector<float> y;
  CHECK(fault_of<Mistake::none>(y) == "");
  CHECK(fault_of<Mistake::stored_and_fenced>(y) == "");
  CHECK(has(fault_of<Mistake::no_fence>(y), "without wgmma_fence"));
  CHECK(has(fault_of<Mistake::more_expected>(y), "waits in barrier_wait at vocabulary_sm90.cpp:"));
  CHECK(has(fault_of<Mistake::less_expected>(y), "for what nobody does"));
  CHECK(has(fault_of<Mistake::no_init>(y), "without barrier_init"));
  CHECK(has(fault_of<Mistake::second_arrival>(y), "more arrivals than the 1 of a phase"));
  CHECK(has(fault_of<Mistake::copied_over>(y), "shared memory of the wgmma at vocabulary_sm90.cpp:"));
  CHECK(has(fault_of<Mistake::changed_registers>(y), "registers of the wgmma"));
  CHECK(has(fault_of<Mistake::changed_sums>(y), "sums of the wgmma"));
  CHECK(has(fault_of<Mistake::stored_without_fence>(y), "without fence_proxy_async"));
  CHECK(has(fault_of<Mistake::other_swizzle>(y), "another layout than 128 bytes"));
  CHECK(has(fault_of<Mistake::unaligned>(y), "copy_box at an address that is no multiple of 1024"));
  CHECK(has(fault_of<Mistake::part_of_a_warpgroup>(y), "waits in wgmma"));
}

TEST_CASE("what has not been waited for is not there: boxes and sums are NaN, and a block that ends without its boxes is a fault") {
  std::vector<float> y;
  const auto all_nan = [&] {
    std::size_t count = 0;
    for (const float value : y) count += std::isnan(value);
    return y.size() == 64 * 64 && count == y.size();
  };
  CHECK(fault_of<Mistake::no_product_wait>(y) == "");
  CHECK(all_nan());
  CHECK(fault_of<Mistake::no_commit>(y) == "");
  CHECK(all_nan());
  CHECK(has(fault_of<Mistake::no_barrier_wait>(y), "what copy_box at vocabulary_sm90.cpp:"));
  CHECK(has(fault_of<Mistake::other_parity>(y), "what copy_box at vocabulary_sm90.cpp:"));
}
#endif

}  // namespace
}  // namespace m2lm::cuda
