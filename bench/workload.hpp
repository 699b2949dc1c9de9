// What programs that count or time single ops put into them. Shared by bench/ops and tests/instructions.
#pragma once

#include <m2lm/core.hpp>

#include <cstdint>

namespace workload {

/// Uniform in [-1, 1).
inline m2lm::Tensor<float> values(std::int64_t rows, std::int64_t columns, std::uint64_t seed) {
  m2lm::Tensor<float> out(m2lm::Shape{rows, columns});
  m2lm::Rng rng(seed);
  for (float& x : out.span()) x = static_cast<float>(2 * rng.uniform() - 1);
  return out;
}

inline m2lm::Matrix<const float> matrix(const m2lm::Tensor<float>& t) { return t.view<2>(); }

/// One row is a step of decoding, more are a prompt.
inline m2lm::Phase phase_of(std::int64_t rows) { return rows == 1 ? m2lm::Phase::decode : m2lm::Phase::prefill; }

/// What an op runs in.
struct Machine {
  m2lm::Cpu cpu;
  m2lm::Arena arena;
  m2lm::Context<m2lm::Cpu> ctx{cpu, arena};

  explicit Machine(const m2lm::CpuOptions& options) : cpu(options) {}
};

}  // namespace workload
