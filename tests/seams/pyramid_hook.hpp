// An encoder that gives a pyramid, and a hook of the decoder that reads it in chosen layers: the place of MMFS.
#pragma once

#include <m2lm/m2lm.hpp>

namespace lab {
/// Spec: a map of 4 x 4 places of 6 numbers, and its half, as a pyramid; the means that make up the half are the tokens too.
struct MapEncoder {
  using Input = std::vector<float>;
  template <class B, m2lm::Precision P>
  struct On : m2lm::NoParameters {
    using S = m2lm::ScalarOf<B>;
    static std::int64_t width() { return 6; }
    static std::int64_t tokens(const Input&) { return 4; }
    void forward(m2lm::Context<B>&, const Input& x, m2lm::Matrix<S> features, std::vector<m2lm::FeatureLevel<S>>& pyramid) const {
      pyramid.push_back({4, 4, m2lm::Tensor<S>({16, 6})}), pyramid.push_back({2, 2, m2lm::Tensor<S>({4, 6})});
      std::copy(x.begin(), x.end(), pyramid[0].values.data());
      for (std::size_t i = 0; i < x.size(); ++i) pyramid[1].values.data()[i / 48 * 12 + i / 12 % 2 * 6 + i % 6] += S(x[i]) / 4;
      std::copy_n(pyramid[1].values.data(), 24, features.data());
    }
  };
};
struct GatedConfig { std::int64_t every = 1, channels = 0; };
inline void read_config(const m2lm::ConfigValue& root, GatedConfig& c) { c = {root.get<std::int64_t>("hook_every"), root.get<std::int64_t>("hook_channels")}; }
/// Spec: h += tanh(gate) · attention(h, all places of the nearest map), in every n-th layer; text before a map stays as it is.
struct GatedCrossAttention {
  using Config = GatedConfig;
  template <class B, m2lm::Precision P>
  struct On {
    using S = m2lm::ScalarOf<B>;
    GatedConfig config;
    m2lm::Linear<B> lift;
    m2lm::MultiheadAttention<B> attention;
    m2lm::Parameter gate{m2lm::Shape{1}};
    On(const m2lm::LlamaConfig& d, const GatedConfig& c) : config(c), lift(c.channels, d.hidden_size, true), attention({.width = d.hidden_size, .heads = 4}) {}
    template <class V, class Self>
    static void fields(V&& visit, Self& self) { visit("lift", self.lift), visit("attention", self.attention), visit("gate", self.gate); }
    void prepare(m2lm::Context<B>& ctx, m2lm::DType format) { lift.prepare(ctx, format), attention.prepare(ctx, format); }
    m2lm::KvCache<B> derive(m2lm::Context<B>& ctx, std::span<const m2lm::FeatureLevel<S>> levels) const {  // once per map: its keys and values
      const m2lm::Tensor<S> places = m2lm::flatten(levels);
      m2lm::Tensor<S> lifted({places.shape()[0], lift.outputs()});
      lift.forward(ctx, places.template view<2>(), lifted.template view<2>());
      return attention.memory(ctx, lifted.template view<2>());
    }
    void after_attention(m2lm::Context<B>& ctx, std::int64_t layer, std::span<const m2lm::SequenceRows<B>> sequences, m2lm::Matrix<S> h) const {
      m2lm::Tensor<S> y({1, h.extent(1)});
      for (const m2lm::SequenceRows<B>& s : sequences)
        for (std::int64_t row = s.begin; row < s.begin + s.count && layer % config.every == 0; ++row) {
          const auto maps = m2lm::visible(s.media, s.position(row));
          if (maps.empty()) continue;
          attention.forward(ctx, h.rows(row, row + 1), maps.back().features->template derived<m2lm::KvCache<B>>(), y.template view<2>());
          for (std::int64_t j = 0; j < h.extent(1); ++j) h(row, j) += S(std::tanh(gate.value.at(0))) * y.data()[j];
        }
    }
  };
};

template <class B, m2lm::Precision P>
using MapModel = m2lm::Model<B, P, m2lm::LlamaDecoder<m2lm::BlockPolicy{}, GatedCrossAttention>, m2lm::Modality<"map", MapEncoder, m2lm::LinearProjector>>;
}  // namespace lab
