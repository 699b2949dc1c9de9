// What the text floors share about UTF-8.
// Floor: core. May include: config.
#pragma once

#include <m2lm/config.hpp>

#include <string_view>

namespace m2lm::detail {

/// U+FFFD, which stands for bytes that are no character.
inline constexpr std::string_view replacement_character = "\xEF\xBF\xBD";

}  // namespace m2lm::detail
