// A program that was built with CUDA, where no device can be used: without a driver, or with all devices hidden (ctest empties
// CUDA_VISIBLE_DEVICES). It starts, says why there is no device, and computes on the CPU.
#include <m2lm/backends/cuda/runtime.cuh>

#include <m2lm/backends/cuda/cuda.hpp>
#include <m2lm/core.hpp>

#include <doctest/doctest.h>

#include <support.hpp>

#include <span>
#include <string>

using m2lm_test::has;
using m2lm_test::message_of;

namespace {

/// A product on the CPU, as a model computes it.
float cpu_works() {
  m2lm::Cpu cpu{{.threads = 2}};
  m2lm::Arena arena;
  m2lm::Context<m2lm::Cpu> ctx{cpu, arena};
  m2lm::Tensor<float> weight({1, 3}), x({1, 3}), y({1, 1});
  for (int i = 0; i < 3; ++i) weight.data()[i] = x.data()[i] = static_cast<float>(i + 1);
  const m2lm::AnyTensor source(std::move(weight));
  const m2lm::PackedMatrix packed = m2lm::ops::pack(ctx, std::span(&source, 1), m2lm::DType::f32);
  m2lm::ops::linear(ctx, std::as_const(x).view<2>(), packed, {}, y.view<2>());
  return y.data()[0];
}

}  // namespace

TEST_CASE("Without a device the count is 0, with a reason that a person can act on") {
  std::string reason;
  CHECK(m2lm::cuda::device_count() == 0);
  CHECK(m2lm::cuda::device_count(&reason) == 0);
  MESSAGE(reason);
  const bool driver = has(reason, "no NVIDIA driver is installed or loaded");
  const bool hidden = has(reason, "no device is visible") && has(reason, "CUDA_VISIBLE_DEVICES");
  const bool old = has(reason, "install a newer driver");
  CHECK((driver || hidden || old));
}

TEST_CASE("Device and backend throw the reason, again and again, and the CPU computes before, between and after") {
  std::string reason;
  m2lm::cuda::device_count(&reason);
  CHECK(cpu_works() == 14.0F);
  for (int i = 0; i < 3; ++i) {
    CHECK(has(message_of<m2lm::DeviceError>([] { m2lm::cuda::Device device(0); }), reason));
    CHECK(cpu_works() == 14.0F);
    CHECK(has(message_of<m2lm::DeviceError>([] { m2lm::Cuda backend; }), reason));
  }
  CHECK(cpu_works() == 14.0F);
}
