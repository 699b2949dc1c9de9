// AdamW over the gradients of a model, and clipping by their global norm.
// Floor: train. May include: core, ops, layers, parts, io, sampling, models.
#pragma once

#include <m2lm/core/gradients.hpp>

#include <cmath>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

namespace m2lm::inline M2LM_ABI::train {

/// torch.optim.AdamW's values. Every trained parameter decays, norms and biases too, as there.
struct AdamWOptions {
  double beta1 = 0.9;          ///< share of the first moment that a step keeps
  double beta2 = 0.999;        ///< share of the second moment that a step keeps
  double eps = 1e-8;           ///< added to the root of the second moment
  double weight_decay = 0.01;  ///< share of a value that a step of rate 1 takes away
  friend bool operator==(const AdamWOptions&, const AdamWOptions&) = default;

  /// throws OptionError for betas outside [0, 1), eps or weight_decay below 0.
  void check() const {
    require<OptionError>(beta1 >= 0 && beta1 < 1 && beta2 >= 0 && beta2 < 1, "m2lm::train::AdamW: betas ", beta1, " and ", beta2,
                         " are not both in [0, 1)");
    require<OptionError>(eps >= 0 && weight_decay >= 0, "m2lm::train::AdamW: eps ", eps, " or weight_decay ", weight_decay, " is below 0");
  }
};

/// The optimiser's state: two moments per element, in the order of the gradients' walk over `fields`.
template <class S>
class AdamW {
  AdamWOptions options_;
  std::vector<Tensor<S>> first_, second_;
  std::int64_t steps_ = 0;

 public:
  AdamW() = default;
  /// throws as options.check().
  AdamW(const Gradients<S>& gradients, const AdamWOptions& options) : options_(options) {
    options.check();
    for (const auto& entry : gradients.entries()) {
      first_.emplace_back(entry.parameter->shape);
      second_.emplace_back(entry.parameter->shape);
    }
  }

  /// Steps done so far.
  std::int64_t steps() const { return steps_; }
  /// What it was made with.
  const AdamWOptions& options() const { return options_; }

  /// One step of rate `lr` on `values`, one tensor for each gradient. With step t = 1, 2, …:
  ///   x ← x·(1 − lr·weight_decay);  m ← m + (g − m)·(1 − β1);  v ← v·β2 + g²·(1 − β2)
  ///   x ← x − lr/(1 − β1ᵗ) · m / (√v/√(1 − β2ᵗ) + eps)
  /// source: Loshchilov & Hutter, "Decoupled weight decay regularization", 2019, in the order of torch.optim.AdamW.
  void step(const Gradients<S>& gradients, std::span<const std::shared_ptr<Tensor<S>>> values, double lr) {
    require(values.size() == first_.size() && gradients.entries().size() == first_.size(), "m2lm::train::AdamW::step: ", values.size(),
            " tensors and ", gradients.entries().size(), " gradients for the state of ", first_.size());
    ++steps_;
    const auto t = static_cast<double>(steps_);
    const double correction1 = M2LM_FAULT(41) ? 1.0 : 1.0 - std::pow(options_.beta1, t), correction2 = 1.0 - std::pow(options_.beta2, t);
    const S keep = static_cast<S>(1.0 - lr * options_.weight_decay), rate = static_cast<S>(lr / correction1),
            root = static_cast<S>(std::sqrt(correction2));
    const S b1 = static_cast<S>(1.0 - options_.beta1), b2 = static_cast<S>(options_.beta2), c2 = static_cast<S>(1.0 - options_.beta2);
    const S eps = static_cast<S>(options_.eps);
    for (std::size_t i = 0; i < values.size(); ++i) {
      const S* g = gradients.entries()[i].value.data();
      S* x = values[i]->data();
      S* m = first_[i].data();
      S* v = second_[i].data();
      for (std::int64_t j = 0; j < values[i]->elements(); ++j) {
        // Decay is of the weight, not of the gradient: the moments do not see it.
        const S gradient = M2LM_FAULT(40) ? g[j] + static_cast<S>(options_.weight_decay) * x[j] : g[j];
        if (!M2LM_FAULT(40)) x[j] *= keep;
        m[j] += (gradient - m[j]) * b1;
        v[j] = v[j] * b2 + gradient * gradient * c2;
        x[j] -= rate * m[j] / (std::sqrt(v[j]) / root + eps);
      }
    }
  }
};

/// Scales all gradients by min(1, max_norm / (norm + 1e-6)) and returns the norm before that. max_norm 0: nothing is scaled.
/// source: torch.nn.utils.clip_grad_norm_.
template <class S>
double clip_gradients(Gradients<S>& gradients, double max_norm) {
  const double norm = gradients.norm();
  const double factor = max_norm / (norm + 1e-6);
  if (max_norm <= 0 || factor >= 1) return norm;
  for (auto& entry : gradients.entries())
    for (S& x : entry.value.span()) x *= static_cast<S>(factor);
  return norm;
}

}  // namespace m2lm::train
