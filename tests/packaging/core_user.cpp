// A program that uses m2lm::core alone.
#include <m2lm/core.hpp>

static_assert(__cplusplus >= 202002L);

int main() {
  m2lm::ThreadPool pool(1);
  return pool.size() == 1 ? 0 : 1;
}
