// Definitions of core/memory.hpp.
// Floor: core. May include: config, core.
#pragma once

#include <m2lm/core/memory.hpp>

#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>

namespace m2lm {

namespace detail {

class HostMemory final : public MemoryResource {
 public:
  void* allocate(std::size_t bytes) override {
    void* p = std::aligned_alloc(64, bytes == 0 ? 64 : (bytes + 63) / 64 * 64);
    if (p == nullptr) throw std::bad_alloc();
    return p;
  }
  void* allocate_zeroed(std::size_t bytes) override {
    constexpr std::size_t mapped = std::size_t{1} << 20;  // from here on calloc maps pages, which are zero and not resident yet
    if (bytes < mapped) {
      void* p = allocate(bytes);
      std::memset(p, 0, bytes);
      return p;
    }
    void* p = std::calloc(bytes, 1);
    if (p == nullptr) throw std::bad_alloc();
    return p;
  }
  void release(void* p) noexcept override { std::free(p); }
  void zero(void* p, std::size_t bytes) override { std::memset(p, 0, bytes); }
  std::size_t available() const override { return std::numeric_limits<std::size_t>::max(); }
};

}  // namespace detail

M2LM_IMPL MemoryResource& host_memory() {
  static detail::HostMemory memory;
  return memory;
}

}  // namespace m2lm
