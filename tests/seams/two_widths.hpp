// Two modalities of different widths, adjacent and repeated: one in a precision of its own, and a head with rows of its own.
#pragma once

#include <m2lm/m2lm.hpp>

namespace lab {

/// Spec: rows of `width` numbers, as they are.
template <int width_>
struct Readings {
  using Input = std::vector<float>;

  template <class B, m2lm::Precision P>
  struct On : m2lm::NoParameters {
    static std::int64_t width() { return width_; }
    static std::int64_t tokens(const Input& x) { return static_cast<std::int64_t>(x.size()) / width_; }
    void forward(m2lm::Context<B>&, const Input& x, m2lm::Matrix<m2lm::ScalarOf<B>> features) const { std::copy(x.begin(), x.end(), features.data()); }
  };
};

struct SplitHeadConfig { std::int64_t new_tokens = 0; };
inline void read_config(const m2lm::ConfigValue& root, SplitHeadConfig& c) { c.new_tokens = root.get<std::int64_t>("new_tokens"); }

/// Spec: the logits of the last `new_tokens` ids get a second product with a bias, which can be trained while the rest is frozen.
struct SplitHead {
  using Config = SplitHeadConfig;

  template <class B, m2lm::Precision P>
  class On {
    using S = m2lm::ScalarOf<B>;
    typename m2lm::LinearHead::template On<B, P> all_;
    m2lm::Linear<B> new_;

   public:
    On(std::int64_t hidden, std::int64_t vocabulary, bool tied, const Config& c) : all_(hidden, vocabulary, tied), new_(hidden, c.new_tokens, true) {}

    template <class V, class Self>
    static void fields(V&& visit, Self& self) {
      visit("", self.all_);
      visit("head_new", self.new_);
    }
    void prepare(m2lm::Context<B>& ctx, m2lm::DType format, const m2lm::AnyTensor& table) {
      all_.prepare(ctx, format, table);
      new_.prepare(ctx, format);
    }
    void forward(m2lm::Context<B>& ctx, m2lm::Matrix<const S> x, m2lm::Matrix<S> logits) const {
      all_.forward(ctx, x, logits);
      const m2lm::Matrix<S> last = logits.columns(logits.extent(1) - new_.outputs(), logits.extent(1));
      new_.forward(ctx, x, last, m2lm::Activation::none, last);
    }
  };
};

template <class B, m2lm::Precision P>
using TwoModel = m2lm::Model<B, P, m2lm::LlamaDecoder<m2lm::BlockPolicy{}, m2lm::NoHook, SplitHead>,
                             m2lm::Modality<"near", Readings<6>, m2lm::LinearProjector>,
                             m2lm::With<m2lm::Modality<"far", Readings<11>, m2lm::MlpProjector<2>>, m2lm::Precision{.weights = m2lm::DType::bf16}>>;

}  // namespace lab
