// expect: m2lm: the head of this decoder has no Saved and no backward, so the decoder cannot be trained
#include <m2lm/backends/reference/reference.hpp>
#include <m2lm/parts/decoders/llama.hpp>

using B = m2lm::Reference<double>;
constexpr m2lm::Precision precision{};

/// A head that can only be run.
struct OneWay {
  template <class Backend, m2lm::Precision P>
  struct On {
    using S = m2lm::ScalarOf<Backend>;
    m2lm::Linear<Backend> linear;
    On(std::int64_t hidden, std::int64_t vocabulary, bool) : linear(hidden, vocabulary, false) {}
    template <class V, class Self>
    static void fields(V&& visit, Self& self) {
      visit("", self.linear);
    }
    void prepare(m2lm::Context<Backend>& ctx, m2lm::DType format, const m2lm::AnyTensor&) { linear.prepare(ctx, format); }
    void forward(m2lm::Context<Backend>& ctx, m2lm::Matrix<const S> x, m2lm::Matrix<S> logits) const { linear.forward(ctx, x, logits); }
  };
};

int main() {
#if defined(M2LM_MUST_FAIL)
  using Head = OneWay;
#else
  using Head = m2lm::LinearHead;
#endif
  using Decoder = m2lm::LlamaDecoder<m2lm::BlockPolicy{}, m2lm::NoHook, Head>::On<B, precision>;
  const Decoder decoder{m2lm::LlamaConfig{}};
  B backend;
  m2lm::Arena arena, tape;
  m2lm::Context<B> ctx{backend, arena, nullptr, &tape};
  Decoder::Saved saved;
  m2lm::Gradients<double> gradients;
  decoder.predict_backward(ctx, {}, saved, gradients, {});
}
