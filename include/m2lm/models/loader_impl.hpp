// Definitions of models/loader.hpp.
// Floor: models. May include: core, ops, layers, parts, io, sampling.
#pragma once

#include <m2lm/io/safetensors.hpp>
#include <m2lm/models/loader.hpp>

#include <algorithm>
#include <cstring>
#include <map>
#include <set>
#include <utility>

namespace m2lm::inline M2LM_ABI {

M2LM_IMPL std::string LoadReport::string() const {
  std::string out;
  for (const auto* list : {&missing, &misshaped, &unexpected})
    for (const std::string& line : *list) out += "\n  " + line;
  return out;
}

M2LM_IMPL void require_complete(const LoadReport& report, std::string_view directory) {
  if (report.complete()) return;
  throw CheckpointError(concat("m2lm: the checkpoint in ", directory, " does not fit the model (", report.missing.size(), " tensors missing, ",
                               report.misshaped.size(), " of another shape, ", report.unexpected.size(), " unexpected):", report.string()));
}

namespace detail {

/// Counts the elements whose exponent has all bits set, and gives the index of the first.
template <class Bits>
std::pair<std::int64_t, std::int64_t> count_non_finite(const AnyTensor& tensor, Bits exponent) {
  std::int64_t count = 0, first = -1;
  for (std::int64_t i = 0; i < tensor.shape().elements(); ++i) {
    Bits bits = 0;
    std::memcpy(&bits, tensor.data() + static_cast<std::size_t>(i) * sizeof(Bits), sizeof(Bits));
    if ((bits & exponent) != exponent) continue;
    if (count++ == 0) first = i;
  }
  return {count, first};
}

/// The same of values in blocks: those of a block whose scale is not finite.
template <class Block>
std::pair<std::int64_t, std::int64_t> count_non_finite(const AnyTensor& tensor) {
  std::int64_t count = 0, first = -1;
  for (std::int64_t i = 0; i < tensor.shape().elements() / block_values; ++i) {
    if ((load_block<Block>(tensor.data(), i).scale.bits & 0x7c00U) != 0x7c00U) continue;
    if (count == 0) first = i * block_values;
    count += block_values;
  }
  return {count, first};
}

M2LM_IMPL std::string non_finite_values(std::span<const NamedParameter> parameters, const Checkpoint& checkpoint) {
  // The report says the file's own name of a tensor, which a parameter does not know.
  std::map<const std::byte*, std::string> stored;
  for (const std::string& name : checkpoint.names()) {
    try {
      if (const AnyTensor* tensor = checkpoint.find(name)) stored.emplace(tensor->data(), name);
    } catch (const CheckpointError&) {
      // Of a dtype that is not known: then it is no parameter.
    }
  }
  std::string out;
  std::size_t damaged = 0;
  for (const NamedParameter& p : parameters) {
    const AnyTensor& tensor = p.parameter->value;
    if (!tensor.has_value() || M2LM_FAULT(57)) continue;
    std::pair<std::int64_t, std::int64_t> found{0, -1};
    switch (tensor.dtype()) {
      case DType::f64: found = count_non_finite<std::uint64_t>(tensor, 0x7ff0000000000000U); break;
      case DType::f32: found = count_non_finite<std::uint32_t>(tensor, 0x7f800000U); break;
      case DType::bf16: found = count_non_finite<std::uint16_t>(tensor, 0x7f80U); break;
      case DType::f16: found = count_non_finite<std::uint16_t>(tensor, 0x7c00U); break;
      case DType::q8: found = count_non_finite<Q8Block>(tensor); break;
      case DType::q4: found = count_non_finite<Q4Block>(tensor); break;
      default: break;
    }
    const auto [count, first] = found;
    if (count == 0) continue;
    constexpr std::size_t most = 20;
    if (++damaged > most) continue;
    std::string index;
    std::int64_t rest = first;
    for (int i = tensor.shape().rank() - 1; i >= 0; --i) {
      index = concat(rest % tensor.shape()[i], index.empty() ? "" : ", ", index);
      rest /= tensor.shape()[i];
    }
    const auto name = stored.find(tensor.data());
    const double value = tensor.at(first);
    out += concat("\n  tensor \"", name == stored.end() ? p.name : name->second, "\"", name == stored.end() ? "" : concat(" (", checkpoint.file_of(name->second), ")"),
                  ": element [", index, "] of ", tensor.shape().string(), " is ", value != value ? "NaN" : value > 0 ? "inf" : "-inf", "; ", count,
                  " such elements in all");
  }
  if (damaged > 20) out += concat("\n  and ", damaged - 20, " more tensors");
  return out;
}

M2LM_IMPL LoadReport bind_parameters(std::span<const NamedParameter> parameters, const Checkpoint& checkpoint, std::span<const NameRule> rules,
                                     std::vector<std::string>* stored_as) {
  const std::vector<std::string> stored_names = checkpoint.names();
  const std::set<std::string, std::less<>> stored(stored_names.begin(), stored_names.end());
  const auto rule_of = [&](std::string_view name) {
    return std::find_if(rules.begin(), rules.end(), [&](const NameRule& r) { return name.starts_with(r.canonical); });
  };

  // Each rule's prefix: the one under which most of its parameters are found; the first on a tie.
  std::vector<std::string_view> prefix(rules.size());
  for (std::size_t i = 0; i < rules.size(); ++i) {
    std::ptrdiff_t most = -1;
    for (const std::string_view candidate : rules[i].stored) {
      const std::ptrdiff_t found = std::count_if(parameters.begin(), parameters.end(), [&](const NamedParameter& p) {
        return rule_of(p.name) == rules.begin() + static_cast<std::ptrdiff_t>(i) &&
               stored.contains(std::string(candidate) + p.name.substr(rules[i].canonical.size()));
      });
      if (found > most) {
        most = found;
        prefix[i] = candidate;
      }
    }
  }

  LoadReport report;
  std::set<std::string, std::less<>> used;
  std::vector<std::string> not_found;
  for (const NamedParameter& p : parameters) {
    const auto rule = rule_of(p.name);
    const std::string name = rule == rules.end() ? p.name
                                                 : std::string(prefix[static_cast<std::size_t>(rule - rules.begin())]) + p.name.substr(rule->canonical.size());
    if (stored_as) stored_as->push_back(name);
    const AnyTensor* tensor = checkpoint.find(name);
    if (tensor == nullptr) {
      not_found.push_back(name);
      continue;
    }
    used.insert(name);
    if (tensor->shape() != p.parameter->shape || !is_floating(tensor->dtype())) {
      report.misshaped.push_back(concat(name, " is ", tensor->shape().string(), " in ", dtype_name(tensor->dtype()), " (", checkpoint.file_of(name),
                                        "), expected ", p.parameter->shape.string(), " in a floating dtype"));
      continue;
    }
    p.parameter->value = *tensor;
  }
  std::vector<std::string> unused;
  for (const std::string& name : stored_names)
    if (!used.contains(name)) unused.push_back(name);
  constexpr std::size_t most_nearest = 50;  // the search compares every pair; who has more is in the wrong directory
  for (const std::string& name : not_found) {
    const std::string nearest = report.missing.size() < most_nearest ? nearest_name(name, unused) : std::string();
    report.missing.push_back(name + " is missing" + (nearest.empty() ? "" : "; the nearest name is " + nearest));
  }
  for (const std::string& name : unused) {
    const bool ignorable = std::any_of(ignorable_names.begin(), ignorable_names.end(), [&](std::string_view pattern) { return glob_match(pattern, name); });
    // A tied head may be stored all the same.
    if (!ignorable && !name.ends_with("lm_head.weight")) report.unexpected.push_back(name + " is unexpected (" + std::string(checkpoint.file_of(name)) + ")");
  }
  return report;
}

}  // namespace detail
}  // namespace m2lm
