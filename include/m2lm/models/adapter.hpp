// PEFT adapters: low-rank updates of a checkpoint's matrices, merged into them or kept beside them.
// Floor: models. May include: core, ops, layers, parts, io, sampling.
#pragma once

#include <m2lm/models/loader.hpp>

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

namespace m2lm::inline M2LM_ABI {

/// What becomes of an adapter's updates W + scale·B·A.
enum class AdapterMode : std::uint8_t {
  merge,   ///< added to the weights, rounded to their dtype, before these are packed: no cost later
  beside,  ///< kept in f32 beside the packed weights: y += scale·(x·Aᵀ)·Bᵀ. The weights stay what they are, packed in whatever format
};

namespace detail {

/// Reads adapter_config.json and adapter_model.safetensors (or .bin) of `adapter_directory` and changes the parameters, which hold the
/// base model's values. Replaces what modules_to_save and biases say. Returns the bytes of memory that this takes.
/// throws CheckpointError naming file, key or tensor: another kind of adapter than LoRA, a module that the model has not, other shapes
/// than the base's, a rank that contradicts the config, targets without tensors (all that do not fit are named at once); without
/// `follow_links`, links that lead out of the directory.
std::size_t apply_adapter(std::span<const NamedParameter> parameters, std::string_view adapter_directory, AdapterMode mode,
                          std::span<const NameRule> rules, const CheckpointLimits& limits, bool follow_links = false);

}  // namespace detail
}  // namespace m2lm
