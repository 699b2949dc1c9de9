// Choosing the next tokens where the logits are, on a device.
// Floor: ops. May include: core, ops.
#pragma once

#include <m2lm/ops/op.hpp>

#include <cstdint>

namespace m2lm::inline M2LM_ABI {

/// How one row's token is chosen: the fields of SamplingOptions, and the state of its Rng.
struct SamplerRow {
  std::uint64_t seed = 0, counter = 0;  ///< a token that is drawn adds one to the counter
  float temperature = 0;
  double top_p = 1;  ///< f64: the limit is f32(1 - top_p), as the host has it
  float min_p = 0, repetition_penalty = 1;
  std::int32_t top_k = 0;
  std::int32_t failed = 0;  ///< set to 1 when a logit is NaN or +inf, or all are -inf
};

namespace ops {

struct Sample;

/// ids[r] = the token that Sampler chooses from logits [rows, vocabulary], which are overwritten; -1 where none can be chosen. A chosen
/// token is marked in `seen`, one bit per token, [rows, ⌈vocabulary/32⌉] words; null where no row has a repetition penalty. `greedy`:
/// every row has the temperature 0, which saves the steps that only a draw needs.
template <class B>
  requires(!HostBackend<B>)
void sample(Context<B>& ctx, Matrix<AccumulatorOf<B>> logits, OnDevice<SamplerRow>* rows, OnDevice<std::uint32_t>* seen, OnDevice<std::int32_t>* ids,
            bool greedy = false) {
  Impl<Sample, B>::run(ctx, logits, rows, seen, ids, greedy);
}

}  // namespace ops
}  // namespace m2lm
