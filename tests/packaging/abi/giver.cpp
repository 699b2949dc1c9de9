// A program that gives a tensor of its version to the function of taker.cpp.
#include <m2lm/core/tensor.hpp>

float first_of(const m2lm::Tensor<float>& tensor);

int main() {
  m2lm::Tensor<float> tensor(m2lm::Shape{1});
  return first_of(tensor) == 0.0F ? 0 : 1;
}
