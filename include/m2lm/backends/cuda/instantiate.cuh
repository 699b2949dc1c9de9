// KernelsOf: the functions of kernels.hpp that a model calls, put into one object, for files that nvcc has not seen.
// Floor: backends. May include: core, ops.
#pragma once

#include <m2lm/backends/cuda/kernels.hpp>

namespace m2lm::cuda {

/// `template struct KernelsOf<M>;`, where kernels/*.cuh are included, defines all that a model M on BasicCuda<E> may call, used in this
/// file or not: their addresses are taken.
template <class M>
struct KernelsOf {
  using E = typename M::Backend::Element;
  using Function = void (*)();
  static const Function functions[];
};

template <class M>
const typename KernelsOf<M>::Function KernelsOf<M>::functions[] = {
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
    reinterpret_cast<Function>(&pack<E>),
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

}  // namespace m2lm::cuda
