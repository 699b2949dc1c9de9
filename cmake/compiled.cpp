#include <m2lm/impl.hpp>
