// Shared by the tests of the emulated device: machines that lack something, and what must be gone at the end of a scope.
#pragma once

#include <m2lm/testing/cuda_emulation_runtime.hpp>

#include <doctest/doctest.h>

#include <cstdint>

namespace m2lm_test {

/// Sees that the allocations, devices and pinned blocks of a scope are gone at its end.
class NothingLeaks {
  static m2lm::cuda::emulation::Counts& counts() { return m2lm::cuda::emulation::counts(); }
  std::int64_t devices_ = counts().devices, allocations_ = counts().allocations, pinned_ = counts().pinned, lost_ = counts().lost;

 public:
  ~NothingLeaks() {
    CHECK(counts().devices == devices_);
    CHECK(counts().allocations == allocations_);
    CHECK(counts().pinned == pinned_);
    CHECK(counts().lost == lost_);
  }
};

inline m2lm::cuda::emulation::Machine machine_that(auto change) {
  m2lm::cuda::emulation::Machine machine;
  change(machine);
  return machine;
}

}  // namespace m2lm_test
