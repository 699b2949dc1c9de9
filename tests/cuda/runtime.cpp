// cuda::Device: memory, copies, products, recorded steps and marks, on the emulated device and on a real one.
#include "device_support.hpp"

#include <m2lm/backends/cuda/device.cuh>
#include <m2lm/backends/cuda/runtime.hpp>
#include <m2lm/backends/cuda/upload.hpp>
#include <m2lm/core/rng.hpp>

#include <doctest/doctest.h>

#include <support.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace m2lm::inline M2LM_ABI::cuda {
namespace {

M2LM_KERNEL void add_to_all(float* values, unsigned count, float by) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) values[i] += by;
}
/// *sum += *values: what it adds is read when it runs.
M2LM_KERNEL void add_value(float* sum, const float* value) {
  if (threadIdx.x == 0) *sum += *value;
}

}  // namespace
}  // namespace m2lm::cuda

using m2lm::Activation;
using m2lm::AnyTensor;
using m2lm::Bf16;
using m2lm::DType;
using m2lm::Half;
using m2lm::cuda::add_to_all;
using m2lm::cuda::add_value;
using m2lm::cuda::Device;
using m2lm::cuda::Product;
using m2lm::cuda::ReplayKey;
using m2lm_test::has;
using m2lm_test::message_of;

namespace {

void add(Device& device, float* values, unsigned count, float by) {
  m2lm::cuda::launch(device, "add_to_all", add_to_all, {.grid_x = (count + 63) / 64, .block_x = 64}, values, count, by);
}

/// Device memory that is released with its scope.
template <class T>
class Buffer {
  Device& device_;
  std::size_t count_;
  T* data_;

