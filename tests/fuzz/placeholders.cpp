// Placeholders of prompts: any ids with any attachments give a sequence whose media lie where it says, or are refused.
#include "fuzz.hpp"

#include <m2lm/m2lm.hpp>

#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  m2lm_fuzz::Parts parts(data, size);
  const bool expanded = (parts.byte() & 1) != 0;
  constexpr std::string_view names[] = {"image", "audio", "video"};
  std::vector<m2lm::detail::PlaceholderUse> components(parts.byte() % 4);
  for (std::size_t c = 0; c < components.size(); ++c) {
    components[c].name = names[c];
    const std::uint8_t id = parts.byte();
    if (id < 250) components[c].id = id % 8;
    components[c].rows.resize(parts.byte() % 8);
    for (std::int64_t& rows : components[c].rows) rows = parts.byte();
  }
  std::vector<std::int32_t> ids;
  while (!parts.empty()) {
    const std::uint8_t id = parts.byte();
    ids.insert(ids.end(), id / 8U % 16 + 1, id % 8);  // runs, so that ids which are expanded already come up
  }
  m2lm_fuzz::accepted([&] {
    const m2lm::detail::TokenSequence sequence = m2lm::detail::expand_placeholders(ids, expanded, components);
    std::int64_t end = 0;
    for (const m2lm::detail::MediaSpan& span : sequence.media) {
      m2lm_fuzz::check(span.component < components.size() && span.instance < components[span.component].rows.size(), "media are attached ones");
      m2lm_fuzz::check(span.rows == components[span.component].rows[span.instance], "media have their rows");
      m2lm_fuzz::check(span.begin >= end && span.begin + span.rows <= static_cast<std::int64_t>(sequence.ids.size()), "media lie in order");
      end = span.begin + span.rows;
    }
  });
  return 0;
}
