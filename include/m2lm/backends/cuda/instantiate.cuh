// KernelsOf and TrainingKernelsOf: the functions of kernels.hpp that a model and a trainer call, put into one object, for files that nvcc
// has not seen.
// Floor: backends. May include: core, ops.
#pragma once

#include <m2lm/backends/cuda/kernels.hpp>

#include <memory>
#include <span>

namespace m2lm::inline M2LM_ABI::cuda {

/// `template struct KernelsOf<E>;`, where kernels/*.cuh are included, defines all that a model on BasicCuda<E> may call, used in this
/// file or not: their addresses are taken.
template <class E>
struct KernelsOf {
  using Function = void (*)();
  // device.cuh has a pack of two numbers too.
  using Pack = PackedMatrix (*)(Device&, const std::shared_ptr<Device>&, std::span<const AnyTensor>, DType, bool);
  static const Function functions[];
};

template <class E>
const typename KernelsOf<E>::Function KernelsOf<E>::functions[] = {
    // rows.cuh
    reinterpret_cast<Function>(&rms_norm<E>),
    reinterpret_cast<Function>(&layer_norm<E>),
    reinterpret_cast<Function>(&rope_angles),
    reinterpret_cast<Function>(&rope<E>),
    reinterpret_cast<Function>(&rope_append<E>),
    reinterpret_cast<Function>(&append_key_values<E>),
    reinterpret_cast<Function>(&copy_key_values<E>),
    reinterpret_cast<Function>(&gather_rows<E>),
    reinterpret_cast<Function>(&patchify<E>),
    reinterpret_cast<Function>(&add_rows<E>),
    reinterpret_cast<Function>(&copy_rows<E>),
    reinterpret_cast<Function>(&convert<float, E>),
    reinterpret_cast<Function>(&convert<E, float>),
    reinterpret_cast<Function>(&activation_forward<E>),
    reinterpret_cast<Function>(&add_to_length),
    reinterpret_cast<Function>(&set_length),
    // linear.cuh
    reinterpret_cast<Function>(&has_format<E>),
    reinterpret_cast<Function>(static_cast<Pack>(&pack<E>)),
    reinterpret_cast<Function>(&linear_scratch<E>),
    reinterpret_cast<Function>(&linear<E, E>),
    reinterpret_cast<Function>(&linear<E, float>),
    // attention.cuh
    reinterpret_cast<Function>(&attention_scratch<E>),
    reinterpret_cast<Function>(&attention<E>),
    // sampling.cuh
    reinterpret_cast<Function>(&sample_scratch),
    reinterpret_cast<Function>(&sample),
};

/// The same of what a trainer calls besides.
template <class E>
struct TrainingKernelsOf {
  using Function = void (*)();
  static const Function functions[];
};

template <class E>
const typename TrainingKernelsOf<E>::Function TrainingKernelsOf<E>::functions[] = {
    reinterpret_cast<Function>(&linear_input_gradient_scratch<E>),
    reinterpret_cast<Function>(&linear_input_gradient<E>),
    reinterpret_cast<Function>(&linear_weight_gradient<E>),
    reinterpret_cast<Function>(&activation_backward<E>),
    reinterpret_cast<Function>(&norm_backward_scratch),
    reinterpret_cast<Function>(&rms_norm_backward<E>),
    reinterpret_cast<Function>(&layer_norm_backward<E>),
    reinterpret_cast<Function>(&rope_backward<E>),
    reinterpret_cast<Function>(&attention_backward_scratch),
    reinterpret_cast<Function>(&attention_backward<E>),
    reinterpret_cast<Function>(&scatter_add_rows<E>),
    reinterpret_cast<Function>(&cross_entropy<E>),
};

}  // namespace m2lm::cuda
