// Compiled twice, as namespace `baseline` with no -march and as namespace `avx2` with AVX2 and FMA for the whole file, each
// header-only: the two copies of every inline function must be able to stand for each other.
#include <m2lm/m2lm.hpp>

#include <odr/report.hpp>

namespace {

template <class... T>
std::vector<std::size_t> layout_of() {
  std::vector<std::size_t> sizes;
  ((sizes.push_back(sizeof(T)), sizes.push_back(alignof(T))), ...);
  return sizes;
}

std::vector<float> linear(m2lm::Cpu cpu, m2lm::DType format) {
  constexpr std::int64_t rows = 5, inputs = 131, outputs = 67;
  m2lm::Tensor<float> x(m2lm::Shape{rows, inputs}), w(m2lm::Shape{outputs, inputs}), y(m2lm::Shape{rows, outputs});
  for (std::int64_t i = 0; i < x.elements(); ++i) x.data()[i] = static_cast<float>(i % 17 - 8) / 8;
  for (std::int64_t i = 0; i < w.elements(); ++i) w.data()[i] = static_cast<float>(i % 23 - 11) / 16;
  m2lm::Arena arena;
  m2lm::Context<m2lm::Cpu> context{cpu, arena};
  const m2lm::AnyTensor weight(std::move(w));
  const m2lm::PackedMatrix packed = m2lm::ops::pack(context, std::span(&weight, 1), format);
  m2lm::ops::linear(context, std::as_const(x).view<2>(), packed, {.activation = m2lm::Activation::silu}, y.view<2>());
  return {y.span().begin(), y.span().end()};
}

using Vlm = m2lm::Model<m2lm::Cpu, m2lm::Precision{.weights = m2lm::DType::bf16}, m2lm::LlamaDecoder<>,
                        m2lm::Modality<"image", m2lm::ClipVit<>, m2lm::MlpProjector<2>>>;

std::string answer() {
  const Vlm model = Vlm::from_pretrained("assets/easy-vqa");
  auto prompt = model.prompt("<image>\nWhat shape is in the image?");
  prompt.attach<"image">(m2lm::load_image("assets/easy-vqa/pictures/0.png"));
  std::string text;
  model.generate(prompt, {.max_new_tokens = 16, .on_text = [&](std::string_view piece) { text += piece; }});
  return text;
}

}  // namespace

Report M2LM_ODR_SIDE::report() {
  Report r;
#if defined(__AVX2__)
  r.compiled_with_avx2 = true;
#endif
  r.layout = layout_of<m2lm::Shape, m2lm::Matrix<float>, m2lm::Tensor<float>, m2lm::AnyTensor, m2lm::PackedMatrix, m2lm::Arena, m2lm::ThreadPool,
                       m2lm::Cpu, m2lm::Image, Vlm, decltype(std::declval<const Vlm&>().prompt(""))>();
  for (int level = 0; level <= static_cast<int>(m2lm::default_isa()); ++level)
    for (m2lm::DType format : {m2lm::DType::f32, m2lm::DType::bf16})
      r.linear.push_back(linear(m2lm::Cpu{{.threads = 1, .max_isa = static_cast<m2lm::IsaLevel>(level)}}, format));
  r.answer = answer();
  return r;
}
