// Binding the parameters of a model to the tensors of a checkpoint, with one report of all that does not fit.
// Floor: models. May include: core, ops, layers, parts, io, sampling.
#pragma once

#include <m2lm/core/fields.hpp>
#include <m2lm/io/checkpoint.hpp>
#include <m2lm/models/names.hpp>

#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace m2lm::inline M2LM_ABI {

/// What a checkpoint and a model disagree on. Each entry is a sentence with names, shapes and the nearest name there is.
struct LoadReport {
  std::vector<std::string> missing;     ///< parameters that the checkpoint has no tensor for
  std::vector<std::string> misshaped;   ///< tensors of another shape than config.json asks for
  std::vector<std::string> unexpected;  ///< tensors that the model does not know
  std::string packed_cache = {};        ///< why a file of packed weights that is there was not used; empty when there is nothing to say
  std::size_t mapped_matrices = 0;      ///< packed matrices that came from such a file

  /// Whether the model can be used: nothing is missing or of a wrong shape.
  bool complete() const { return missing.empty() && misshaped.empty(); }
  /// All entries, one per line.
  std::string string() const;
};

namespace detail {

struct NamedParameter {
  std::string name;
  Parameter* parameter;
};
/// A visitor of for_each_parameter. (A named one: the walk over a model is then instantiated once.)
struct CollectParameters {
  std::vector<NamedParameter>& out;
  void operator()(std::string_view name, Parameter& p) const { out.push_back({std::string(name), &p}); }
};
/// Names the first NaN or infinity in each of the parameters' values, with file, index and count, one per line and at most 20; empty
/// when all are finite.
std::string non_finite_values(std::span<const NamedParameter> parameters, const Checkpoint& checkpoint);

/// `stored`, if given, gets the name in the checkpoint of each parameter.
LoadReport bind_parameters(std::span<const NamedParameter> parameters, const Checkpoint& checkpoint, std::span<const NameRule> rules,
                           std::vector<std::string>* stored = nullptr);

}  // namespace detail

/// Gives every parameter below `root` its tensor. `prefix` starts the canonical names. The values share the checkpoint's mapping.
/// ensures every parameter has a value, in a floating dtype and of its shape, if report.complete().
template <ParameterStruct P>
LoadReport load_parameters(P& root, const Checkpoint& checkpoint, std::string prefix = {}, std::span<const NameRule> rules = hugging_face_names) {
  std::vector<detail::NamedParameter> parameters;
  for_each_parameter([&](std::string_view name, Parameter& p) { parameters.push_back({std::string(name), &p}); }, root, std::move(prefix));
  return detail::bind_parameters(parameters, checkpoint, rules);
}

/// throws CheckpointError with the whole report unless it is complete.
void require_complete(const LoadReport& report, std::string_view directory);

}  // namespace m2lm