 public:
  Buffer(Device& device, std::size_t count, bool zeroed = false)
      : device_(device),
        count_(count),
        data_(static_cast<T*>(zeroed ? device.allocate_zeroed(count * sizeof(T)) : device.allocate(count * sizeof(T)))) {}
  Buffer(Device& device, const std::vector<T>& values) : Buffer(device, values.size()) {
    device.copy_to_device(data_, values.data(), count_ * sizeof(T));
  }
  ~Buffer() { device_.release(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  T* data() const { return data_; }
  std::vector<T> values() const {
    std::vector<T> out(count_);
    device_.copy_to_host(out.data(), data_, count_ * sizeof(T));
    return out;
  }
};

std::vector<std::uint8_t> random_bytes(std::size_t count, std::uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<std::uint8_t> bytes(count);
  for (auto& byte : bytes) byte = static_cast<std::uint8_t>(random());
  return bytes;
}

}  // namespace

TEST_CASE("A device says what it is, and which devices there are") {
  const int count = m2lm::cuda::device_count();
  REQUIRE(count >= 1);
  const Device device(0);
  CHECK(device.properties().ordinal == 0);
  CHECK(!device.properties().name.empty());
  CHECK(device.properties().compute_capability >= 80);
  CHECK(device.properties().multiprocessors >= 1);
  CHECK(device.properties().shared_bytes_per_block >= 48 * 1024);
  CHECK(device.available() <= device.properties().memory_bytes);

  const std::string none = message_of<m2lm::DeviceError>([&] { Device beyond(count); });
  CHECK(has(none, "there is no device " + std::to_string(count)));
  CHECK(has(none, std::to_string(count) + " visible"));
  CHECK(message_of<m2lm::DeviceError>([] { Device negative(-1); }) != "");
}

TEST_CASE("Bytes come back as they went, whatever their number, and the source may be reused at once") {
  Device device(0);
  std::uint32_t seed = 1;
  for (const std::size_t count : {0UL, 1UL, 63UL, 4095UL, 4096UL, 4097UL, 100003UL, 40000000UL}) {
    CAPTURE(count);
    const Buffer<std::uint8_t> buffer(device, count);
    const std::vector<std::uint8_t> expected = random_bytes(count, seed++);
    std::vector<std::uint8_t> source = expected;
    device.copy_to_device(buffer.data(), source.data(), count);
    std::fill(source.begin(), source.end(), std::uint8_t{0xEE});
    CHECK((buffer.values() == expected));
  }
}

TEST_CASE("Many small copies arrive in order, beside kernels") {
  Device device(0);
  constexpr unsigned count = 5000;
  const Buffer<float> buffer(device, count, true);
  for (unsigned i = 0; i < count; ++i) {
    const float value = static_cast<float>(i);
    device.copy_to_device(buffer.data() + i, &value, sizeof value);
    if (i % 1000 == 0) add(device, buffer.data() + i, 1, 0.5F);
  }
  const std::vector<float> values = buffer.values();
  for (unsigned i = 0; i < count; ++i) CHECK(values[i] == static_cast<float>(i) + (i % 1000 == 0 ? 0.5F : 0.0F));
}

TEST_CASE("A copy that is filled in place is asked for whole units, each once and in order") {
  Device device(0);
  constexpr std::size_t units = 7001;
  for (const std::size_t unit : {1UL, 12UL, 4098UL}) {
    CAPTURE(unit);
    const std::vector<std::uint8_t> expected = random_bytes(units * unit, 7);
    const Buffer<std::uint8_t> buffer(device, expected.size());
    std::size_t next = 0;
    device.copy_to_device(buffer.data(), expected.size(), unit, [&](std::byte* chunk, std::size_t first, std::size_t count) {
      CHECK(first == next);
      CHECK(count % unit == 0);
      next = first + count;
      std::memcpy(chunk, expected.data() + first, count);
    });
    CHECK(next == expected.size());
    CHECK((buffer.values() == expected));
  }

  const Buffer<std::uint8_t> buffer(device, 64);
  const auto nothing = [](std::byte*, std::size_t, std::size_t) {};
  CHECK(has(message_of<m2lm::OptionError>([&] { device.copy_to_device(buffer.data(), 64, 5, nothing); }), "64 bytes in units of 5"));
  CHECK(message_of<m2lm::OptionError>([&] { device.copy_to_device(buffer.data(), 64, 0, nothing); }) != "");
  CHECK(message_of<m2lm::OptionError>([&] { device.copy_to_device(buffer.data(), 2 * Device::staging_unit, Device::staging_unit + 1, nothing); }) !=
        "");
  // What `fill` throws goes through, and the next copy is as any other.
  CHECK(message_of<m2lm::InputError>([&] {
          device.copy_to_device(buffer.data(), 64, 1, [](std::byte*, std::size_t, std::size_t) { throw m2lm::InputError("stop"); });
        }) == "stop");
  const std::vector<std::uint8_t> expected = random_bytes(64, 9);
  device.copy_to_device(buffer.data(), expected.data(), 64);
  CHECK((buffer.values() == expected));
}

TEST_CASE("Zeros: a whole allocation, a part of one, in order with kernels") {
  Device device(0);
  const Buffer<float> fresh(device, 1000, true);
  CHECK((fresh.values() == std::vector<float>(1000, 0.0F)));
  add(device, fresh.data(), 1000, 2);
  device.zero(fresh.data() + 10, 20 * sizeof(float));
  add(device, fresh.data(), 1000, 1);
  const std::vector<float> values = fresh.values();
  for (std::size_t i = 0; i < values.size(); ++i) CHECK(values[i] == (i >= 10 && i < 30 ? 1.0F : 3.0F));
}

TEST_CASE("Waits are counted; what is only enqueued adds none") {
  Device device(0);
  const Buffer<float> buffer(device, 100, true);
  const auto before = device.waits();
  const float one = 1;
  for (int i = 0; i < 10; ++i) {
    device.copy_to_device(buffer.data(), &one, sizeof one);
    add(device, buffer.data(), 100, 1);
    device.zero(buffer.data() + 50, 8);
  }
  CHECK(device.waits() == before);
  device.synchronize();
  CHECK(device.waits() == before + 1);
  static_cast<void>(buffer.values());
  CHECK(device.waits() == before + 2);
}

TEST_CASE("More memory than there is: the error names what was asked for and what is free, and the device goes on") {
  Device device(0);
  const std::size_t total = device.properties().memory_bytes;
  const std::string message = message_of<m2lm::CapacityError>([&] { static_cast<void>(device.allocate(total + 1)); });
  CHECK(has(message, std::to_string(total + 1) + " bytes of device memory"));
  CHECK(has(message, "are free"));
  CHECK(message_of<m2lm::CapacityError>([&] { static_cast<void>(device.allocate_zeroed(std::numeric_limits<std::size_t>::max() - 100)); }) != "");
  const Buffer<float> buffer(device, 3, true);
  CHECK((buffer.values() == std::vector<float>(3, 0.0F)));
}

// ---- products -------------------------------------------------------------------------------------------------------------------

namespace {

template <class E>
E narrow(double x) {
  return m2lm_test::element<E>(static_cast<float>(x));
}

double activate(double x, Activation activation) {
  if (activation == Activation::relu) return std::max(x, 0.0);
  if (activation == Activation::gelu_tanh) return 0.5 * x * (1 + std::tanh(std::sqrt(2 / std::acos(-1.0)) * (x + 0.044715 * x * x * x)));
  return x;
}

struct Case {
  std::int64_t m, n, k;
  std::int64_t more_x, more_y, more_residual;  ///< columns that rows have besides; those of w as those of x
  bool bias, residual, in_place;
  Activation activation;
  bool transpose_x = false, transpose_w = false;
};

/// E: elements of x and w; Y: of y and the residual.
template <class E, class Y>
void check_product(Device& device, const Case& c, std::uint32_t seed) {
  CAPTURE(c.m);
  CAPTURE(c.n);
  CAPTURE(c.k);
  CAPTURE(m2lm::dtype_name(m2lm::dtype_of<E>));
  std::mt19937 random(seed);
  std::normal_distribution<double> normal;
  const auto make = [&]<class T>(T, std::int64_t count) {
    std::vector<T> values(static_cast<std::size_t>(count));
    for (T& value : values) value = narrow<T>(normal(random));
    return values;
  };
  const std::int64_t ldx = (c.transpose_x ? c.m : c.k) + c.more_x, ldw = (c.transpose_w ? c.n : c.k) + c.more_x, ldy = c.n + c.more_y,
                     ldr = c.in_place ? ldy : c.n + c.more_residual;
  const auto x = make(E{}, (c.transpose_x ? c.k : c.m) * ldx), w = make(E{}, (c.transpose_w ? c.k : c.n) * ldw), bias = make(E{}, c.n);
  const auto residual = make(Y{}, c.m * ldr);
  const Buffer<E> x_there(device, x), w_there(device, w), bias_there(device, bias);
  const Buffer<Y> residual_there(device, residual);
  const std::vector<Y> before(static_cast<std::size_t>(c.m * ldy), narrow<Y>(-77));
  const Buffer<Y> y_there(device, c.in_place ? residual : before);

  device.multiply({.dtype = m2lm::dtype_of<E>,
                   .wide_output = !std::is_same_v<E, Y>,
                   .x = x_there.data(),
                   .ldx = ldx,
                   .transpose_x = c.transpose_x,
                   .w = w_there.data(),
                   .ldw = c.more_x == 0 ? 0 : ldw,
                   .transpose_w = c.transpose_w,
                   .m = c.m,
                   .n = c.n,
                   .k = c.k,
                   .bias = c.bias ? bias_there.data() : nullptr,
                   .activation = c.activation,
                   .residual = !c.residual  ? nullptr
                               : c.in_place ? y_there.data()
                                            : residual_there.data(),
                   .ld_residual = ldr,
                   .y = y_there.data(),
                   .ldy = ldy});
  const std::vector<Y> y = y_there.values();
  for (std::int64_t i = 0; i < c.m; ++i) {
    for (std::int64_t j = 0; j < ldy; ++j) {
      const auto at = static_cast<std::size_t>(i * ldy + j);
      const double got = m2lm::to_float(y[at]);
      if (j >= c.n) {  // between rows nothing is written
        CHECK(got == static_cast<double>(m2lm::to_float((c.in_place ? residual : before)[at])));
        continue;
      }
      double sum = 0, size = 0;
      for (std::int64_t l = 0; l < c.k; ++l) {
        const double of_x = m2lm::to_float(x[static_cast<std::size_t>(c.transpose_x ? l * ldx + i : i * ldx + l)]);
        const double of_w = m2lm::to_float(w[static_cast<std::size_t>(c.transpose_w ? l * ldw + j : j * ldw + l)]);
        const double term = of_x * of_w;
        sum += term;
        size += std::abs(term);
      }
      if (c.bias) sum += static_cast<double>(m2lm::to_float(bias[static_cast<std::size_t>(j)]));
      double expected = activate(sum, c.activation);
      if (c.residual) expected += static_cast<double>(m2lm::to_float(residual[static_cast<std::size_t>(i * ldr + j)]));
      // k f32 additions; the derivative of GELU is below 1.13, and a device's tanh is good to 2^-10; then y is rounded.
      double bound = 1.13 * static_cast<double>(c.k + 2) * 0x1.0p-24 * (size + std::abs(sum) + 1) + 2 * m2lm_test::roundoff<Y> * std::abs(expected);
      if (c.activation == Activation::gelu_tanh) bound += 0x1.0p-10 * std::abs(sum);
      CHECK(std::abs(got - expected) <= bound);
    }
  }
}

template <class E, class Y>
void check_products(Device& device) {
  constexpr bool wide = !std::is_same_v<E, Y>;
  std::uint32_t seed = 100;
  for (const auto& [m, n, k] :
       std::vector<std::array<std::int64_t, 3>>{{1, 1, 1}, {1, 64, 32}, {3, 5, 7}, {17, 33, 40}, {64, 24, 129}, {8, 96, 256}}) {
    check_product<E, Y>(device, {m, n, k, 0, 0, 0, false, false, false, Activation::none}, ++seed);
    check_product<E, Y>(device, {m, n, k, 8, 16, 8, false, true, false, Activation::none}, ++seed);
    check_product<E, Y>(device, {m, n, k, 3, 5, 1, false, true, true, Activation::none}, ++seed);
    for (const bool of_x : {false, true}) {
      check_product<E, Y>(device, {m, n, k, 0, 0, 0, false, false, false, Activation::none, of_x, true}, ++seed);
      check_product<E, Y>(device, {m, n, k, 2, 8, 0, false, true, false, Activation::none, of_x, !of_x}, ++seed);
    }
    for (const Activation activation : {Activation::relu, Activation::gelu_tanh}) {
      check_product<E, Y>(device, {m, n, k, 0, 8, 0, false, false, false, activation}, ++seed);
      if (!wide) check_product<E, Y>(device, {m, n, k, 1, 0, 0, true, false, false, activation}, ++seed);
    }
    if (!wide) check_product<E, Y>(device, {m, n, k, 0, 0, 8, true, true, false, Activation::none}, ++seed);
  }
}

}  // namespace

TEST_CASE("Products agree with plain loops in f64: types, epilogues, rows with gaps, sizes of any kind") {
  Device device(0);
  check_products<float, float>(device);
  check_products<Bf16, Bf16>(device);
  check_products<Half, Half>(device);
  check_products<Bf16, float>(device);
  check_products<Half, float>(device);
}

TEST_CASE("Products that cuBLASLt has not are refused, with their sizes") {
  Device device(0);
  const Buffer<Bf16> memory(device, 64 * 64, true);
  const Product good{.x = memory.data(), .ldx = 8, .w = memory.data(), .m = 4, .n = 8, .k = 8, .y = memory.data() + 1024, .ldy = 8};
  device.multiply(good);
  const auto refusal = [&](auto change) {
    Product bad = good;
    change(bad);
    try {
      device.multiply(bad);
    } catch (const m2lm::OptionError& error) {
      return std::string("option: ") + error.what();
    } catch (const m2lm::ShapeError& error) {
      return std::string("shape: ") + error.what();
    }
    return std::string();
  };
  for (const Activation activation : {Activation::silu, Activation::gelu, Activation::quick_gelu})
    CHECK(refusal([&](Product& p) { p.activation = activation; }).starts_with("option: "));
  const std::string dtype = refusal([](Product& p) { p.dtype = DType::i8; });
  CHECK(dtype.starts_with("option: "));
  CHECK(has(dtype, "x [4, 8] by w [8, 8] of i8"));
  CHECK(has(refusal([&](Product& p) {
              p.activation = Activation::relu;
              p.residual = memory.data();
              p.ld_residual = 8;
            }),
            "a residual goes with no activation"));
  CHECK(has(refusal([&](Product& p) {
              p.bias = memory.data();
              p.wide_output = true;
            }),
            "a wide output goes with no bias"));
  CHECK(has(refusal([&](Product& p) { p.bias = memory.data() + 1; }), "16-byte border"));
  CHECK(refusal([](Product& p) { p.ldx = 7; }).starts_with("shape: "));
  CHECK(refusal([](Product& p) { p.ldy = 7; }).starts_with("shape: "));
  CHECK(refusal([](Product& p) { p.ldw = 7; }).starts_with("shape: "));
  CHECK(refusal([](Product& p) { p.k = 0; }).starts_with("shape: "));
  CHECK(refusal([](Product& p) { p.w = nullptr; }).starts_with("shape: "));
  CHECK(refusal([](Product& p) { p.m = 0; }) == "");  // nothing to do
  device.synchronize();
}

// ---- recorded steps ---------------------------------------------------------------------------------------------------------------

TEST_CASE("A step runs as it is, is recorded the second time, and then runs without its body, on what memory holds then") {
  Device device(0);
  const Buffer<float> sum(device, 1, true), value(device, 1, true);
  int bodies = 0;
  const auto step = [&] {
    ++bodies;
    m2lm::cuda::launch(device, "add_value", add_value, {.block_x = 32}, sum.data(), static_cast<const float*>(value.data()));
    add(device, sum.data(), 1, 1);
  };
  float expected = 0;
  for (int i = 0; i < 6; ++i) {
    const float now = static_cast<float>(10 * i);
    device.copy_to_device(value.data(), &now, sizeof now);
    CHECK(device.replay({{1, 2, 3}}, step) == (i < 2));
    expected += now + 1;
    CHECK(sum.values()[0] == expected);
  }
  CHECK(bodies == 2);
  CHECK(device.replay({{1, 2, 4}}, step));  // another key is another step
  CHECK(bodies == 3);
  device.forget_replays();
  CHECK(device.replay({{1, 2, 3}}, step));
  CHECK(bodies == 4);
}

TEST_CASE("A recorded step holds products and zeros, and adds no wait") {
  Device device(0);
  const std::vector<float> x{1, 2}, w{3, 4, 5, 6};
  const Buffer<float> x_there(device, x), w_there(device, w), y(device, 2), counted(device, 2, true);
  const auto before = device.waits();
  for (int i = 0; i < 4; ++i)
    device.replay({{7}}, [&] {
      device.multiply({.dtype = DType::f32, .x = x_there.data(), .ldx = 2, .w = w_there.data(), .m = 1, .n = 2, .k = 2, .y = y.data(), .ldy = 2});
      add(device, y.data(), 2, 0.5F);
      device.zero(counted.data(), sizeof(float));
      add(device, counted.data(), 2, 1);
    });
  CHECK(device.waits() == before);
  CHECK((y.values() == std::vector<float>{11.5F, 17.5F}));
  CHECK((counted.values() == std::vector<float>{1, 4}));
}

TEST_CASE("While a step is recorded the host neither allocates, copies nor waits; the step can be tried again") {
  Device device(0);
  const Buffer<float> sum(device, 1, true);
  const auto pinned = device.pinned(64);
  float there = 0;
  const auto nothing = [] {};
  const std::vector<std::pair<std::string, std::function<void()>>> refused{
      {"allocate", [&] { static_cast<void>(device.allocate(16)); }},
      {"allocate", [&] { static_cast<void>(device.allocate_zeroed(16)); }},
      {"copy_to_device", [&] { device.copy_to_device(sum.data(), &there, 4); }},
      {"copy_to_host", [&] { device.copy_to_host(&there, sum.data(), 4); }},
      {"synchronize", [&] { device.synchronize(); }},
      {"pinned", [&] { static_cast<void>(device.pinned(16)); }},
      {"copy_to_pinned", [&] { device.copy_to_pinned(pinned.get(), sum.data(), 4, 0); }},
      {"wait_for", [&] { device.wait_for(0); }},
      {"replay", [&] { device.replay({{99}}, nothing); }},
      {"forget_replays", [&] { device.forget_replays(); }},
  };
  std::uint64_t key = 0;
  for (const auto& [call, act] : refused) {
    CAPTURE(call);
    const ReplayKey mine{{50, ++key}};
    const auto good = [&] { add(device, sum.data(), 1, 1); };
    device.replay(mine, good);
    const float before = sum.values()[0];
    const std::string message = message_of<m2lm::DeviceError>([&] {
      device.replay(mine, [&, &act = act] {
        add(device, sum.data(), 1, 100);
        act();
      });
    });
    CHECK(has(message, "Device::" + call + ": not while a step is being recorded"));
    CHECK(sum.values()[0] == before);  // nothing of it has run
    CHECK(device.replay(mine, good));
    CHECK(!device.replay(mine, good));
    CHECK(sum.values()[0] == before + 2);
  }
}

TEST_CASE("Memory that is released while a step is recorded is released, after the recording") {
  Device device(0);
  const Buffer<float> sum(device, 1, true);
  for (int i = 0; i < 3; ++i) {
    void* early = device.allocate(1000);
    const bool ran = device.replay({{3}}, [&] {
      device.release(early);
      add(device, sum.data(), 1, 1);
    });
    if (!ran) device.release(early);
  }
  CHECK(sum.values()[0] == 3.0F);
}

TEST_CASE("Of many steps the ones used last are kept") {
  Device device(0);
  const Buffer<float> sum(device, 1, true);
  const auto step = [&] { add(device, sum.data(), 1, 1); };
  const auto kept = m2lm::cuda::detail::ReplayPolicy{}.kept;
  for (std::uint64_t i = 0; i < kept; ++i) {
    device.replay({{i}}, step);
    device.replay({{i}}, step);
  }
  CHECK(!device.replay({{0}}, step));
  CHECK(device.replay({{kept}}, step));  // takes the place of key 1
  CHECK(!device.replay({{0}}, step));
  CHECK(!device.replay({{2}}, step));
  CHECK(device.replay({{1}}, step));
  CHECK(sum.values()[0] == static_cast<float>(2 * kept + 5));
}

// ---- pinned memory ----------------------------------------------------------------------------------------------------------------

TEST_CASE("Pinned memory holds what was copied once its mark is reached, behind a recorded step too") {
  Device device(0);
  const Buffer<float> sum(device, 4, true);
  const auto pinned = device.pinned(8 * sizeof(float));
  auto* const there = static_cast<float*>(pinned.get());
  const auto before = device.waits();
  for (int i = 1; i <= 6; ++i) {
    const int mark = i % 2;
    device.replay({{1}}, [&] { add(device, sum.data(), 4, 1); });
    device.copy_to_pinned(there + 4 * mark, sum.data(), 4 * sizeof(float), mark);
    device.wait_for(mark);
    CHECK(there[4 * mark] == static_cast<float>(i));
    CHECK(there[4 * mark + 3] == static_cast<float>(i));
  }
  CHECK(device.waits() == before);
  CHECK(message_of<m2lm::OptionError>([&] { device.wait_for(8); }) != "");
  CHECK(message_of<m2lm::OptionError>([&] { device.copy_to_pinned(there, sum.data(), 4, -1); }) != "");
}

// ---- errors of launches ---------------------------------------------------------------------------------------------------------

TEST_CASE("A launch that no device takes is refused with the kernel and its shape, and the device goes on") {
  Device device(0);
  const Buffer<float> values(device, 64, true);
  const std::string message = message_of<m2lm::DeviceError>(
      [&] { m2lm::cuda::launch(device, "add_to_all", add_to_all, {.grid_x = 3, .block_x = 2048}, values.data(), 64U, 1.0F); });
  CHECK(has(message, "add_to_all"));
  CHECK(has(message, "grid [3, 1, 1], block [2048, 1]"));
  CHECK(has(message, "invalid configuration"));
  add(device, values.data(), 64, 1);
  CHECK((values.values() == std::vector<float>(64, 1.0F)));
}

// ---- weights --------------------------------------------------------------------------------------------------------------------

namespace {

template <class From>
AnyTensor random_tensor(m2lm::Shape shape, std::uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<double> normal(0, 10);
  m2lm::Tensor<From> tensor(shape);
  for (From& value : tensor.span()) value = narrow<From>(normal(random));
  return AnyTensor(std::move(tensor));
}

template <class To>
void check_upload(Device& device, const AnyTensor& tensor) {
  CAPTURE(m2lm::dtype_name(tensor.dtype()));
  CAPTURE(m2lm::dtype_name(m2lm::dtype_of<To>));
  const auto elements = static_cast<std::size_t>(tensor.shape().elements());
  const Buffer<To> there(device, elements);
  std::size_t last = 0;
  m2lm::cuda::upload_tensor(device, tensor, there.data(), m2lm::dtype_of<To>, [&](std::size_t done, std::size_t total) {
    CHECK(total == elements * sizeof(To));
    CHECK(done > last);
    last = done;
  });
  CHECK(last == elements * sizeof(To));
  const std::vector<To> got = there.values();
  bool equal = true;
  for (std::size_t i = 0; i < elements; ++i) equal &= got[i] == narrow<To>(tensor.at(static_cast<std::int64_t>(i)));
  CHECK(equal);
}

}  // namespace

TEST_CASE("Tensors of a checkpoint arrive in the type that is asked for, with progress") {
  Device device(0);
  for (const m2lm::Shape& shape : {m2lm::Shape{1}, m2lm::Shape{3, 5}, m2lm::Shape{70, 1023}, m2lm::Shape{1100, 1000}}) {
    for (const AnyTensor& tensor : {random_tensor<float>(shape, 1), random_tensor<Bf16>(shape, 2), random_tensor<Half>(shape, 3)}) {
      check_upload<float>(device, tensor);
      check_upload<Bf16>(device, tensor);
      check_upload<Half>(device, tensor);
    }
  }
  const AnyTensor whole(DType::f32, {0, 8}, nullptr, nullptr);
  m2lm::cuda::upload_tensor(device, whole, nullptr, DType::bf16);  // no element: nothing to do

  const AnyTensor tensor = random_tensor<float>({4}, 4);
  const Buffer<float> there(device, 4);
  CHECK(
      has(message_of<m2lm::OptionError>([&] { m2lm::cuda::upload_tensor(device, tensor, there.data(), DType::i32); }), "cannot be uploaded as i32"));
}

TEST_CASE("A tensor that begins at any byte of a file is uploaded") {
  Device device(0);
  const auto values = random_tensor<float>({1000}, 5);
  auto file = std::make_shared<std::vector<std::byte>>(values.bytes() + 1);
  std::memcpy(file->data() + 1, values.data(), values.bytes());
  check_upload<Bf16>(device, AnyTensor(DType::f32, {1000}, file->data() + 1, file));
  check_upload<float>(device, AnyTensor(DType::f32, {1000}, file->data() + 1, file));
}
