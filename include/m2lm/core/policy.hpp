// Compile-time policies: Precision, FixedString, and helpers of static assertions.
// Floor: core. May include: config, core.
#pragma once

#include <m2lm/core/dtype.hpp>

#include <cstddef>
#include <string_view>

namespace m2lm::inline M2LM_ABI {

/// What to pack by default, separately for each kind of tensor. `inherit` follows `weights`; with one exception: weights as integers
/// (q8, q4, q4_128, w8a8) are the decoder's and its head's alone, where encoders, projectors and the KV cache inherit bf16.
struct Precision {
  DType weights = DType::bf16;        ///< matrices of the decoder's layers, and what inherits
  DType encoders = DType::inherit;    ///< matrices of all modalities' encoders
  DType projectors = DType::inherit;  ///< matrices of all modalities' projectors
  DType lm_head = DType::inherit;     ///< the decoder's head; a head tied to the embeddings is packed in it beside their table
  DType kv_cache = DType::inherit;    ///< keys and values that a session keeps
  friend constexpr bool operator==(const Precision&, const Precision&) = default;

  /// `part` itself, or `weights` where it inherits.
  constexpr DType resolve(DType part) const { return part == DType::inherit ? weights : part; }
  /// The same for a part that does not inherit integers.
  constexpr DType resolve_plain(DType part, DType plain = DType::bf16) const { return part == DType::inherit ? plain_format(weights, plain) : part; }
};

/// A string literal as a template argument: Modality<"image", …>.
template <std::size_t N>
struct FixedString {
  char text[N]{};
  /// N counts the literal's final zero.
  constexpr FixedString(const char (&s)[N]) {  // NOLINT: implicit on purpose
    for (std::size_t i = 0; i < N; ++i) text[i] = s[i];
  }
  /// The text without the final zero.
  constexpr std::string_view view() const { return {text, N - 1}; }
  template <std::size_t M>
  constexpr bool operator==(const FixedString<M>& other) const {
    return view() == other.view();
  }
};

/// False, but only when instantiated: the body of a primary template that must not be used.
template <class...>
inline constexpr bool dependent_false = false;

}  // namespace m2lm
