// What the emulator of CUDA finds in kernels that are wrong, and how it says so.
// labels: emulated-only
#include "device_support.hpp"

#include <m2lm/backends/cuda/device.cuh>

#include <cmath>
#include <cstddef>
#include <string>
#include <vector>

#include <sys/wait.h>
#include <unistd.h>

namespace m2lm::inline M2LM_ABI::cuda {
namespace {

enum class Mistake {
  none,
  leaves_before_barrier,
  other_barrier,
  other_collective,
  barrier_and_collective,
  part_of_a_warp,
  no_shared_memory,
  unaligned
};

template <Mistake mistake>
M2LM_KERNEL void make(float* y) {
  const unsigned i = threadIdx.x;
  float value = static_cast<float>(i);
  if constexpr (mistake == Mistake::leaves_before_barrier) {
    if (i == 37) return;
    __syncthreads();
  } else if constexpr (mistake == Mistake::other_barrier) {
    if (i < 40) __syncthreads();
    __syncthreads();
  } else if constexpr (mistake == Mistake::other_collective) {
    if (i % 32 < 7)
      value = shuffle(value, 1);
    else
      value = shuffle_xor(value, 1);
  } else if constexpr (mistake == Mistake::barrier_and_collective) {
    if (i < 40) __syncthreads();
    value = warp_sum(value);
    if (i >= 40) __syncthreads();
  } else if constexpr (mistake == Mistake::part_of_a_warp) {
    value = shuffle(value, 0);
  } else if constexpr (mistake == Mistake::no_shared_memory) {
    value = dynamic_shared<float>()[0];
  } else if constexpr (mistake == Mistake::unaligned) {
    float values[4];
    load_vector<4>(y + 1, values);
    value = values[0];
  }
  y[i] = value;
}

/// What the device says of a launch when the host waits for it; empty if all is well.
template <Mistake mistake>
std::string fault_of(unsigned threads = 64) {
  Device device(0);
  const m2lm_test::DeviceArray<float> y(device, 64);
  launch(device, "make_a_mistake", make<mistake>, {.block_x = threads}, y.data());
  try {
    device.synchronize();
  } catch (const DeviceError& error) {
    return error.what();
  }
  return "";
}

bool has(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

TEST_CASE("threads that do not meet are named, with the kernel and the places") {
  CHECK(fault_of<Mistake::none>().empty());

  std::string fault = fault_of<Mistake::leaves_before_barrier>();
  CAPTURE(fault);
  CHECK(has(fault, "make_a_mistake"));
  CHECK(has(fault, "__syncthreads at emulation.cpp:"));
  CHECK(has(fault, "thread (37, 0, 0), which has left the kernel"));

  fault = fault_of<Mistake::other_barrier>();
  CHECK(has(fault, "all 64 threads have to meet at one place"));

  fault = fault_of<Mistake::other_collective>();
  CHECK(has(fault, "in shuffle at emulation.cpp:"));
  CHECK(has(fault, "in shuffle_xor at emulation.cpp:"));

  fault = fault_of<Mistake::barrier_and_collective>();
  CHECK(has(fault, "waits in __syncthreads at emulation.cpp:"));
  CHECK(has(fault, "shuffle_xor"));
}

TEST_CASE("a collective of part of a warp, shared memory that was not asked for, and an address that is not aligned are faults") {
  CHECK(has(fault_of<Mistake::part_of_a_warp>(48), "needs a whole warp, and the block has 48 threads"));
  CHECK(has(fault_of<Mistake::no_shared_memory>(), "asks for no shared memory"));
  CHECK(has(fault_of<Mistake::unaligned>(), "no multiple of 16"));
}

TEST_CASE("the emulator goes on after a fault") {
  CHECK(!fault_of<Mistake::leaves_before_barrier>().empty());
  CHECK(fault_of<Mistake::none>().empty());
}

/// Reads what is in shared memory, then writes there.
M2LM_KERNEL void read_before_written(float* y) {
  float* shared = dynamic_shared<float>();
  y[blockIdx.x * blockDim.x + threadIdx.x] = shared[threadIdx.x];
  shared[threadIdx.x] = 1;
}

TEST_CASE("shared memory is NaN at the beginning of every block") {
  Device device(0);
  const m2lm_test::DeviceArray<float> y(device, std::vector<float>(128));
  launch(device, "read_before_written", read_before_written, {.grid_x = 2, .block_x = 64, .shared_bytes = 256}, y.data());
  for (const float value : y.read()) CHECK(std::isnan(value));
}

/// Copies two groups and waits until all but the newest `Pending` are there; Pending 2 is a missing wait.
template <int Pending>
M2LM_KERNEL void copy_two(const float* x, float* y) {
  float* shared = dynamic_shared<float>();
  for (int group = 0; group < 2; ++group) {
    copy_async16(shared + 4 * group, x + 4 * group);
    copy_async_commit();
  }
  copy_async_wait<Pending>();
  for (int i = 0; i < 8; ++i) y[i] = shared[i];
}

TEST_CASE("bytes of an asynchronous copy are NaN before its wait") {
  Device device(0);
  const m2lm_test::DeviceArray<float> x(device, std::vector<float>{1, 2, 3, 4, 5, 6, 7, 8}), y(device, 8);
  launch(device, "copy_two", copy_two<0>, {.shared_bytes = 32}, x.data(), y.data());
  CHECK(y.read() == x.read());
  launch(device, "copy_two", copy_two<1>, {.shared_bytes = 32}, x.data(), y.data());
  for (std::size_t i = 0; i < 8; ++i) CHECK(std::isnan(y.read()[i]) == (i >= 4));
  launch(device, "copy_two", copy_two<2>, {.shared_bytes = 32}, x.data(), y.data());
  for (const float value : y.read()) CHECK(std::isnan(value));
}

/// Thread i reads what thread i ^ 1 has written, without a barrier between.
M2LM_KERNEL void read_neighbour(float* y) {
  float* shared = dynamic_shared<float>();
  shared[threadIdx.x] = static_cast<float>(threadIdx.x);
  y[threadIdx.x] = shared[threadIdx.x ^ 1];
}
/// Block i adds to what block i - 1 has written.
M2LM_KERNEL void follow_block(float* y) { y[blockIdx.x + 1] = y[blockIdx.x] + 1; }

TEST_CASE("a missing barrier shows, and so do blocks that wait for each other, in one of two launches") {
  Device device(0);
  const m2lm_test::DeviceArray<float> y(device, 64);
  int early[2] = {0, 0};
  for (int& read_early : early) {
    launch(device, "read_neighbour", read_neighbour, {.block_x = 64, .shared_bytes = 256}, y.data());
    for (const float value : y.read()) read_early += std::isnan(value);
  }
  CHECK(early[0] == 32);  // half of the neighbours come later, in either order
  CHECK(early[1] == 32);

  std::vector<float> results;
  for (int i = 0; i < 2; ++i) {
    const m2lm_test::DeviceArray<float> chain(device, std::vector<float>(9));
    launch(device, "follow_block", follow_block, {.grid_x = 8}, chain.data());
    results.push_back(chain.read().back());
  }
  CHECK(results[0] != results[1]);
}

#if defined(M2LM_EMULATION_ASAN)
M2LM_KERNEL void write_shared() { dynamic_shared<unsigned char>()[threadIdx.x] = 1; }

template <class T>
M2LM_KERNEL void write_array(T* y) {
  M2LM_SHARED T array[63];
  array[threadIdx.x] = 1;
  y[threadIdx.x] = array[0];
}

/// Whether what `run` launches ends the process.
template <class Run>
bool ends_the_process(const Run& run) {
  const pid_t child = fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    close(STDERR_FILENO);
    Device device(0);
    run(device);
    _exit(0);
  }
  int status = 0;
  REQUIRE(waitpid(child, &status, 0) == child);
  return !WIFEXITED(status) || WEXITSTATUS(status) != 0;
}

TEST_CASE("an access just outside shared memory is found by AddressSanitizer") {
  const auto write_with = [](std::size_t bytes) {
    return [bytes](Device& device) { launch(device, "write_shared", write_shared, {.block_x = 64, .shared_bytes = bytes}); };
  };
  CHECK(!ends_the_process(write_with(64)));
  CHECK(ends_the_process(write_with(63)));
  const auto write_by = [](unsigned threads) {
    return [threads](Device& device) {
      const m2lm_test::DeviceArray<float> y(device, 64);
      launch(device, "write_array", write_array<float>, {.block_x = threads}, y.data());
    };
  };
  CHECK(!ends_the_process(write_by(63)));
  CHECK(ends_the_process(write_by(64)));
}
#endif

}  // namespace
}  // namespace m2lm::cuda
