// Forward declarations of the types that name each other across floors.
// Floor: config. May include: config.
#pragma once

#include <m2lm/config.hpp>

namespace m2lm::inline M2LM_ABI {

struct Image;      // io/image.hpp
class Cpu;         // backends/cpu/cpu.hpp
template <class T>
struct Reference;  // backends/reference/reference.hpp

}  // namespace m2lm
