// LinearHead: hidden states to logits over the vocabulary.
// Floor: parts. May include: core, ops, layers.
#pragma once

#include <m2lm/layers/linear.hpp>

namespace m2lm::inline M2LM_ABI {

/// Spec. Key: lm_head.weight, absent when the embedding table is tied.
struct LinearHead {
  template <class B, Precision P>
  class On {
    using S = ScalarOf<B>;
    bool tied_ = false;

   public:
    Linear<B> linear;

    On() = default;
    On(std::int64_t hidden_size, std::int64_t vocab_size, bool tied) : tied_(tied), linear(hidden_size, vocab_size, false) {}

    template <class V, class Self>
    static void fields(V&& visit, Self& self) {
      if (!self.tied_) visit("", self.linear);
    }

    void prepare(Context<B>& ctx, DType format, const AnyTensor& embedding_table) {
      if (tied_ || M2LM_FAULT(27)) linear.weight.value = embedding_table;
      linear.prepare(ctx, format);
    }

    using Saved = typename Linear<B>::Saved;
    /// logits = x·wᵀ. requires x [rows, hidden], logits [rows, vocabulary].
    void forward(Context<B>& ctx, Matrix<const S> x, Matrix<AccumulatorOf<B>> logits, Saved* saved = nullptr) const {
      linear.forward(ctx, x, logits);
      if (saved) *saved = {x};
    }
    /// `embedding` is the table that a tied head reads: the gradient of its weight belongs there.
    void backward(Context<B>& ctx, Matrix<const S> dlogits, const Saved& saved, Gradients<S>& gradients, const Parameter& embedding, Matrix<S> dx) const {
      Linear<B>::parameter_gradients(ctx, saved.x, dlogits, gradients.find(tied_ ? embedding : linear.weight), nullptr);
      if (dx.data()) linear.input_gradient(ctx, dlogits, dx);
    }
  };
};

}  // namespace m2lm
