// expect: m2lm::Modality: the projector's On has no output_tokens\(n\) const, the rows that n rows become
#include <m2lm/m2lm.hpp>

struct Nothing {
  template <class B, m2lm::Precision P>
  struct On : m2lm::NoParameters {
    explicit On(const m2lm::ProjectorConfig&) {}
#if !defined(M2LM_MUST_FAIL)
    std::int64_t output_tokens(std::int64_t n) const { return n; }
#endif
    void forward(m2lm::Context<B>&, m2lm::Matrix<const m2lm::ScalarOf<B>>, m2lm::Matrix<m2lm::ScalarOf<B>>) const {}
  };
};

template struct m2lm::Modality<"image", m2lm::ClipVit<>, Nothing>::On<m2lm::Cpu, m2lm::Precision{}>;
