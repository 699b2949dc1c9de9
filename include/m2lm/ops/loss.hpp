// Cross-entropy of logits against token ids, and its gradient.
// Floor: ops. May include: core, ops.
#pragma once

#include <m2lm/ops/op.hpp>

#include <span>

namespace m2lm::inline M2LM_ABI {

/// A target that takes no part in the loss. source: the ignore_index of torch.nn.CrossEntropyLoss.
inline constexpr std::int32_t ignored_target = -100;

/// How many targets take part: the divisor of a mean.
inline std::int64_t counted_targets(std::span<const std::int32_t> targets) {
  std::int64_t n = 0;
  for (const std::int32_t t : targets) n += t != ignored_target ? 1 : 0;
  return n;
}

namespace ops {

struct CrossEntropy;

/// losses[i] = log(Σ exp(logits[i])) − logits[i, targets[i]], and 0 where targets[i] is ignored_target. Where `dlogits` is not
/// empty: dlogits = scale · (softmax(logits) − onehot(targets)), the gradient of scale · Σ losses, and 0 in ignored rows. For a
/// mean, scale = 1 / counted_targets(targets). On a device losses are f32.
/// requires logits [rows, vocabulary], rows targets, losses [rows], dlogits [rows, vocabulary] or empty; dlogits may alias logits.
/// throws InputError for a target outside the vocabulary that is not ignored_target.
template <class B>
void cross_entropy(Context<B>& ctx, Matrix<const ScalarOf<B>> logits, std::span<const std::int32_t> targets, double scale, Vector<AccumulatorOf<B>> losses,
                   Matrix<ScalarOf<B>> dlogits) {
  const auto rows = static_cast<std::int64_t>(targets.size());
  require(logits.extent(0) == rows && losses.extent(0) == rows, "m2lm::ops::cross_entropy: logits are ", logits.shape(), ", losses ",
          losses.shape(), ", for ", rows, " targets");
  require(dlogits.data() == nullptr || dlogits.shape() == logits.shape(), "m2lm::ops::cross_entropy: logits are ", logits.shape(),
          ", dlogits are ", dlogits.shape());
  for (const std::int32_t t : targets)
    require<InputError>(t == ignored_target || (t >= 0 && t < logits.extent(1)), "m2lm: the target ", t, " is outside the vocabulary of ",
                        logits.extent(1), " tokens; ", ignored_target, " leaves a position out of the loss");
  if (rows != 0) Impl<CrossEntropy, B>::run(ctx, logits, targets, scale, losses, dlogits);
}

}  // namespace ops
}  // namespace m2lm
