// Definitions of core/memory.hpp.
// Floor: core. May include: config, core.
#pragma once

#include <m2lm/core/memory.hpp>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace m2lm::detail {

M2LM_IMPL void advise_huge_pages([[maybe_unused]] std::byte* begin, [[maybe_unused]] std::size_t bytes) {
#if defined(__linux__)
  // Whole pages only: the rest of the last one would count as used memory. A system without them answers with an error: as good as before.
  if (const std::size_t whole = bytes / huge_page * huge_page; whole > 0) (void)::madvise(begin, whole, MADV_HUGEPAGE);
#endif
}

}  // namespace m2lm::detail
