// Insertion: how the instances of a modality enter the token sequence.
// Floor: models. May include: core.
#pragma once

#include <m2lm/core/policy.hpp>

#include <concepts>
#include <cstdint>
#include <string_view>

namespace m2lm::inline M2LM_ABI {

/// What the four insertion policies below do, as a value.
enum class InsertionKind : std::uint8_t { expand_placeholder, placeholder_run, prefix_after_bos, discrete_tokens };

/// The placeholder "<name>" of the text becomes one row per output token of the instance. Token ids may hold one placeholder per
/// instance, or one per row. source: LLaVA.
struct ExpandPlaceholder {
  static constexpr auto kind = InsertionKind::expand_placeholder;
  static constexpr std::string_view before{}, after{};
};

/// The same for text; token ids hold a run of placeholders as long as the instance has rows, and runs may touch. source: multi_token.
struct PlaceholderRun {
  static constexpr auto kind = InsertionKind::placeholder_run;
  static constexpr std::string_view before{}, after{};
};

/// Text has no placeholder: instances stand behind the beginning-of-sequence token, component by component as the model's type lists
/// them, each with the tokens Before and After around it. source: M2LM.
template <FixedString Before = "", FixedString After = "">
struct PrefixAfterBos {
  static constexpr auto kind = InsertionKind::prefix_after_bos;
  static constexpr std::string_view before = Before.view(), after = After.view();
};

/// The encoder gives ids of the decoder's own vocabulary, which take the placeholder's place, with the tokens Before and After around
/// them. source: CM3Leon.
template <FixedString Before = "", FixedString After = "">
struct DiscreteTokens {
  static constexpr auto kind = InsertionKind::discrete_tokens;
  static constexpr std::string_view before = Before.view(), after = After.view();
};

namespace detail {

template <class I>
concept InsertionPolicy = requires {
  { I::kind } -> std::convertible_to<InsertionKind>;
  { I::before } -> std::convertible_to<std::string_view>;
  { I::after } -> std::convertible_to<std::string_view>;
};

}  // namespace detail
}  // namespace m2lm
