// Tensors, ops, layers and the backends, without models and files: needs Eigen-free headers only.
// Floor: m2lm. May include: core, ops, backends, layers.
#pragma once

#include <m2lm/backends/cpu/cpu.hpp>
#include <m2lm/backends/cpu/training.hpp>
#include <m2lm/backends/reference/reference.hpp>
#include <m2lm/config.hpp>
#include <m2lm/core/arena.hpp>
#include <m2lm/core/blocks.hpp>
#include <m2lm/core/config_of.hpp>
#include <m2lm/core/dtype.hpp>
#include <m2lm/core/dual.hpp>
#include <m2lm/core/error.hpp>
#include <m2lm/core/fields.hpp>
#include <m2lm/core/function_ref.hpp>
#include <m2lm/core/gradients.hpp>
#include <m2lm/core/memory.hpp>
#include <m2lm/core/packed.hpp>
#include <m2lm/core/policy.hpp>
#include <m2lm/core/rng.hpp>
#include <m2lm/core/tensor.hpp>
#include <m2lm/core/threads.hpp>
#include <m2lm/core/view.hpp>
#include <m2lm/layers/attention.hpp>
#include <m2lm/layers/cross_features.hpp>
#include <m2lm/layers/embedding.hpp>
#include <m2lm/layers/ffn.hpp>
#include <m2lm/layers/kv_cache.hpp>
#include <m2lm/layers/linear.hpp>
#include <m2lm/layers/multihead_attention.hpp>
#include <m2lm/layers/norm.hpp>
#include <m2lm/layers/rope.hpp>

#if !defined(M2LM_SEPARATE_IMPL)
#include <m2lm/core_impl.hpp>
#endif
