// A projector that attends over the decoder's embedding table: M2LM's alignment, with a learned key and value and a zero logit.
#pragma once

#include <m2lm/m2lm.hpp>

namespace lab {

/// Spec: rows of 12 numbers, as they are.
struct SpectrumEncoder {
  using Input = std::vector<float>;

  template <class B, m2lm::Precision P>
  struct On : m2lm::NoParameters {
    static std::int64_t width() { return 12; }
    static std::int64_t tokens(const Input& x) { return static_cast<std::int64_t>(x.size()) / 12; }
    void forward(m2lm::Context<B>&, const Input& x, m2lm::Matrix<m2lm::ScalarOf<B>> features) const { std::copy(x.begin(), x.end(), features.data()); }
  };
};

/// Spec: a linear layer, whose outputs then attend over the embedding table and are replaced by what they find there.
template <int heads>
struct VocabularyAlignment {
  template <class B, m2lm::Precision P>
  class On {
    using S = m2lm::ScalarOf<B>;
    m2lm::Linear<B> lift_;
    m2lm::MultiheadAttention<B> align_;
    m2lm::KvCache<B> vocabulary_;

   public:
    explicit On(const m2lm::ProjectorConfig& c)
        : lift_(c.input_width, c.output_width, true), align_({.width = c.output_width, .heads = heads, .bias_kv = true, .zero_logit = true}) {}

    template <class V, class Self>
    static void fields(V&& visit, Self& self) {
      visit("transform_to_hidden", self.lift_);
      visit("align_attention", self.align_);
    }
    void prepare(m2lm::Context<B>& ctx, m2lm::DType format) {
      lift_.prepare(ctx, format);
      align_.prepare(ctx, format);
      vocabulary_ = align_.memory(ctx, *ctx.embedding_table);
    }
    std::int64_t output_tokens(std::int64_t tokens) const { return tokens; }
    void forward(m2lm::Context<B>& ctx, m2lm::Matrix<const S> x, m2lm::Matrix<S> y) const {
      lift_.forward(ctx, x, y);
      align_.forward(ctx, y, vocabulary_, y);
    }
  };
};

template <class B, m2lm::Precision P>
using AlignedModel = m2lm::Model<B, P, m2lm::LlamaDecoder<>, m2lm::Modality<"sound", SpectrumEncoder, VocabularyAlignment<4>>>;

}  // namespace lab
