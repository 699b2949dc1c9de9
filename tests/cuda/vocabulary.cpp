// What kernels are written in (backends/cuda/device.cuh), on a device or on the emulator, against plain loops.
#include "device_support.hpp"

#include <m2lm/backends/cuda/device.cuh>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

namespace m2lm::inline M2LM_ABI::cuda {
namespace {

template <class T>
struct Collectives {
  T shuffled, exchanged, moved_down;
};

template <class T>
M2LM_KERNEL void collect(const T* x, Collectives<T>* y, std::uint32_t* votes, float* sums, float* maxima) {
  const unsigned i = blockIdx.x * blockDim.x * blockDim.y + thread_index();
  const T value = x[i];
  y[i].shuffled = shuffle(value, static_cast<int>(7 * lane_index() + 3));
  y[i].exchanged = shuffle_xor(value, 5);
  y[i].moved_down = shuffle_down(value, 3);
  votes[i] = ballot(value > T{10});
  sums[i] = warp_sum(static_cast<float>(value));
  maxima[i] = warp_max(static_cast<float>(value));
  __syncwarp();
}

M2LM_KERNEL void reduce_blocks(const float* x, float* sums, float* maxima) {
  const unsigned i = blockIdx.x * blockDim.x * blockDim.y + thread_index();
  sums[i] = block_sum(x[i]);
  maxima[i] = block_max(x[i]);
  sums[i] += block_sum(1.0F);
}

/// d [16, 8] += a [16, 16]·b [16, 8], all row-major; b comes through the transposing load, or from bT [8, 16] through the plain one.
template <class E, int Transposed>
M2LM_KERNEL void multiply_halves(const E* a, const E* b, float* d) {
  std::uint16_t* shared = dynamic_shared<std::uint16_t>();
  std::uint16_t* shared_b = shared + 16 * 16;
  const unsigned lane = lane_index();
  for (unsigned i = lane; i < 16 * 16; i += 32) shared[i] = a[i].bits;
  for (unsigned i = lane; i < 16 * 8; i += 32) shared_b[i] = b[i].bits;
  __syncwarp();
  std::uint32_t a_registers[4], b_loaded[4];
  // Matrices of a: rows 0-7 and 8-15 of columns 0-7, then of columns 8-15.
  load_matrix_x4(a_registers, shared + (lane % 16) * 16 + lane / 16 * 8);
  if constexpr (Transposed != 0)
    load_matrix_x4_transposed(b_loaded, shared_b + (lane % 16) * 8);
  else
    load_matrix_x4(b_loaded, shared_b + (lane % 8) * 16 + lane / 8 % 2 * 8);
  const std::uint32_t b_registers[2] = {b_loaded[0], b_loaded[1]};
  const unsigned row = lane / 4, column = lane % 4 * 2;
  float sums[4];
  for (unsigned i = 0; i < 4; ++i) sums[i] = d[(row + i / 2 * 8) * 8 + column + i % 2];
  mma_16x8x16<E>(sums, a_registers, b_registers);
  for (unsigned i = 0; i < 4; ++i) d[(row + i / 2 * 8) * 8 + column + i % 2] = sums[i];
}

/// d [16, 8] += a [16, 32]·bTᵀ, bT [8, 32]. A register holds four bytes of a row of a or of bT.
M2LM_KERNEL void multiply_bytes(const std::int8_t* a, const std::int8_t* bT, std::int32_t* d) {
  const unsigned row = lane_index() / 4, first = lane_index() % 4 * 4;
  std::uint32_t a_registers[4], b_registers[2], word[1];
  for (unsigned i = 0; i < 4; ++i) {
    load_words(a + (row + i % 2 * 8) * 32 + first + i / 2 * 16, word);
    a_registers[i] = word[0];
  }
  for (unsigned i = 0; i < 2; ++i) {
    load_words(bT + row * 32 + first + i * 16, word);
    b_registers[i] = word[0];
  }
  std::int32_t sums[4];
  for (unsigned i = 0; i < 4; ++i) sums[i] = d[(row + i / 2 * 8) * 8 + first / 2 + i % 2];
  mma_16x8x32_s8(sums, a_registers, b_registers);
  for (unsigned i = 0; i < 4; ++i) d[(row + i / 2 * 8) * 8 + first / 2 + i % 2] = sums[i];
}

template <class E>
M2LM_KERNEL void to_floats(const E* x, float* y, int count) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < count) y[i] = load(x[i]);
}
template <class E>
M2LM_KERNEL void from_floats(const float* x, E* y, int count) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < count) y[i] = store<E>(x[i]);
}
template <class E>
M2LM_KERNEL void pack_pairs(const float* x, float* y, std::uint32_t* packed, int pairs) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= pairs) return;
  packed[i] = pack<E>(x[2 * i], x[2 * i + 1]);
  unpack<E>(packed[i], y[2 * i], y[2 * i + 1]);
}

