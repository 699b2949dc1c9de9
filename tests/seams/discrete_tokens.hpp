// A modality that yields token ids of the decoder's own vocabulary: CM3Leon's pictures.
#pragma once

#include <m2lm/m2lm.hpp>

namespace lab {

/// What config.json says about the encoder: the codebook, and the id of its first entry in the decoder's vocabulary.
struct CodebookConfig {
  std::int64_t entries = 0, width = 0, first_id = 0;
};
inline void read_config(const m2lm::ConfigValue& root, CodebookConfig& c) {
  const m2lm::ConfigValue codebook = root["codebook_config"];
  c = {codebook.get<std::int64_t>("entries"), codebook.get<std::int64_t>("width"), codebook.get<std::int64_t>("first_id")};
}

/// Spec: every `width` numbers become the id of the nearest entry of the codebook.
struct NearestCode {
  using Input = std::vector<float>;
  using Config = CodebookConfig;

  template <class B, m2lm::Precision P>
  class On {
    CodebookConfig config_;
    m2lm::Parameter codebook_;
    m2lm::Tensor<m2lm::ScalarOf<B>> entries_;

   public:
    explicit On(const CodebookConfig& c) : config_(c), codebook_({c.entries, c.width}) {}

    template <class V, class Self>
    static void fields(V&& visit, Self& self) {
      visit("codebook", self.codebook_);
    }
    void prepare(m2lm::Context<B>&, m2lm::DType) { entries_ = codebook_.value.template to<m2lm::ScalarOf<B>>(); }

    std::vector<std::int32_t> token_ids(m2lm::Context<B>&, const Input& x) const {
      const auto distance = [&](std::int64_t token, std::int64_t entry) {
        double sum = 0;
        for (std::int64_t i = 0; i < config_.width; ++i)
          sum += std::pow(double(x[static_cast<std::size_t>(token * config_.width + i)]) - double(entries_.data()[entry * config_.width + i]), 2);
        return sum;
      };
      std::vector<std::int32_t> ids(x.size() / static_cast<std::size_t>(config_.width));
      for (std::size_t t = 0; t < ids.size(); ++t) {
        std::int64_t best = 0;
        for (std::int64_t e = 1; e < config_.entries; ++e)
          if (distance(static_cast<std::int64_t>(t), e) < distance(static_cast<std::int64_t>(t), best)) best = e;
        ids[t] = static_cast<std::int32_t>(config_.first_id + best);
      }
      return ids;
    }
  };
};

template <class B, m2lm::Precision P>
using CodeModel = m2lm::Model<B, P, m2lm::LlamaDecoder<>, m2lm::Modality<"picture", NearestCode, m2lm::NoProjector, m2lm::DiscreteTokens<"<break>", "<eoi>">>>;

}  // namespace lab
