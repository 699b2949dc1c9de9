// Attention on a device: checks, chooses a kernel (attention_plan.cuh) and launches it.
// Floor: backends. May include: core, ops.
#pragma once

#include <m2lm/backends/cuda/kernels.hpp>
#include <m2lm/backends/cuda/kernels/attention_decode.cuh>
#include <m2lm/backends/cuda/kernels/attention_plan.cuh>
#include <m2lm/backends/cuda/kernels/attention_prefill.cuh>
#include <m2lm/backends/cuda/kernels/attention_prefill_sm90.cuh>

#include <algorithm>

namespace m2lm::inline M2LM_ABI::cuda {

namespace detail {

inline bool in_pieces_of_16(const void* p, std::int64_t stride_bytes) {
  return reinterpret_cast<std::uintptr_t>(p) % 16 == 0 && stride_bytes % 16 == 0;
}

template <class E>
void launch_attention_rows(Device& device, const AttentionArguments<E>& a, const AttentionPlan& plan, const LaunchShape& shape) {
  switch (plan.rows) {
    case 1: return launch(device, "attention_rows<1>", attention_rows<E, 1>, shape, a, plan.key_tile);
    case 2: return launch(device, "attention_rows<2>", attention_rows<E, 2>, shape, a, plan.key_tile);
    case 4: return launch(device, "attention_rows<4>", attention_rows<E, 4>, shape, a, plan.key_tile);
    default: return launch(device, "attention_rows<8>", attention_rows<E, 8>, shape, a, plan.key_tile);
  }
}

template <class E>
void launch_attention_tiles(Device& device, const AttentionArguments<E>& a, const AttentionPlan& plan, const LaunchShape& shape) {
  switch (plan.tiles_head_dim) {
    case 64: return launch(device, "attention_tiles<64>", attention_tiles<E, 64>, shape, a);
    case 80: return launch(device, "attention_tiles<80>", attention_tiles<E, 80>, shape, a);
    case 96: return launch(device, "attention_tiles<96>", attention_tiles<E, 96>, shape, a);
    default: return launch(device, "attention_tiles<128>", attention_tiles<E, 128>, shape, a);
  }
}

/// Returns whether this program has the kernel for this device, and so has launched it.
template <class E, int HeadDim>
bool launch_attention_warpgroups(Device& device, const char* name, const AttentionArguments<E>& a, const KeyValues& kv) {
  constexpr AttentionWarpgroupsPolicy policy = attention_warpgroups_policy<HeadDim>;
  if (!has_body(device, attention_warpgroups<E, HeadDim>)) return false;
  const LaunchShape shape{static_cast<unsigned>(divided_up(a.rows, policy.rows())),
                          static_cast<unsigned>(kv.kv_heads),
                          1,
                          static_cast<unsigned>(policy.threads()),
                          1,
                          policy.shared_bytes()};
  const auto map = [&](const E* rows) { return make_tile_map(device, rows, HeadDim, kv.capacity, kv.kv_heads, policy.keys); };
  launch(device, name, attention_warpgroups<E, HeadDim>, shape, a, map(a.keys), map(a.values));
  return true;
}
template <class E>
bool launch_attention_warpgroups(Device& device, int head_dim, const AttentionArguments<E>& a, const KeyValues& kv) {
  return head_dim == 64    ? launch_attention_warpgroups<E, 64>(device, "attention_warpgroups<64>", a, kv)
         : head_dim == 128 ? launch_attention_warpgroups<E, 128>(device, "attention_warpgroups<128>", a, kv)
                           : false;
}

}  // namespace detail

template <class E>
std::size_t attention_scratch(const DeviceProperties& properties, std::int64_t tokens, std::int64_t heads, const KeyValues& kv,
                              std::int64_t most_keys) {
  const AttentionSizes sizes{.tokens = tokens,
                             .heads = heads,
                             .kv_heads = kv.kv_heads,
                             .head_dim = kv.head_dim,
                             .most_keys = most_keys,
                             .window = 0,
                             .element_bytes = sizeof(E),
                             .vectors = true};
  return tokens == 0 ? 0
                     : sizeof(float) *
                           static_cast<std::size_t>(attention_partial_floats(properties.multiprocessors, properties.shared_bytes_per_block, sizes));
}

template <class E>
void attention(Device& device, Matrix<const E> q, const KeyValues& kv, Position position, AttentionMask mask, float scale, Matrix<E> y, Sinks sinks,
               void* scratch, PrefillKernel prefill) {
  const std::int64_t tokens = q.extent(0), heads = q.extent(1) / kv.head_dim;
  require<OptionError>(kv.format == dtype_of<E>, "m2lm::cuda::attention: keys and values are ", dtype_name(kv.format), ", activations are ",
                       dtype_name(dtype_of<E>), "; this backend wants them alike");
  require<OptionError>(kv.head_dim <= attention_rows_policy.most_head_dim, "m2lm::cuda::attention: heads of ", kv.head_dim,
                       "; the largest that there are kernels for is ", attention_rows_policy.most_head_dim);
  require(q.shape() == y.shape() && heads % kv.kv_heads == 0 && heads * kv.head_dim == q.extent(1), "m2lm::cuda::attention: q is ", q.shape(),
          ", y is ", y.shape(), ", keys have ", kv.kv_heads, " heads of ", kv.head_dim);
  // Kernels count rows, keys and the elements of a head in 32 bits.
  require<CapacityError>(position.most_keys <= kv.capacity && tokens * heads <= all_keys && kv.capacity * kv.head_dim <= all_keys,
                         "m2lm::cuda::attention: ", tokens, " queries of ", heads, " heads over ", position.most_keys, " keys of ", kv.capacity);
  if (tokens == 0 || heads == 0) return;

  const auto bytes = [](std::int64_t elements) { return elements * static_cast<std::int64_t>(sizeof(E)); };
  const DeviceProperties& properties = device.properties();
  const bool vectors = bytes(kv.head_dim) % 16 == 0 && detail::in_pieces_of_16(kv.keys, 0) && detail::in_pieces_of_16(kv.values, 0);
  const bool rows_too = detail::in_pieces_of_16(q.data(), bytes(q.stride(0))) && detail::in_pieces_of_16(y.data(), bytes(y.stride(0)));
  AttentionSizes sizes{.tokens = tokens,
                       .heads = heads,
                       .kv_heads = kv.kv_heads,
                       .head_dim = kv.head_dim,
                       .most_keys = position.most_keys,
                       .window = mask.window,
                       .element_bytes = sizeof(E),
                       .vectors = vectors && rows_too && scale > 0};
  const AttentionPlan plan = plan_attention(properties.multiprocessors, properties.shared_bytes_per_block, sizes);
  require<CapacityError>(plan.shared_bytes <= properties.shared_bytes_per_block, "m2lm::cuda::attention: heads of ", kv.head_dim, " want ",
                         plan.shared_bytes, " bytes of shared memory, a block of ", properties.name, " has ", properties.shared_bytes_per_block);
  require(plan.splits == 1 || scratch != nullptr, "m2lm::cuda::attention: there is no scratch memory for ", plan.splits, " splits");

  AttentionArguments<E> a;
  a.q = q.data();
  a.keys = reinterpret_cast<const E*>(kv.keys);
  a.values = reinterpret_cast<const E*>(kv.values);
  a.y = y.data();
  a.partial = plan.splits > 1 ? static_cast<float*>(scratch) : nullptr;
  a.length = position.length;
  a.q_stride = q.stride(0);
  a.y_stride = y.stride(0);
  a.head_stride = kv.capacity * kv.head_dim;
  a.first = static_cast<int>(position.first);
  a.most_keys = static_cast<int>(position.most_keys);
  a.rows = static_cast<int>(sizes.rows());
  a.group = static_cast<int>(sizes.group());
  a.kv_heads = static_cast<int>(kv.kv_heads);
  a.head_dim = static_cast<int>(kv.head_dim);
  a.behind = mask.window > 0 ? static_cast<int>(std::min<std::int64_t>(mask.window - 1, all_keys)) : all_keys;
  a.ahead = mask.causal || mask.window > 0 ? 0 : all_keys;
  a.splits = static_cast<int>(plan.splits);
  a.keys_per_split = static_cast<int>(plan.keys_per_split);
  a.vectors = vectors ? 1 : 0;
  a.zero_logit = sinks.zero_logit ? 1 : 0;
  a.scale_log2 = scale * 1.44269504088896341F;

  if constexpr (sizeof(E) == 2) {
    const int head_dim =
        prefill == PrefillKernel::warpgroups ? warpgroups_head_dim(properties.compute_capability, properties.shared_bytes_per_block, sizes, plan) : 0;
    if (detail::launch_attention_warpgroups(device, head_dim, a, kv)) return;
  }
  const auto block = static_cast<unsigned>(plan.tiles_head_dim != 0 ? AttentionTilesPolicy{}.threads() : attention_rows_policy.threads);
  const LaunchShape shape{
      static_cast<unsigned>(plan.row_tiles), static_cast<unsigned>(kv.kv_heads), static_cast<unsigned>(plan.splits), block, 1, plan.shared_bytes};
  if (plan.tiles_head_dim == 0) {
    detail::launch_attention_rows(device, a, plan, shape);
  } else if constexpr (sizeof(E) == 2) {
    detail::launch_attention_tiles(device, a, plan, shape);
  }
  if (plan.splits > 1) {
    const auto columns = static_cast<unsigned>(detail::divided_up(std::min<std::int64_t>(kv.head_dim, 128), 32) * 32);
    launch(device, "attention_combine", attention_combine<E>,
           LaunchShape{static_cast<unsigned>(a.rows), static_cast<unsigned>(kv.kv_heads), 1, columns, 1, 0}, a);
  }
}

}  // namespace m2lm::cuda
