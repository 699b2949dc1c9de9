// Placeholders of prompts: any ids with any attachments give a sequence whose media lie where it says, or are refused.
#include "fuzz.hpp"

#include <m2lm/m2lm.hpp>

#include <optional>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  m2lm_fuzz::Parts parts(data, size);
  const bool expanded = (parts.byte() & 1) != 0;
  constexpr std::string_view names[] = {"image", "audio", "video"};
  std::vector<m2lm::detail::ComponentInstances> components(parts.byte() % 4);
  std::int32_t next_id = 100;
  for (std::size_t c = 0; c < components.size(); ++c) {
    m2lm::detail::ComponentTokens& tokens = components[c].tokens;
    tokens.name = names[c];
    const std::uint8_t id = parts.byte();
    tokens.placeholder = id < 250 ? id % 8 : -1 - static_cast<std::int32_t>(c);
    const std::uint8_t kind = parts.byte();
    tokens.insertion = static_cast<m2lm::InsertionKind>(kind % 4);
    if (kind & 4) tokens.before = 50;
    if (kind & 8) tokens.after = 51;
    components[c].rows.resize(parts.byte() % 8);
    components[c].token_ids.resize(components[c].rows.size());
    for (std::size_t i = 0; i < components[c].rows.size(); ++i) {
      components[c].rows[i] = parts.byte();
      if (tokens.insertion == m2lm::InsertionKind::discrete_tokens) components[c].token_ids[i].assign(static_cast<std::size_t>(components[c].rows[i]), next_id++);
    }
  }
  const std::optional<std::int32_t> bos = expanded ? std::optional<std::int32_t>(1) : std::nullopt;
  std::vector<std::int32_t> ids;
  while (!parts.empty()) {
    const std::uint8_t id = parts.byte();
    ids.insert(ids.end(), id / 8U % 16 + 1, id % 8);  // runs, so that ids which are expanded already come up
  }
  m2lm_fuzz::accepted([&] {
    const m2lm::detail::TokenSequence sequence = m2lm::detail::lay_out(ids, expanded, bos, components);
    std::int64_t end = 0;
    for (const m2lm::detail::MediaSpan& span : sequence.media) {
      m2lm_fuzz::check(span.component < components.size() && span.instance < components[span.component].rows.size(), "media are attached ones");
      m2lm_fuzz::check(span.rows == components[span.component].rows[span.instance], "media have their rows");
      m2lm_fuzz::check(span.begin >= end && span.begin + span.rows <= static_cast<std::int64_t>(sequence.ids.size()), "media lie in order");
      end = span.begin + span.rows;
      for (std::int64_t i = span.begin; i < end; ++i)
        m2lm_fuzz::check(sequence.ids[static_cast<std::size_t>(i)] == components[span.component].tokens.placeholder, "rows of media hold placeholders");
    }
  });
  return 0;
}
