// A library's function that takes a tensor, of the version that this file is compiled with.
#include <m2lm/core/tensor.hpp>

float first_of(const m2lm::Tensor<float>& tensor) { return tensor.data()[0]; }
