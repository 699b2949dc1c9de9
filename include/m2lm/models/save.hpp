// Writing a model as a Hugging Face directory, and the first values of one that is trained from nothing.
// Floor: models. May include: core, ops, layers, parts, io, sampling.
#pragma once

#include <m2lm/io/checkpoint.hpp>
#include <m2lm/io/config.hpp>
#include <m2lm/models/loader.hpp>

#include <cstdint>
#include <span>
#include <string>
#include <string_view>

namespace m2lm::inline M2LM_ABI {

/// What save_pretrained writes.
struct SaveOptions {
  DType dtype = DType::inherit;                  ///< f32, f16 or bf16 for every tensor; inherit: as each is held (trained ones in f32)
  std::size_t max_shard_bytes = 5'000'000'000;   ///< more than that becomes model-00001-of-….safetensors with an index
};

namespace detail {

/// What `save_pretrained` needs to know of a model.
struct SaveSource {
  std::string_view directory;  ///< tokenizer and preprocessor files are copied from here, where there are any
  const ConfigValue& config;
  const Checkpoint& checkpoint;
  std::span<const NamedParameter> parameters;
};
void save_model(std::string_view directory, const SaveSource& source, const SaveOptions& options);

/// The values that transformers gives to parameters of these names when a model is made from `config`: weights normal with
/// initializer_range (0.02), CLIP's by its own rule, norms 1, biases 0. The tensors have the names that transformers loads. The values
/// of a tensor depend on the seed and its name alone.
Checkpoint initial_checkpoint(const ConfigValue& config, std::span<const NamedParameter> parameters, std::uint64_t seed);

}  // namespace detail
}  // namespace m2lm
