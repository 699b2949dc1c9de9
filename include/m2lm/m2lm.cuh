// The whole library with the CUDA backend, for files that nvcc compiles. (A test without nvcc includes an emulation before it.)
// Floor: m2lm. May include: everything.
#pragma once

#include <m2lm/m2lm.hpp>

#if defined(__CUDACC__)
#include <m2lm/backends/cuda/runtime.cuh>
#endif

#include <m2lm/backends/cuda/instantiate.cuh>
#include <m2lm/backends/cuda/kernels/activation.cuh>
#include <m2lm/backends/cuda/kernels/attention.cuh>
#include <m2lm/backends/cuda/kernels/backward.cuh>
#include <m2lm/backends/cuda/kernels/linear.cuh>
#include <m2lm/backends/cuda/kernels/rows.cuh>
#include <m2lm/backends/cuda/kernels/sampling.cuh>
