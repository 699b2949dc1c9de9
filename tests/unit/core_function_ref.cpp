// FunctionRef: lambdas, functors and plain functions; nothing is owned.
#include <doctest/doctest.h>

#include <m2lm/core/function_ref.hpp>

namespace {

int twice(int x) { return 2 * x; }
int call(m2lm::FunctionRef<int(int)> f, int x) { return f(x); }

}  // namespace

TEST_CASE("a callable of any kind") {
  int factor = 3;
  CHECK(call([&](int x) { return factor * x; }, 5) == 15);
  CHECK(call(twice, 5) == 10);
  int (*pointer)(int) = &twice;
  CHECK(call(pointer, 6) == 12);
  const auto named = [](int x) { return x + 1; };
  const m2lm::FunctionRef<int(int)> reference = named;
  CHECK(reference(1) == 2);
  CHECK(bool(reference));
  CHECK(!m2lm::FunctionRef<int(int)>());
}
