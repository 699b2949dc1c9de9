// expect: m2lm::Modality: the encoder's On has no tokens\(x\) const, the rows that it gives for a preprocessed input
#include <m2lm/m2lm.hpp>

#if defined(M2LM_MUST_FAIL)
using Seen = m2lm::Image;
#else
using Seen = m2lm::Tensor<float>;
#endif

struct MeanColour {
  using Input = m2lm::Image;

  template <class B, m2lm::Precision P>
  struct On : m2lm::NoParameters {
    static std::int64_t width() { return 3; }
    std::int64_t tokens(const Seen&) const { return 1; }
    void forward(m2lm::Context<B>&, const Seen&, m2lm::Matrix<m2lm::ScalarOf<B>>) const {}
  };
};

template struct m2lm::Modality<"image", MeanColour, m2lm::LinearProjector>::On<m2lm::Cpu, m2lm::Precision{}>;
