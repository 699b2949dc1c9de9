// The emulated device itself, and what happens on machines without a device, with little memory, or with a kernel that fails.
// labels: emulated-only
#include <m2lm/testing/cuda_emulation_runtime.hpp>

#include <m2lm/backends/cuda/device.cuh>

#include "emulated_support.hpp"

#include <doctest/doctest.h>

#include <support.hpp>

#include <cmath>
#include <csignal>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

namespace m2lm::inline M2LM_ABI::cuda {
namespace {

M2LM_KERNEL void read_one(const float* from, float* to) {
  if (threadIdx.x == 0) *to = *from;
}
M2LM_KERNEL void write_one(float* to) {
  if (threadIdx.x == 0) *to = 1;
}
M2LM_KERNEL void wait_in_vain() {
  if (threadIdx.x == 0)
    __syncthreads();
  else
    __syncthreads();
}

}  // namespace
}  // namespace m2lm::cuda

using m2lm::cuda::Device;
using m2lm::cuda::read_one;
using m2lm::cuda::wait_in_vain;
using m2lm::cuda::write_one;
using m2lm::cuda::detail::NoDevice;
using m2lm::cuda::emulation::counts;
using m2lm::cuda::emulation::Machine;
using m2lm::cuda::emulation::MachineScope;
using m2lm_test::has;
using m2lm_test::machine_that;
using m2lm_test::message_of;
using m2lm_test::NothingLeaks;

namespace {

constexpr std::size_t page = 4096;

void write(Device& device, float* to) { m2lm::cuda::launch(device, "write_one", write_one, {.grid_x = 2, .block_x = 32}, to); }
void read(Device& device, const float* from, float* to) { m2lm::cuda::launch(device, "read_one", read_one, {.block_x = 32}, from, to); }

/// Whether act() comes to its end in a child process, without a signal, a report of a sanitizer or an exception.
bool survives(const std::function<void()>& act) {
  const pid_t child = ::fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    for (const int signal : {SIGSEGV, SIGBUS, SIGABRT}) ::signal(signal, SIG_DFL);
    const rlimit no_core{0, 0};
    ::setrlimit(RLIMIT_CORE, &no_core);
    ::close(STDERR_FILENO);  // a sanitizer's report of what is meant to happen
    try {
      act();
    } catch (...) {
      ::_exit(1);
    }
    ::_exit(0);
  }
  int status = 0;
  REQUIRE(::waitpid(child, &status, 0) == child);
  return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

}  // namespace

// ---- memory ---------------------------------------------------------------------------------------------------------------------

TEST_CASE("The host that touches device memory faults; a kernel does not") {
  Device device(0);
  auto* const p = static_cast<float*>(device.allocate_zeroed(2 * page));
  volatile float* const there = p;
  CHECK(survives([&] { write(device, p), device.synchronize(); }));
  CHECK(!survives([&] { static_cast<void>(*there); }));
  CHECK(!survives([&] { *there = 1; }));
  CHECK(!survives([&] { there[page / 2 - 1] = 1; }));
  write(device, p);  // closed again behind kernels and copies
  CHECK(!survives([&] { static_cast<void>(*there); }));
  float got = 0;
  device.copy_to_device(p, &got, sizeof got);
  CHECK(!survives([&] { static_cast<void>(*there); }));
  device.copy_to_host(&got, p, sizeof got);
  CHECK(!survives([&] { static_cast<void>(*there); }));
  device.release(p);
}

TEST_CASE("Kernels fault outside allocations: behind, before, between and after release") {
  Device device(0);
  auto* const before = static_cast<float*>(device.allocate_zeroed(page));
  auto* const p = static_cast<float*>(device.allocate_zeroed(page));
  auto* const behind = static_cast<float*>(device.allocate_zeroed(page));
  constexpr std::size_t count = page / sizeof(float);
  CHECK(survives([&] { read(device, p, before), read(device, p + count - 1, behind), device.synchronize(); }));
  CHECK(!survives([&] { write(device, p + count); }));
  CHECK(!survives([&] { write(device, p - 1); }));
  CHECK(!survives([&] { read(device, p + count, before); }));
  device.release(p);
  CHECK(!survives([&] { write(device, p); }));
  CHECK(survives([&] { write(device, before), write(device, behind), device.synchronize(); }));
  device.release(before);
  device.release(behind);
}

TEST_CASE("What a kernel writes into the last bytes behind an allocation is seen at the next wait") {
  Device device(0);
  auto* const p = static_cast<float*>(device.allocate_zeroed(100));
  CHECK(survives([&] { write(device, p + 24), device.synchronize(); }));
  CHECK(!survives([&] { write(device, p + 25), device.synchronize(); }));
  device.release(p);
}

