// The non-template definitions behind core.hpp.
// Floor: m2lm. May include: core, ops, backends.
#pragma once

#include <m2lm/backends/cpu/cpu_impl.hpp>
#include <m2lm/backends/cpu/kernels_impl.hpp>
#include <m2lm/backends/cpu/training_impl.hpp>
#include <m2lm/core/threads_impl.hpp>
