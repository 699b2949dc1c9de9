// UTF-8: the one place that says what is well formed.
// Floor: core. May include: config.
#pragma once

#include <m2lm/config.hpp>

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace m2lm::inline M2LM_ABI::detail {

/// U+FFFD, which stands for bytes that are no character.
inline constexpr std::string_view replacement_character = "\xEF\xBF\xBD";

struct CodePoint {
  std::uint32_t value = 0;
  std::size_t length = 0;  ///< bytes it takes; of a malformed one, those that one U+FFFD stands for
  bool valid = false;
  bool cut = false;  ///< the text ends where the character might have gone on
};

/// The code point at the beginning of `s`, which is not empty. A malformed one takes its longest well-formed beginning, at least a byte:
/// so do Python's bytes.decode(errors="replace") and the WHATWG decoder. No overlong forms, no surrogates, nothing beyond U+10FFFF.
inline CodePoint code_point(std::string_view s) {
  const auto byte = [&](std::size_t k) { return static_cast<std::uint32_t>(static_cast<unsigned char>(s[k])); };
  const std::uint32_t lead = byte(0);
  if (lead < 0x80) return {lead, 1, true, false};
  const std::size_t length = lead < 0xc2 ? 0 : lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : lead < 0xf5 ? 4 : 0;
  if (length == 0) return {0, 1, false, false};
  std::uint32_t value = lead & (0xffU >> (length + 1));
  for (std::size_t k = 1; k < length; ++k) {
    if (k == s.size()) return {0, k, false, true};
    const std::uint32_t low = k == 1 && lead == 0xe0 ? 0xa0 : k == 1 && lead == 0xf0 ? 0x90 : 0x80;
    const std::uint32_t high = k == 1 && lead == 0xed ? 0x9f : k == 1 && lead == 0xf4 ? 0x8f : 0xbf;
    if (byte(k) < low || byte(k) > high) return {0, k, false, false};
    value = value << 6U | (byte(k) & 0x3fU);
  }
  return {value, length, true, false};
}

/// Appends `bytes` to `out`, U+FFFD for what is malformed. Unless `last`, an unfinished character at the end is left out.
/// ensures: returns how many bytes were dealt with.
inline std::size_t append_well_formed(std::string& out, std::string_view bytes, bool last) {
  std::size_t at = 0;
  while (at < bytes.size()) {
    const CodePoint c = code_point(bytes.substr(at));
    if (c.cut && !last) break;
    out += c.valid ? bytes.substr(at, c.length) : replacement_character;
    at += c.length;
  }
  return at;
}

inline bool is_utf8(std::string_view s) {
  for (std::size_t at = 0; at < s.size();) {
    const CodePoint c = code_point(s.substr(at));
    if (!c.valid) return false;
    at += c.length;
  }
  return true;
}

}  // namespace m2lm::detail
