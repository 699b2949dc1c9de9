// A model on CUDA where something is missing or fails: no device, an old driver, too little device memory, a kernel that faults. The error
// is clear, nothing leaks, and the CPU goes on in the same process.
// labels: emulated-only
#include <m2lm/testing/cuda_emulation_runtime.hpp>

#include <m2lm/m2lm.cuh>

#include "../unit/models_support.hpp"
#include "emulated_support.hpp"

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace {

using namespace m2lm_test;
using m2lm::cuda::detail::NoDevice;
using m2lm::cuda::emulation::allocations;
using m2lm::cuda::emulation::launches;
using m2lm::cuda::emulation::Machine;
using m2lm::cuda::emulation::MachineScope;

using CudaLm = TextModel<m2lm::BasicCuda<float>>;

/// A checkpoint, and what the CPU answers with it.
struct Checkpoint {
  TemporaryDirectory directory;
  std::vector<std::int32_t> prompt = some_ids(6, 96);
  std::vector<std::int32_t> expected;

  Checkpoint() {
    m2lm::testing::write_synthetic_llama(directory.path());
    expected = on_cpu();
  }
  template <class M>
  std::vector<std::int32_t> answer(const M& model) const {
    return model.generate(model.prompt(prompt), {.max_new_tokens = 6, .ignore_eos = true}).tokens;
  }
  std::vector<std::int32_t> on_cpu() const { return answer(Lm::from_pretrained(directory.path())); }
  std::vector<std::int32_t> on_cuda() const { return answer(CudaLm::from_pretrained(directory.path())); }
};

}  // namespace

TEST_CASE("Without a device, or with too old a driver, loading says why, and the CPU answers") {
  const Checkpoint checkpoint;
  const NothingLeaks nothing;
  const auto refusal = [&](NoDevice why) {
    const MachineScope machine(machine_that([why](Machine& m) {
      m.devices = 0;
      m.why_none = why;
      m.driver = 12040;
    }));
    const std::string message = message_of<m2lm::DeviceError>([&] { static_cast<void>(checkpoint.on_cuda()); });
    CHECK(checkpoint.on_cpu() == checkpoint.expected);
    return message;
  };
  CHECK(has(refusal(NoDevice::no_driver), "no NVIDIA driver"));
  CHECK(has(refusal(NoDevice::old_driver), "install a newer driver"));
  CHECK(has(refusal(NoDevice::none_visible), "CUDA_VISIBLE_DEVICES"));
  CHECK(checkpoint.on_cuda() == checkpoint.expected);
}

TEST_CASE("A device that is too small for the weights is refused before anything is copied, with both sizes") {
  const Checkpoint checkpoint;
  const NothingLeaks nothing;
  const std::uint64_t before = launches();
  const MachineScope machine(machine_that([](Machine& m) { m.memory_bytes = 1000; }));
  const std::string message = message_of<m2lm::CapacityError>([&] { static_cast<void>(checkpoint.on_cuda()); });
  CHECK(has(message, checkpoint.directory.path()));
  CHECK(has(message, "MiB are available"));
  CHECK(launches() == before);
  CHECK(checkpoint.on_cpu() == checkpoint.expected);
}

TEST_CASE("Device memory that runs out at any allocation of a load or an answer: the sizes are named, nothing leaks, and the model goes on") {
  const Checkpoint checkpoint;
  const std::uint64_t before = allocations();
  CHECK(checkpoint.on_cuda() == checkpoint.expected);
  const std::uint64_t count = allocations() - before;
  REQUIRE(count > 10);
  int in_load = 0, in_answer = 0;
  for (std::uint64_t at = 0; at < count; ++at) {
    CAPTURE(at);
    const NothingLeaks nothing;
    const MachineScope machine(machine_that([at](Machine& m) { m.failing_allocation = allocations() + at; }));
    std::optional<CudaLm> model;
    std::string message = message_of<m2lm::CapacityError>([&] { model.emplace(CudaLm::from_pretrained(checkpoint.directory.path())); });
    if (model) {
      ++in_answer;
      message = message_of<m2lm::CapacityError>([&] { static_cast<void>(checkpoint.answer(*model)); });
      CHECK(checkpoint.answer(*model) == checkpoint.expected);  // there is memory again
    } else {
      ++in_load;
    }
    CAPTURE(message);
    CHECK(has(message, "bytes of device memory were asked for"));
    CHECK(has(message, "smaller precision or context"));
  }
  CHECK(in_load >= 5);
  CHECK(in_answer >= 2);
  CHECK(checkpoint.on_cpu() == checkpoint.expected);
}

TEST_CASE("A kernel that faults, wherever, is named; the model says so from then on, and a new one and the CPU answer") {
  const Checkpoint checkpoint;
  const std::uint64_t before = launches();
  CHECK(checkpoint.on_cuda() == checkpoint.expected);
  const std::uint64_t count = launches() - before;
  REQUIRE(count > 20);
  const std::uint64_t step = std::max<std::uint64_t>(count / 23, 1);
  std::vector<std::string> named;
  for (std::uint64_t at = 0; at < count; at += step) {
    CAPTURE(at);
    const NothingLeaks nothing;
    const MachineScope machine(machine_that([at](Machine& m) { m.faulty_launch = launches() + at; }));
    std::string message = message_of<m2lm::DeviceError>([&] {
      const CudaLm model = CudaLm::from_pretrained(checkpoint.directory.path());
      const std::string first = message_of<m2lm::DeviceError>([&] { static_cast<void>(checkpoint.answer(model)); });
      CHECK(!first.empty());
      CHECK(has(message_of<m2lm::DeviceError>([&] { static_cast<void>(checkpoint.answer(model)); }), "cannot be used any more"));
      throw m2lm::DeviceError(first);
    });
    CHECK(has(message, "illegal memory access"));
    CHECK((has(message, "kernel ") || has(message, "cublasLtMatmul of x [")));
    named.push_back(std::move(message));
  }
  std::sort(named.begin(), named.end());
  CHECK(std::unique(named.begin(), named.end()) - named.begin() >= 4);
  CHECK(checkpoint.on_cpu() == checkpoint.expected);
  CHECK(checkpoint.on_cuda() == checkpoint.expected);
}
