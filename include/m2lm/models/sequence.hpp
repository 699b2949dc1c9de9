// TokenSequence: the ids that a decoder sees for a prompt, and where attached media stand in it.
// Floor: models. May include: core.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

namespace m2lm::detail {

/// The rows of one attached instance in a sequence.
struct MediaSpan {
  std::size_t component = 0, instance = 0;
  std::int64_t begin = 0, rows = 0;
};

/// Token ids with one placeholder id per row of media, and where the media stand.
struct TokenSequence {
  std::vector<std::int32_t> ids;
  std::vector<MediaSpan> media;

  /// Puts ids of text in front.
  void prepend(std::span<const std::int32_t> text) {
    ids.insert(ids.begin(), text.begin(), text.end());
    for (MediaSpan& span : media) span.begin += static_cast<std::int64_t>(text.size());
  }
};

struct PlaceholderUse {
  std::string_view name;                ///< component's name
  std::optional<std::int32_t> id;       ///< of "<name>"
  std::vector<std::int64_t> rows;       ///< per attached instance
};
/// Lets each placeholder stand for its instance. throws InputError: a placeholder without an attachment, or the reverse.
TokenSequence expand_placeholders(std::span<const std::int32_t> ids, bool expanded, std::span<const PlaceholderUse> components);

}  // namespace m2lm::detail
