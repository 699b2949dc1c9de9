// Two ways into the sequence: behind the first token with delimiters around (M2LM), and runs of placeholders (multi_token).
#pragma once

#include <m2lm/m2lm.hpp>

namespace lab {

/// Spec: rows of `width` numbers, as they are.
template <int width_>
struct Rows {
  using Input = std::vector<float>;

  template <class B, m2lm::Precision P>
  struct On : m2lm::NoParameters {
    static std::int64_t width() { return width_; }
    static std::int64_t tokens(const Input& x) { return static_cast<std::int64_t>(x.size()) / width_; }
    void forward(m2lm::Context<B>&, const Input& x, m2lm::Matrix<m2lm::ScalarOf<B>> features) const { std::copy(x.begin(), x.end(), features.data()); }
  };
};

/// Spec: `copies` MLPs see the same row of features, and each gives one row: multi_token's vector projector.
template <int copies>
struct VectorMlp {
  template <class B, m2lm::Precision P>
  class On {
    using S = m2lm::ScalarOf<B>;
    std::vector<typename m2lm::MlpProjector<2>::template On<B, P>> mlps_;

   public:
    explicit On(const m2lm::ProjectorConfig& c) {
      for (int i = 0; i < copies; ++i) mlps_.emplace_back(c);
    }
    template <class V, class Self>
    static void fields(V&& visit, Self& self) {
      visit("mlps", self.mlps_);
    }
    void prepare(m2lm::Context<B>& ctx, m2lm::DType format) {
      for (auto& mlp : mlps_) mlp.prepare(ctx, format);
    }
    std::int64_t output_tokens(std::int64_t tokens) const { return copies * tokens; }
    void forward(m2lm::Context<B>& ctx, m2lm::Matrix<const S> x, m2lm::Matrix<S> y) const {
      for (std::int64_t t = 0; t < x.extent(0); ++t)
        for (std::int64_t i = 0; i < copies; ++i)
          mlps_[static_cast<std::size_t>(i)].forward(ctx, x.rows(t, t + 1), y.rows(t * copies + i, t * copies + i + 1));
    }
  };
};

template <class B, m2lm::Precision P>
using PrefixModel = m2lm::Model<B, P, m2lm::LlamaDecoder<>,
                                m2lm::Modality<"image", Rows<7>, m2lm::LinearProjector, m2lm::PrefixAfterBos<"<image>", "</image>">>,
                                m2lm::Modality<"sound", Rows<5>, VectorMlp<3>, m2lm::PlaceholderRun>,
                                m2lm::Modality<"video", Rows<9>, m2lm::LinearProjector, m2lm::PrefixAfterBos<"<video>", "</video>">>>;

}  // namespace lab
