// expect: m2lm: the hook of this decoder has no gradient; train the decoder without a hook
#include <m2lm/backends/reference/reference.hpp>
#include <m2lm/parts/decoders/llama.hpp>

using B = m2lm::Reference<double>;
constexpr m2lm::Precision precision{};

/// A hook of the user's.
struct Shift {
  template <class Backend, m2lm::Precision P>
  struct On : m2lm::NoParameters {
    void after_attention(m2lm::Context<Backend>&, std::int64_t, std::span<const m2lm::SequenceRows<Backend>>,
                         m2lm::Matrix<m2lm::ScalarOf<Backend>> h) const {
      for (std::int64_t i = 0; i < h.extent(0); ++i) h(i, 0) += 1;
    }
  };
};

int main() {
#if defined(M2LM_MUST_FAIL)
  using Hook = Shift;
#else
  using Hook = m2lm::NoHook;
#endif
  using Decoder = m2lm::LlamaDecoder<m2lm::BlockPolicy{}, Hook>::On<B, precision>;
  const Decoder decoder{m2lm::LlamaConfig{}};
  B backend;
  m2lm::Arena arena, tape;
  m2lm::Context<B> ctx{backend, arena, nullptr, &tape};
  Decoder::Saved saved;
  m2lm::Gradients<double> gradients;
  decoder.backward(ctx, {}, saved, gradients);
}