template <class E, int N>
M2LM_KERNEL void copy_vectors(const E* x, E* y) {
  float values[N];
  load_vector<N>(x + threadIdx.x * N, values);
  store_vector<N>(y + threadIdx.x * N, values);
}
M2LM_KERNEL void copy_bytes(const std::uint32_t* x, std::uint32_t* y) {
  store16(y + 4 * threadIdx.x, blockIdx.x == 0 ? load16(x + 4 * threadIdx.x) : load16_streaming(x + 4 * threadIdx.x));
}

/// Two stages: while chunk i is added, chunk i + 1 is on its way. Every thread reads what another has copied. Beyond `count`: zeros.
M2LM_KERNEL void sum_in_stages(const float* x, float* y, int chunks, int count) {
  float* stages = dynamic_shared<float>();
  const int width = static_cast<int>(blockDim.x) * 4, thread = static_cast<int>(threadIdx.x);
  float sum = 0;
  for (int chunk = 0; chunk <= chunks; ++chunk) {
    if (chunk < chunks) {
      const int at = chunk * width + 4 * thread;
      copy_async16(stages + chunk % 2 * width + 4 * thread, x + at, at < count);
    }
    copy_async_commit();
    if (chunk > 0) {
      copy_async_wait<1>();
      __syncthreads();
      for (int i = 0; i < 4; ++i) sum += stages[(chunk - 1) % 2 * width + 4 * ((thread + 1) % static_cast<int>(blockDim.x)) + i];
      __syncthreads();
    }
  }
  y[thread] = sum;
}

M2LM_KERNEL void compute(const float* x, float* powers, float* roots, float* quotients, std::int32_t* dots, std::int32_t* total) {
  const unsigned i = threadIdx.x;
  powers[i] = exp2_approx(x[i]);
  roots[i] = rsqrt_approx(fabsf(x[i]));
  quotients[i] = fast_divide(3.0F, x[i]);
  dots[i] = dot4(0x80ff017fU, 0x7f80ff03U + i, static_cast<std::int32_t>(i));
  atomic_add(total, static_cast<std::int32_t>(i));
}

M2LM_KERNEL void fill_shared(float* y, int count) {
  float* shared = dynamic_shared<float>();
  for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) shared[i] = static_cast<float>(i);
  __syncthreads();
  float sum = 0;
  for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) sum += shared[count - 1 - i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) *y = sum;
}

M2LM_KERNEL void add_in_place(float* x, float addend) { x[threadIdx.x] += addend; }

/// Counts every thread of the launch once.
M2LM_KERNEL void mark_threads(std::int32_t* visits) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  visits[block * blockDim.x * blockDim.y + threadIdx.y * blockDim.x + threadIdx.x] += 1;
}

}  // namespace
}  // namespace m2lm::cuda

