// Definitions of models/sequence.hpp.
// Floor: models. May include: core.
#pragma once

#include <m2lm/core/error.hpp>
#include <m2lm/models/sequence.hpp>

#include <algorithm>

namespace m2lm::inline M2LM_ABI::detail {

M2LM_IMPL TokenSequence lay_out(std::span<const std::int32_t> ids, bool given_ids, std::optional<std::int32_t> bos,
                                std::span<const ComponentInstances> components) {
  TokenSequence out;
  std::vector<std::size_t> next(components.size(), 0);
  // Given ids are expanded already if a component's placeholders are as many as its rows.
  std::vector<bool> one_per_row(components.size(), false);
  for (std::size_t c = 0; c < components.size(); ++c) {
    const ComponentTokens& tokens = components[c].tokens;
    if (tokens.insertion == InsertionKind::prefix_after_bos) continue;
    std::int64_t rows = 0;
    for (const std::int64_t r : components[c].rows) rows += r;
    const std::int64_t found = std::count(ids.begin(), ids.end(), tokens.placeholder);
    const auto instances = static_cast<std::int64_t>(components[c].rows.size());
    if (given_ids && tokens.insertion == InsertionKind::placeholder_run) {
      require<InputError>(found == rows, "m2lm: the token ids hold ", found, " <", tokens.name, "> placeholders, but the ", instances, " attached (", tokens.name,
                          ") have ", rows, " rows; write one placeholder for each row");
      one_per_row[c] = true;
      continue;
    }
    one_per_row[c] = given_ids && tokens.insertion == InsertionKind::expand_placeholder && found != instances && found == rows;
    require<InputError>(found == instances || one_per_row[c], "m2lm: the prompt has ", found, " <", tokens.name, "> placeholders, but ", instances,
                        " attached (", tokens.name, ")", found > instances ? "; attach one for each placeholder" : "; write one placeholder for each");
  }
  const auto emit = [&](std::size_t c) {
    const ComponentInstances& component = components[c];
    const std::size_t instance = next[c]++;
    if (component.tokens.before) out.ids.push_back(*component.tokens.before);
    if (component.tokens.insertion == InsertionKind::discrete_tokens) {
      out.ids.insert(out.ids.end(), component.token_ids[instance].begin(), component.token_ids[instance].end());
    } else {
      const std::int64_t rows = component.rows[instance];
      out.media.push_back({c, instance, static_cast<std::int64_t>(out.ids.size()), rows});
      out.ids.insert(out.ids.end(), static_cast<std::size_t>(rows), component.tokens.placeholder);
    }
    if (component.tokens.after && !M2LM_FAULT(61)) out.ids.push_back(*component.tokens.after);
  };
  const std::size_t behind_bos = bos && !ids.empty() && ids.front() == *bos ? 1 : 0;
  for (std::size_t i = 0;;) {
    if (i == behind_bos)
      for (std::size_t c = 0; c < components.size(); ++c)
        if (components[c].tokens.insertion == InsertionKind::prefix_after_bos)
          while (next[c] < components[c].rows.size()) emit(c);
    if (i == ids.size()) return out;
    const auto use = std::find_if(components.begin(), components.end(), [&](const ComponentInstances& c) {
      return c.tokens.insertion != InsertionKind::prefix_after_bos && c.tokens.placeholder == ids[i];
    });
    if (use == components.end()) {
      out.ids.push_back(ids[i++]);
      continue;
    }
    const auto c = static_cast<std::size_t>(use - components.begin());
    require<InputError>(next[c] < use->rows.size(), "m2lm: the <", use->tokens.name,
                        "> placeholders of the token ids do not come in runs of the attached lengths");
    const std::int64_t rows = one_per_row[c] ? use->rows[next[c]] : 1;
    for (std::int64_t r = 0; r < rows; ++r, ++i)
      require<InputError>(i < ids.size() && ids[i] == use->tokens.placeholder, "m2lm: instance ", next[c], " of <", use->tokens.name, "> takes ", rows,
                          " placeholders in a row; the token ids have ", r);
    emit(c);
  }
}

}  // namespace m2lm::detail
