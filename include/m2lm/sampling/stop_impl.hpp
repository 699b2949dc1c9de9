// Definitions of sampling/stop.hpp.
// Floor: sampling. May include: config, core, ops.
#pragma once

#include <m2lm/core/utf8.hpp>
#include <m2lm/sampling/stop.hpp>

#include <algorithm>
#include <cstddef>

namespace m2lm::inline M2LM_ABI {

namespace detail {

/// Pieces of usual size then never make a buffer grow.
inline constexpr std::size_t stream_reserve = 512;

}  // namespace detail

M2LM_IMPL Utf8Gate::Utf8Gate() {
  text_.reserve(detail::stream_reserve);
  pending_.reserve(detail::stream_reserve);
}

M2LM_IMPL std::string_view Utf8Gate::push(std::string_view bytes) {
  text_.clear();
  pending_ += bytes;
  pending_.erase(0, detail::append_well_formed(text_, pending_, false));
  return text_;
}

M2LM_IMPL std::string_view Utf8Gate::finish() {
  text_.clear();
  (void)detail::append_well_formed(text_, pending_, true);
  pending_.clear();
  return text_;
}

M2LM_IMPL StopMatcher::StopMatcher(std::span<const std::int32_t> token_ids, std::span<const std::string> strings)
    : token_ids_(token_ids.begin(), token_ids.end()), strings_(strings.begin(), strings.end()) {
  for (const std::string& s : strings_) {
    require<OptionError>(!s.empty(), "m2lm: a stop string is empty: leave it out");
    Utf8Gate gate;
    require<OptionError>(gate.push(s) == s && gate.finish().empty(), "m2lm: the stop string \"", s, "\" is not valid UTF-8");
    longest_ = std::max(longest_, s.size());
  }
  buffer_.reserve(detail::stream_reserve + longest_);
}

M2LM_IMPL bool StopMatcher::is_stop_token(std::int32_t id) const { return std::find(token_ids_.begin(), token_ids_.end(), id) != token_ids_.end(); }

M2LM_IMPL StopMatcher::Output StopMatcher::push(std::string_view piece) {
  if (stopped_) return {{}, true};
  buffer_.erase(0, returned_);
  returned_ = 0;
  buffer_ += piece;
  const std::string_view text = buffer_;

  // What was held back is no whole stop string, so the first occurrence of each string is the one that is complete first.
  std::size_t stop_begin = 0, stop_end = std::string::npos;
  for (const std::string& s : strings_) {
    const std::size_t begin = text.find(s);
    if (begin == std::string::npos) continue;
    const std::size_t end = begin + s.size();
    if (end < stop_end || (end == stop_end && begin < stop_begin)) {
      stop_begin = begin;
      stop_end = end;
    }
  }
  if (stop_end != std::string::npos) {
    stopped_ = true;
    returned_ = buffer_.size();
    return {text.substr(0, stop_begin), true};
  }

  std::size_t held = longest_ == 0 ? 0 : std::min(longest_ - 1, text.size());
  const auto begins_a_stop_string = [&](std::string_view suffix) {
    return std::any_of(strings_.begin(), strings_.end(), [&](std::string_view s) { return s.starts_with(suffix); });
  };
  while (held > 0 && !begins_a_stop_string(text.substr(text.size() - held))) --held;
  if (M2LM_FAULT(14)) held = 0;
  returned_ = text.size() - held;
  return {text.substr(0, returned_), false};
}

M2LM_IMPL std::string_view StopMatcher::finish() {
  if (stopped_) return {};
  buffer_.erase(0, returned_);
  returned_ = buffer_.size();
  return buffer_;
}

M2LM_IMPL void StopMatcher::reset() {
  buffer_.clear();
  returned_ = 0;
  stopped_ = false;
}

}  // namespace m2lm
