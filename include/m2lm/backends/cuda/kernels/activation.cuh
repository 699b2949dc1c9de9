// Activations as kernels compute them, in f32.
// Floor: backends. May include: core, ops.
#pragma once

#include <m2lm/backends/cuda/device.cuh>
#include <m2lm/ops/activation.hpp>

namespace m2lm::inline M2LM_ABI::cuda {

/// act(x), with the library's exp, erf and tanh (2 ulp): beside the products that come before it, it costs nothing.
M2LM_DEVICE float apply_activation(Activation activation, float x) {
  switch (activation) {
    case Activation::none: return x;
    case Activation::relu: return x > 0.0F ? x : 0.0F;
    case Activation::silu: return x / (1.0F + expf(-x));
    case Activation::gelu: return 0.5F * x * (1.0F + erff(x * 0.70710678F));
    case Activation::gelu_tanh: return 0.5F * x * (1.0F + tanhf(0.7978845608F * (x + 0.044715F * x * x * x)));
    case Activation::quick_gelu: return x / (1.0F + expf(-1.702F * x));
  }
  return x;
}

}  // namespace m2lm::cuda
