// Definitions of models/sequence.hpp.
// Floor: models. May include: core.
#pragma once

#include <m2lm/core/error.hpp>
#include <m2lm/models/sequence.hpp>

#include <algorithm>

namespace m2lm::detail {

M2LM_IMPL TokenSequence expand_placeholders(std::span<const std::int32_t> ids, bool expanded, std::span<const PlaceholderUse> components) {
  TokenSequence out;
  std::vector<std::size_t> next(components.size(), 0);
  // Given ids are expanded already if a component's placeholders are as many as its rows.
  std::vector<bool> one_per_row(components.size(), false);
  for (std::size_t c = 0; c < components.size(); ++c) {
    std::int64_t rows = 0;
    for (const std::int64_t r : components[c].rows) rows += r;
    require<InputError>(components[c].id.has_value() || components[c].rows.empty(), "m2lm: the checkpoint has no token for <", components[c].name,
                        ">: neither config.json (", components[c].name, "_token_index) nor the tokenizer names one");
    const std::int64_t found = components[c].id ? std::count(ids.begin(), ids.end(), *components[c].id) : 0;
    const auto instances = static_cast<std::int64_t>(components[c].rows.size());
    one_per_row[c] = expanded && found != instances && found == rows;
    require<InputError>(found == instances || one_per_row[c], "m2lm: the prompt has ", found, " <", components[c].name, "> placeholders, but ", instances,
                        " attached (", components[c].name, ")", found > instances ? "; attach one for each placeholder" : "; write one placeholder for each");
  }
  for (std::size_t i = 0; i < ids.size();) {
    const auto use = std::find_if(components.begin(), components.end(), [&](const PlaceholderUse& c) { return c.id == ids[i]; });
    if (use == components.end()) {
      out.ids.push_back(ids[i++]);
      continue;
    }
    const auto c = static_cast<std::size_t>(use - components.begin());
    const std::size_t instance = next[c]++;
    require<InputError>(instance < use->rows.size(), "m2lm: the <", use->name, "> placeholders of the token ids do not come in runs of the attached lengths");
    const std::int64_t rows = use->rows[instance];
    out.media.push_back({c, instance, static_cast<std::int64_t>(out.ids.size()), rows});
    if (one_per_row[c]) {
      for (std::int64_t r = 0; r < rows; ++r, ++i)
        require<InputError>(i < ids.size() && ids[i] == *use->id, "m2lm: instance ", instance, " of <", use->name, "> takes ", rows,
                            " placeholders in a row; the token ids have ", r);
    } else {
      ++i;
    }
    out.ids.insert(out.ids.end(), static_cast<std::size_t>(rows), *use->id);
  }
  return out;
}

}  // namespace m2lm::detail
