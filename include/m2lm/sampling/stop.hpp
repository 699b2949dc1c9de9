// Utf8Gate and StopMatcher: what of a growing text may be shown, and where it ends.
// Floor: sampling. May include: config, core, ops.
#pragma once

#include <m2lm/core/error.hpp>

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace m2lm::inline M2LM_ABI {

/// Makes whole, valid UTF-8 of bytes that come in pieces of any size. A character that is not complete waits for its rest. Each
/// maximal invalid part becomes one U+FFFD, as Python's bytes.decode(errors="replace") and the WHATWG decoder do, so the result does
/// not depend on where the bytes were cut.
class Utf8Gate {
  std::string text_;     // what the last call returned
  std::string pending_;  // bytes whose character is not complete

 public:
  Utf8Gate();
  /// The text that is complete now; valid until the next call.
  std::string_view push(std::string_view bytes);
  /// U+FFFD if a character was left incomplete, else nothing. The gate is then as new.
  std::string_view finish();
};

/// Stop tokens and stop strings over streamed text. Text that may turn out to be the beginning of a stop string is held back, so what
/// was returned never has to be taken back. The text ends before the stop string that is complete first (of those complete at the same
/// place, the longest), wherever the pieces were cut.
class StopMatcher {
  std::vector<std::int32_t> token_ids_;
  std::vector<std::string> strings_;
  std::size_t longest_ = 0;
  std::string buffer_;  // [returned by the last call | held back]
  std::size_t returned_ = 0;
  bool stopped_ = false;

 public:
  StopMatcher() : StopMatcher({}, {}) {}
  /// throws OptionError if a string is empty or not valid UTF-8 (a character must not be cut).
  StopMatcher(std::span<const std::int32_t> token_ids, std::span<const std::string> strings);

  /// Whether this token ends the answer.
  bool is_stop_token(std::int32_t id) const;

  /// Text that is certain, and whether a stop string has ended the answer.
  struct Output {
    /// Valid until the next call.
    std::string_view text;
    bool stopped = false;
  };
  /// Takes a piece of whole UTF-8 (from Utf8Gate or a tokenizer's stream). After a stop there is no more text.
  Output push(std::string_view piece);
  /// The text held back, when the answer ends without a stop string. Valid until the next call.
  std::string_view finish();
  /// Forgets the text, not the tokens and strings: ready for the next answer.
  void reset();
};

}  // namespace m2lm
