// The kernels of the models in tests/cuda/model.cpp, which the host compiler compiles.
#include <m2lm/m2lm.cuh>

template struct m2lm::cuda::KernelsOf<float>;
template struct m2lm::cuda::KernelsOf<m2lm::Bf16>;
