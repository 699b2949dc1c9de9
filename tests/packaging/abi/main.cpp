// Two versions of m2lm in one program, each with its own types and functions.
#include <cstdio>

#include "sides.hpp"

int main() {
  std::printf("%d: %g, %d: %g\n", older::version(), static_cast<double>(older::normalised()), newer::version(), static_cast<double>(newer::normalised()));
  return older::version() != newer::version() && older::normalised() == 0.5F && newer::normalised() == 0.5F ? 0 : 1;
}
