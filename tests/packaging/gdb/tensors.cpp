// Tensors for gdb to print: a comment "print", expression, colon, text says what it must say at the end of main.
#include <m2lm/core/tensor.hpp>

namespace {
int done() { return 0; }
}  // namespace

int main() {
  m2lm::Tensor<float> tensor(m2lm::Shape{2, 3});
  for (int i = 0; i < 6; ++i) tensor.data()[i] = 0.5F * static_cast<float>(i);
  m2lm::Tensor<m2lm::Bf16> large(m2lm::Shape{4, 4});
  large.data()[1] = m2lm::to_bf16(-1.5F);
  m2lm::Tensor<std::uint8_t> none;
  const m2lm::Matrix<const float> column = tensor.view<2>().columns(1, 2);
  m2lm::Tensor<bool> truths(m2lm::Shape{2});
  truths.data()[1] = true;
  const m2lm::AnyTensor any(tensor.clone());
  const m2lm::Half half = m2lm::to_half(0.25F);
  const m2lm::Shape shape{7, 8};
  // print tensor: m2lm::Tensor [2, 3] f32 {0, 0.5, 1, 1.5, 2, 2.5}
  // print large: m2lm::Tensor [4, 4] bf16 {0, -1.5, 0, 0, 0, 0, 0, 0, …}
  // print none: m2lm::Tensor [] u8 {}
  // print column: m2lm::View [2, 1] strides [3, 1] f32 {0.5, 2}
  // print truths: m2lm::Tensor [2] bool {false, true}
  // print any: m2lm::AnyTensor [2, 3] f32 {0, 0.5, 1, 1.5, 2, 2.5}
  // print half: 0.25
  // print shape: [7, 8]
  return done() + static_cast<int>(shape.rank() == 0) + static_cast<int>(half.bits == 0) + static_cast<int>(!any.has_value()) + static_cast<int>(column.elements() == 0);
}
