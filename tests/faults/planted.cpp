// The fault of this run: the number in $M2LM_PLANT_FAULT, or none.
#include <cstdlib>

const int m2lm_planted_fault = [] {
  const char* number = std::getenv("M2LM_PLANT_FAULT");
  return number ? std::atoi(number) : 0;
}();
