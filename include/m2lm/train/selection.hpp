// Which parameters are trained, by name.
// Floor: train. May include: core, ops, layers, parts, io, sampling, models.
#pragma once

#include <m2lm/core/error.hpp>
#include <m2lm/models/names.hpp>

#include <algorithm>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace m2lm::inline M2LM_ABI::train {

/// Patterns of canonical names ('*' stands for any text): a parameter is trained when one of `train` fits and none of `freeze` does.
struct Selection {
  std::vector<std::string> train{"*"};  ///< what is trained …
  std::vector<std::string> freeze{};    ///< … but for this
  friend bool operator==(const Selection&, const Selection&) = default;

  /// Whether the parameter of this canonical name is trained.
  bool trains(std::string_view name) const {
    const auto fits = [&](const std::string& pattern) { return glob_match(pattern, name); };
    return std::any_of(train.begin(), train.end(), fits) && std::none_of(freeze.begin(), freeze.end(), fits);
  }
  /// throws OptionError: a pattern that fits no name (a slip of the pen would train or freeze the wrong half), or nothing to train.
  void check(std::span<const std::string> names) const {
    for (const auto* patterns : {&train, &freeze})
      for (const std::string& pattern : *patterns)
        require<OptionError>(std::any_of(names.begin(), names.end(), [&](const std::string& name) { return glob_match(pattern, name); }),
                             "m2lm::train::Selection: \"", pattern, "\" fits no parameter of the model; names look like ",
                             names.empty() ? std::string_view("(none)") : std::string_view(names.front()), " and ",
                             names.empty() ? std::string_view("(none)") : std::string_view(names.back()));
    require<OptionError>(std::any_of(names.begin(), names.end(), [&](const std::string& name) { return trains(name); }),
                         "m2lm::train::Selection: nothing is left to train");
  }
};

}  // namespace m2lm::train
