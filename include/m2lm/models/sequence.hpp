// TokenSequence: the ids that a decoder sees for a prompt, and where attached media stand in it.
// Floor: models. May include: core.
#pragma once

#include <m2lm/models/insertion.hpp>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

namespace m2lm::inline M2LM_ABI::detail {

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

/// What a component needs in every prompt: its placeholder's id, and the tokens around its instances.
struct ComponentTokens {
  std::string_view name;
  InsertionKind insertion = InsertionKind::expand_placeholder;
  std::int32_t placeholder = -1;            ///< negative, and not in the vocabulary, where "<name>" is no token of the checkpoint
  std::optional<std::int32_t> before, after;
  bool is_token = false;                    ///< the tokenizer knows "<name>"; else text is cut at it
  std::string_view text_before = {}, text_after = {};  ///< stand around "<name>" in text; token ids hold them already
};

/// The instances that a prompt attaches to a component.
struct ComponentInstances {
  ComponentTokens tokens{};
  std::vector<std::int64_t> rows;                     ///< per instance
  std::vector<std::vector<std::int32_t>> token_ids;   ///< per instance; discrete_tokens only
};

/// Puts the instances where their insertion says. `given_ids`: the ids may be expanded already. `bos`: the token that prefixes stand
/// behind. throws InputError: a placeholder without an attachment, or the reverse.
TokenSequence lay_out(std::span<const std::int32_t> ids, bool given_ids, std::optional<std::int32_t> bos, std::span<const ComponentInstances> components);

}  // namespace m2lm::detail