TEST_CASE("Fresh device memory and fresh pinned memory are NaN") {
  Device device(0);
  void* const p = device.allocate(1000);
  std::vector<float> values(250);
  device.copy_to_host(values.data(), p, 1000);
  for (const float value : values) CHECK(std::isnan(value));
  const auto pinned = device.pinned(8);
  CHECK(std::isnan(*static_cast<float*>(pinned.get())));
  device.release(p);
}

TEST_CASE("Copies of bytes that are not of this device's memory are refused") {
  Device device(0), other(0);
  auto* const p = static_cast<std::byte*>(device.allocate_zeroed(100));
  auto* const q = static_cast<std::byte*>(other.allocate_zeroed(100));
  std::byte here[100]{};
  const auto refused = [](auto act) { return message_of<m2lm::DeviceError>(act) != ""; };
  CHECK(refused([&] { device.copy_to_device(p + 1, here, 100); }));
  CHECK(refused([&] { device.copy_to_device(q, here, 1); }));
  CHECK(refused([&] { device.copy_to_device(here, here, 1); }));
  CHECK(refused([&] { device.copy_to_device(p, p + 50, 10); }));
  CHECK(refused([&] { device.copy_to_host(here, q, 1); }));
  CHECK(refused([&] { device.copy_to_host(p, p, 1); }));
  CHECK(refused([&] { device.zero(p + 99, 2); }));
  CHECK(refused([&] { device.copy_to_pinned(here, p, 4, 0); }));
  device.copy_to_device(p + 99, here, 1);
  device.release(p);
  other.release(q);
}

TEST_CASE("Bytes for pinned memory are there when they have been waited for, and not before") {
  const NothingLeaks nothing;
  Device device(0);
  auto* const p = static_cast<float*>(device.allocate_zeroed(4));
  auto pinned = device.pinned(8);
  const auto* const there = static_cast<float*>(pinned.get());
  device.copy_to_pinned(pinned.get(), p, 4, 0);
  CHECK(std::isnan(there[0]));
  device.wait_for(1);
  CHECK(std::isnan(there[0]));
  device.wait_for(0);
  CHECK(there[0] == 0.0F);
  write(device, p);
  device.copy_to_pinned(pinned.get(), p, 4, 0);
  CHECK(there[0] == 0.0F);
  device.synchronize();
  CHECK(there[0] == 1.0F);
  device.copy_to_pinned(pinned.get(), p, 4, 0);
  pinned.reset();  // nobody is there for what is on its way
  device.synchronize();
  device.release(p);
}

TEST_CASE("What is released while a step is recorded is there until the recording ends, also when it ends badly") {
  const NothingLeaks nothing;
  Device device(0);
  auto* const sum = static_cast<float*>(device.allocate_zeroed(4));
  const auto free = device.available();
  const auto step = [&](bool fails) {
    void* const early = device.allocate(1000);
    const std::int64_t allocations = counts().allocations;
    device.replay({{1}}, [&] {
      device.release(early);
      if (fails) {
        CHECK(counts().allocations == allocations);
        throw m2lm::InputError("stop");
      }
    });
  };
  step(false);
  CHECK(device.available() == free);
  CHECK(message_of<m2lm::InputError>([&] { step(true); }) == "stop");
  CHECK(device.available() == free);
  step(false);
  CHECK(device.available() == free);
  device.release(sum);
}

TEST_CASE("Allocations that outlive their device are counted") {
  const auto before = counts().lost.load();
  {
    Device device(0);
    static_cast<void>(device.allocate(10));
  }
  CHECK(counts().lost == before + 1);
}

// ---- machines -------------------------------------------------------------------------------------------------------------------

TEST_CASE("Without a device: the count is 0, and count and constructor say why and what to do") {
  const NothingLeaks nothing;
  const std::vector<std::pair<NoDevice, std::vector<std::string>>> reasons{
      {NoDevice::no_driver, {"no NVIDIA driver", "CPU backend works"}},
      {NoDevice::old_driver, {"driver is of CUDA 12.4", "built with CUDA 13.0", "install a newer driver"}},
      {NoDevice::none_visible, {"no device is visible", "CUDA_VISIBLE_DEVICES"}},
  };
  for (const auto& [why, parts] : reasons) {
    const MachineScope machine(machine_that([why = why](Machine& m) {
      m.devices = 0;
      m.why_none = why;
      m.driver = 12040;
    }));
    CHECK(m2lm::cuda::device_count() == 0);
    std::string reason;
    CHECK(m2lm::cuda::device_count(&reason) == 0);
    const std::string thrown = message_of<m2lm::DeviceError>([] { Device device(0); });
    CHECK(has(thrown, reason));
    for (const std::string& part : parts) CHECK(has(reason, part));
  }
  CHECK(m2lm::cuda::device_count() == 1);
}