namespace {

using namespace m2lm;
using cuda::LaunchShape;
using m2lm_test::DeviceArray;
using m2lm_test::element;

/// Whole numbers in [-limit, limit], so that sums of them are exact.
template <class T>
std::vector<T> whole_numbers(std::size_t count, int limit, std::uint64_t seed) {
  Rng rng(seed);
  std::vector<T> values(count);
  for (T& value : values) value = static_cast<T>(static_cast<int>(rng.next() % static_cast<unsigned>(2 * limit + 1)) - limit);
  return values;
}

template <class E>
std::vector<E> elements(const std::vector<float>& values) {
  std::vector<E> out;
  for (const float value : values) out.push_back(element<E>(value));
  return out;
}

bool same(float a, float b) { return a == b || (std::isnan(a) && std::isnan(b)); }

template <class T>
void check_collectives() {
  cuda::Device device(0);
  constexpr unsigned blocks = 3, threads = 96;
  const std::vector<T> x = whole_numbers<T>(blocks * threads, 100, 7);
  const DeviceArray<T> from(device, x);
  const DeviceArray<cuda::Collectives<T>> moved(device, x.size());
  const DeviceArray<std::uint32_t> votes(device, x.size());
  const DeviceArray<float> sums(device, x.size()), maxima(device, x.size());
  launch(device, "collect", cuda::collect<T>, {.grid_x = blocks, .block_x = 48, .block_y = 2}, from.data(), moved.data(), votes.data(), sums.data(),
         maxima.data());
  const auto got = moved.read();
  const auto ballots = votes.read();
  const auto got_sums = sums.read(), got_maxima = maxima.read();
  for (std::size_t i = 0; i < x.size(); ++i) {
    const std::size_t warp = i / 32 * 32, lane = i % 32;
    std::uint32_t expected_votes = 0;
    float sum = 0, maximum = -std::numeric_limits<float>::infinity();
    for (std::size_t other = 0; other < 32; ++other) {
      expected_votes |= static_cast<std::uint32_t>(x[warp + other] > T{10}) << other;
      sum += static_cast<float>(x[warp + other]);
      maximum = std::max(maximum, static_cast<float>(x[warp + other]));
    }
    CAPTURE(i);
    CHECK(got[i].shuffled == x[warp + (7 * lane + 3) % 32]);
    CHECK(got[i].exchanged == x[warp + (lane ^ 5)]);
    CHECK(got[i].moved_down == x[warp + (lane + 3 < 32 ? lane + 3 : lane)]);
    CHECK(ballots[i] == expected_votes);
    CHECK(got_sums[i] == sum);
    CHECK(got_maxima[i] == maximum);
  }
}

TEST_CASE("collectives of a warp") {
  SUBCASE("float") { check_collectives<float>(); }
  SUBCASE("int") { check_collectives<int>(); }
  SUBCASE("double") { check_collectives<double>(); }
  SUBCASE("64-bit integers") { check_collectives<long long>(); }
}

TEST_CASE("sums and maxima of a block reach every thread, one call after another") {
  for (const LaunchShape shape : {LaunchShape{.grid_x = 2, .block_x = 32}, LaunchShape{.grid_x = 3, .block_x = 96},
                                  LaunchShape{.grid_x = 1, .block_x = 16, .block_y = 6}, LaunchShape{.grid_x = 2, .block_x = 1024}}) {
    cuda::Device device(0);
    const std::size_t threads = shape.block_x * shape.block_y;
    const std::vector<float> x = whole_numbers<float>(shape.grid_x * threads, 1000, threads);
    const DeviceArray<float> from(device, x), sums(device, x.size()), maxima(device, x.size());
    launch(device, "reduce_blocks", cuda::reduce_blocks, shape, from.data(), sums.data(), maxima.data());
    const auto got_sums = sums.read(), got_maxima = maxima.read();
    for (std::size_t i = 0; i < x.size(); ++i) {
      const std::size_t block = i / threads * threads;
      float sum = static_cast<float>(threads), maximum = x[block];
      for (std::size_t other = block; other < block + threads; ++other) {
        sum += x[other];
        maximum = std::max(maximum, x[other]);
      }
      CAPTURE(i);
      CHECK(got_sums[i] == sum);
      CHECK(got_maxima[i] == maximum);
    }
  }
}

template <class E, int Transposed>
void check_multiply_halves() {
  cuda::Device device(0);
  const auto a = whole_numbers<float>(16 * 16, 16, 1), b = whole_numbers<float>(16 * 8, 16, 2), d = whole_numbers<float>(16 * 8, 16, 3);
  const DeviceArray<E> device_a(device, elements<E>(a)), device_b(device, elements<E>(b));
  const DeviceArray<float> device_d(device, d);
  launch(device, "multiply_halves", cuda::multiply_halves<E, Transposed>, {.block_x = 32, .shared_bytes = 16 * 24 * 2}, device_a.data(),
         device_b.data(), device_d.data());
  const auto got = device_d.read();
  for (std::size_t i = 0; i < 16; ++i)
    for (std::size_t j = 0; j < 8; ++j) {
      float sum = d[i * 8 + j];
      for (std::size_t k = 0; k < 16; ++k) sum += a[i * 16 + k] * (Transposed != 0 ? b[k * 8 + j] : b[j * 16 + k]);
      CHECK(got[i * 8 + j] == sum);
    }
}

TEST_CASE("products of matrices by a warp") {
  SUBCASE("half, b in columns") { check_multiply_halves<Half, 0>(); }
  SUBCASE("half, b in rows") { check_multiply_halves<Half, 1>(); }
  SUBCASE("bf16, b in columns") { check_multiply_halves<Bf16, 0>(); }
  SUBCASE("bf16, b in rows") { check_multiply_halves<Bf16, 1>(); }
  SUBCASE("bytes") {
    cuda::Device device(0);
    const auto a = whole_numbers<std::int8_t>(16 * 32, 127, 4), bT = whole_numbers<std::int8_t>(8 * 32, 127, 5);
    const auto d = whole_numbers<std::int32_t>(16 * 8, 1000, 6);
    const DeviceArray<std::int8_t> device_a(device, a), device_bT(device, bT);
    const DeviceArray<std::int32_t> device_d(device, d);
    launch(device, "multiply_bytes", cuda::multiply_bytes, {.block_x = 32}, device_a.data(), device_bT.data(), device_d.data());
    const auto got = device_d.read();
    for (std::size_t i = 0; i < 16; ++i)
      for (std::size_t j = 0; j < 8; ++j) {
        std::int32_t sum = d[i * 8 + j];
        for (std::size_t k = 0; k < 32; ++k) sum += a[i * 32 + k] * bT[j * 32 + k];
        CHECK(got[i * 8 + j] == sum);
      }
  }
}

template <class E>
void check_conversions() {
  cuda::Device device(0);
  std::vector<E> all(65536);
  for (std::size_t i = 0; i < all.size(); ++i) all[i] = E{static_cast<std::uint16_t>(i)};
  const DeviceArray<E> device_all(device, all);
  const DeviceArray<float> device_floats(device, all.size());
  launch(device, "to_floats", cuda::to_floats<E>, {.grid_x = 257, .block_x = 256}, device_all.data(), device_floats.data(), 65536);
  std::vector<float> floats = device_floats.read();
  std::size_t wrong = 0;
  for (std::size_t i = 0; i < all.size(); ++i) wrong += !same(floats[i], to_float(all[i]));
  CHECK(wrong == 0);

  // Every value, the middle to the next one, and what lies just below and above that.
  std::vector<float> x;
  for (std::size_t i = 0; i < floats.size(); ++i) {
    const float middle = 0.5F * floats[i] + 0.5F * floats[(i + 1) % floats.size()];
    for (const float value : {floats[i], middle, std::nextafter(middle, 0.0F), std::nextafter(middle, 2 * middle)}) x.push_back(value);
  }
  const DeviceArray<float> device_x(device, x), device_y(device, x.size());
  const DeviceArray<E> device_e(device, x.size());
  const DeviceArray<std::uint32_t> device_packed(device, x.size() / 2);
  launch(device, "from_floats", cuda::from_floats<E>, {.grid_x = 1024, .block_x = 256}, device_x.data(), device_e.data(), static_cast<int>(x.size()));
  launch(device, "pack_pairs", cuda::pack_pairs<E>, {.grid_x = 512, .block_x = 256}, device_x.data(), device_y.data(), device_packed.data(),
         static_cast<int>(x.size() / 2));
  const std::vector<E> e = device_e.read();
  const std::vector<std::uint32_t> packed = device_packed.read();
  const std::vector<float> y = device_y.read();
  for (std::size_t i = 0; i < x.size(); ++i) {
    const float expected = to_float(element<E>(x[i]));
    const E in_register{static_cast<std::uint16_t>(packed[i / 2] >> (16 * (i % 2)))};
    wrong += !same(to_float(e[i]), expected) + !same(to_float(in_register), expected) + !same(y[i], expected);
  }
  CHECK(wrong == 0);
}

TEST_CASE("elements are rounded to the nearest, ties to even") {
  SUBCASE("half") { check_conversions<Half>(); }
  SUBCASE("bf16") { check_conversions<Bf16>(); }
}

template <class E, int N>
void check_vectors() {
  cuda::Device device(0);
  const std::vector<E> x = elements<E>(whole_numbers<float>(32 * N, 200, 9));
  const DeviceArray<E> from(device, x), to(device, x.size());
  launch(device, "copy_vectors", cuda::copy_vectors<E, N>, {.block_x = 32}, from.data(), to.data());
  CHECK(to.read() == x);
}

TEST_CASE("loads and stores of 4, 8 and 16 bytes") {
  check_vectors<float, 1>();
  check_vectors<float, 2>();
  check_vectors<float, 4>();
  check_vectors<Half, 2>();
  check_vectors<Half, 4>();
  check_vectors<Half, 8>();
  check_vectors<Bf16, 2>();
  check_vectors<Bf16, 4>();
  check_vectors<Bf16, 8>();
  for (const unsigned streaming : {0U, 1U}) {
    cuda::Device device(0);
    const std::vector<std::uint32_t> x = whole_numbers<std::uint32_t>(128, 1 << 20, 10);
    const DeviceArray<std::uint32_t> from(device, x), to(device, x.size());
    launch(device, "copy_bytes", cuda::copy_bytes, {.grid_x = 1 + streaming, .block_x = 32}, from.data(), to.data());
    CHECK(to.read() == x);
  }
}

TEST_CASE("asynchronous copies in stages") {
  cuda::Device device(0);
  constexpr std::size_t threads = 64, chunks = 5, count = 4 * threads * (chunks - 1) + 20;
  const std::vector<float> x = whole_numbers<float>(count, 100, 11);
  const DeviceArray<float> from(device, x), to(device, threads);
  launch(device, "sum_in_stages", cuda::sum_in_stages, {.block_x = threads, .shared_bytes = 2 * threads * 16}, from.data(), to.data(),
         static_cast<int>(chunks), static_cast<int>(count));
  const auto got = to.read();
  for (std::size_t thread = 0; thread < threads; ++thread) {
    float sum = 0;
    for (std::size_t chunk = 0; chunk < chunks; ++chunk)
      for (std::size_t i = 0; i < 4; ++i) {
        const std::size_t at = chunk * threads * 4 + 4 * ((thread + 1) % threads) + i;
        if (at < count) sum += x[at];
      }
    CHECK(got[thread] == sum);
  }
}

TEST_CASE("approximate functions, products of bytes, atomic addition") {
  cuda::Device device(0);
  std::vector<float> x;
  for (int i = 0; i < 64; ++i) x.push_back((static_cast<float>(i) - 31.7F) * 1.9F);
  const DeviceArray<float> from(device, x), powers(device, 64), roots(device, 64), quotients(device, 64);
  const DeviceArray<std::int32_t> dots(device, 64), total(device, std::vector<std::int32_t>{5});
  launch(device, "compute", cuda::compute, {.block_x = 64}, from.data(), powers.data(), roots.data(), quotients.data(), dots.data(), total.data());
  const auto got_powers = powers.read(), got_roots = roots.read(), got_quotients = quotients.read();
  const auto got_dots = dots.read();
  for (std::size_t i = 0; i < 64; ++i) {
    // PTX ISA, ex2.approx: 2^-22.5 relative; CUDA C++ programming guide: rsqrtf and __fdividef 2 ulp.
    const double value = x[i];
    CHECK(std::abs(static_cast<double>(got_powers[i]) - std::exp2(value)) <= 0x1.0p-22 * std::exp2(value));
    CHECK(std::abs(static_cast<double>(got_roots[i]) * std::sqrt(std::abs(value)) - 1) <= 0x1.0p-22);
    CHECK(std::abs(static_cast<double>(got_quotients[i]) * value / 3 - 1) <= 0x1.0p-22);
    // 0x80ff017f is the bytes 127, 1, -1, -128, from the lowest; 0x7f80ff03 is 3, -1, -128, 127.
    CHECK(got_dots[i] == static_cast<std::int32_t>(i) + 127 * static_cast<std::int8_t>(3 + i) - 1 + 128 - 128 * 127);
  }
  CHECK(total.read()[0] == 5 + 63 * 64 / 2);
}

TEST_CASE("a launch may ask for more than 48 KiB of shared memory") {
  cuda::Device device(0);
  const DeviceArray<float> sum(device, 1);
  constexpr int count = 99 * 1024 / 4 / 2;
  launch(device, "fill_shared", cuda::fill_shared, {.block_x = 128, .shared_bytes = 99 * 1024}, sum.data(), count);
  CHECK(sum.read()[0] == doctest::Approx(0.5 * count * (count - 1)));
}

TEST_CASE("every thread of every block runs once") {
  cuda::Device device(0);
  const LaunchShape shape{.grid_x = 3, .grid_y = 2, .grid_z = 4, .block_x = 5, .block_y = 7};
  const DeviceArray<std::int32_t> visits(device, std::vector<std::int32_t>(3 * 2 * 4 * 5 * 7));
  launch(device, "mark_threads", cuda::mark_threads, shape, visits.data());
  CHECK(visits.read() == std::vector<std::int32_t>(3 * 2 * 4 * 5 * 7, 1));
}

TEST_CASE("a launch that cannot be names its kernel and its shape") {
  cuda::Device device(0);
  const DeviceArray<float> x(device, 1);
  for (const LaunchShape shape : {LaunchShape{.grid_x = 0}, LaunchShape{.block_x = 1025}, LaunchShape{.shared_bytes = std::size_t{1} << 20}}) {
    std::string said;
    try {
      launch(device, "add_in_place", cuda::add_in_place, shape, x.data(), 1.0F);
    } catch (const DeviceError& error) {
      said = error.what();
    }
    CAPTURE(said);
    CHECK(said.find("add_in_place") != std::string::npos);
    CHECK(said.find(std::to_string(shape.block_x)) != std::string::npos);
    CHECK(said.find(std::to_string(shape.shared_bytes)) != std::string::npos);
  }
}

TEST_CASE("a recorded launch keeps copies of its arguments") {
  cuda::Device device(0);
  const DeviceArray<float> x(device, std::vector<float>(32, 1.0F));
  for (int step = 0; step < 4; ++step) {
    float addend = 2;
    device.replay({{1}}, [&] {
      launch(device, "add_in_place", cuda::add_in_place, {.block_x = 32}, x.data(), addend);
      addend = -100;
    });
  }
  CHECK(x.read() == std::vector<float>(32, 9.0F));
}

}  // namespace
