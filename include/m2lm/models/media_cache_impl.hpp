// Definitions of models/media_cache.hpp.
// Floor: models. May include: core, ops, layers, parts, io, sampling.
#pragma once

#include <m2lm/models/media_cache.hpp>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <random>
#include <utility>

namespace m2lm::inline M2LM_ABI {

namespace detail::content {

inline constexpr std::uint64_t odd_1 = 0x9e3779b97f4a7c15U, odd_2 = 0xc2b2ae3d27d4eb4fU;  // 2^64 / golden ratio, and a prime

/// Every bit of x changes about half of the bits.
inline std::uint64_t mix(std::uint64_t x) {
  x = (x ^ (x >> 31)) * odd_1;
  x = (x ^ (x >> 29)) * odd_2;
  return x ^ (x >> 32);
}

inline ContentKey process_key() {
  static const ContentKey key = [] {
    std::random_device device;
    const auto word = [&] { return std::uint64_t{device()} << 32 | device(); };
    return ContentKey{word(), word()};
  }();
  return key;
}

}  // namespace detail::content

M2LM_IMPL ContentHash::ContentHash() : state_(detail::content::process_key()) {}

M2LM_IMPL void ContentHash::bytes(std::span<const std::byte> data) {
  const auto add = [this](std::uint64_t word) {
    state_.high = detail::content::mix(state_.high ^ word);
    state_.low = (state_.low + word) * detail::content::odd_2;
    state_.low ^= state_.low >> 29;
  };
  length_ += data.size();
  std::size_t i = 0;
  for (; i + 8 <= data.size(); i += 8) {
    std::uint64_t word = 0;
    std::memcpy(&word, data.data() + i, 8);
    add(word);
  }
  std::uint64_t rest = data.size() - i;  // what is left, and how much it is
  for (; i < data.size(); ++i) rest = rest << 8 | std::to_integer<std::uint64_t>(data[i]);
  add(rest);
}

M2LM_IMPL ContentKey ContentHash::key() const {
  const std::uint64_t a = detail::content::mix(state_.high ^ length_), b = detail::content::mix(state_.low + length_);
  return {detail::content::mix(a + b), detail::content::mix(a ^ (b << 1 | b >> 63))};
}

namespace detail {

M2LM_IMPL ContentKey unique_key() {
  static std::atomic<std::uint64_t> count{0};
  ContentHash hash;
  hash.value(count.fetch_add(1));
  hash.value('u');
  return hash.key();
}

M2LM_IMPL std::shared_ptr<const void> MediaCache::find(const ContentKey& key) {
  const std::lock_guard lock(mutex_);
  const auto found = std::find_if(entries_.begin(), entries_.end(), [&](const Entry& e) { return e.key == key; });
  if (found == entries_.end()) {
    ++stats_.misses;
    return nullptr;
  }
  ++stats_.hits;
  found->used = ++clock_;
  return found->media;
}

M2LM_IMPL void MediaCache::insert(const ContentKey& key, std::shared_ptr<const void> media, std::size_t bytes) {
  const std::lock_guard lock(mutex_);
  if (bytes > capacity_ || std::any_of(entries_.begin(), entries_.end(), [&](const Entry& e) { return e.key == key; })) return;
  while (stats_.bytes + bytes > capacity_) {
    const auto oldest = std::min_element(entries_.begin(), entries_.end(), [](const Entry& a, const Entry& b) { return a.used < b.used; });
    stats_.bytes -= oldest->bytes;
    entries_.erase(oldest);
  }
  entries_.push_back({key, std::move(media), bytes, ++clock_});
  stats_.bytes += bytes;
}

M2LM_IMPL void MediaCache::clear() {
  const std::lock_guard lock(mutex_);
  entries_.clear();
  stats_.bytes = 0;
}

M2LM_IMPL MediaCacheStats MediaCache::stats() const {
  const std::lock_guard lock(mutex_);
  MediaCacheStats out = stats_;
  out.entries = entries_.size();
  return out;
}

}  // namespace detail
}  // namespace m2lm