TEST_CASE("Several devices have their own memory; one that is not there is refused by number") {
  const MachineScope machine(machine_that([](Machine& m) { m.devices = 3; }));
  CHECK(m2lm::cuda::device_count() == 3);
  const Device last(2);
  CHECK(last.properties().ordinal == 2);
  CHECK(has(message_of<m2lm::DeviceError>([] { Device beyond(3); }), "there is no device 3: 3 visible"));
}

TEST_CASE("Device memory that runs out: the sizes are named, what was had stays, and released memory can be had again") {
  const NothingLeaks nothing;
  const MachineScope machine(machine_that([](Machine& m) { m.memory_bytes = 1 << 20; }));
  Device device(0);
  void* const half = device.allocate_zeroed(1 << 19);
  CHECK(device.available() == 1 << 19);
  const std::string message = message_of<m2lm::CapacityError>([&] { static_cast<void>(device.allocate((1 << 19) + 1)); });
  CHECK(has(message, "524289 bytes of device memory were asked for, 524288 of 1048576 are free"));
  CHECK(has(message, "smaller precision or context"));
  void* const rest = device.allocate(1 << 19);
  CHECK(device.available() == 0);
  CHECK(message_of<m2lm::CapacityError>([&] { static_cast<void>(device.allocate(0)); }) != "");
  device.release(half);
  void* const again = device.allocate_zeroed(1 << 19);
  std::uint64_t value = 1;
  device.copy_to_host(&value, again, sizeof value);
  CHECK(value == 0);
  device.release(again);
  device.release(rest);
}

namespace {

/// What `act` throws on a device on which launch `launch` (from 0) of those to come fails.
std::string fault(std::uint64_t launch, const std::function<void(Device&, float*)>& act) {
  const MachineScope machine(machine_that([launch](Machine& m) { m.faulty_launch = m2lm::cuda::emulation::launches() + launch; }));
  Device device(0);
  auto* const p = static_cast<float*>(device.allocate_zeroed(100));
  const auto pinned = device.pinned(16);
  const std::string message = message_of<m2lm::DeviceError>([&] {
    act(device, p);
    device.synchronize();
  });
  if (!message.empty()) {
    const std::vector<std::function<void()>> calls{
        [&] { static_cast<void>(device.allocate(1)); },
        [&] {
          float value = 0, *const here = &value;
          device.copy_to_device(p, here, 4);
        },
        [&] {
          float value = 0;
          device.copy_to_host(&value, p, 4);
        },
        [&] { device.zero(p, 4); },
        [&] { write(device, p); },
        [&] { device.synchronize(); },
        [&] { device.replay({{1}}, [] {}); },
        [&] { static_cast<void>(device.pinned(4)); },
        [&] { device.copy_to_pinned(pinned.get(), p, 4, 0); },
        [&] { device.wait_for(0); },
        [&] { device.multiply({.x = p, .ldx = 8, .w = p, .m = 1, .n = 1, .k = 8, .y = p, .ldy = 8}); },
    };
    for (const auto& call : calls) {
      const std::string later = message_of<m2lm::DeviceError>(call);
      CHECK(has(later, "cannot be used any more after an earlier fault"));
      CHECK(has(later, "the CPU backend still works"));
    }
  }
  device.release(p);
  return message;
}

}  // namespace

TEST_CASE("A kernel that fails is named with its shape, the device stays unusable, nothing leaks, and a new device works") {
  const NothingLeaks nothing;
  CHECK(fault(5, [](Device& device, float* p) { write(device, p); }) == "");

  const std::string first = fault(1, [](Device& device, float* p) {
    write(device, p);
    write(device, p + 1);
  });
  CHECK(has(first, "kernel write_one (grid [2, 1, 1], block [32, 1], 0 bytes of dynamic shared memory)"));
  CHECK(has(first, "illegal memory access"));

  const std::string product =
      fault(0, [](Device& device, float* p) { device.multiply({.x = p, .ldx = 8, .w = p, .m = 1, .n = 2, .k = 8, .y = p + 16, .ldy = 8}); });
  CHECK(has(product, "cublasLtMatmul of x [1, 8] by w [2, 8] of bf16"));

  const std::string replayed = fault(4, [](Device& device, float* p) {
    for (int i = 0; i < 4; ++i)
      device.replay({{1}}, [&] {
        write(device, p);
        read(device, p, p + 1);
      });
  });
  CHECK(has(replayed, "write_one"));

  const std::string barrier = fault(100, [](Device& device, float*) { m2lm::cuda::launch(device, "wait_in_vain", wait_in_vain, {.block_x = 64}); });
  CAPTURE(barrier);
  CHECK(has(barrier, "wait_in_vain"));

  Device device(0);
  auto* const p = static_cast<float*>(device.allocate_zeroed(4));
  write(device, p);
  float value = 0;
  device.copy_to_host(&value, p, 4);
  CHECK(value == 1.0F);
  device.release(p);
}
