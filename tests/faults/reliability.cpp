// Probe: what docs/reliability.md promises. The unit tests themselves, header-only here.
#include <m2lm/m2lm.hpp>

#include "../unit/io_save_faults.cpp"
