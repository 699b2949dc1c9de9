// expect: m2lm: this backend has no implementation of this op \(is <m2lm/backends/\.\.\.> included\?\)
#include <m2lm/ops/op.hpp>

struct Op;
struct OwnBackend {};

template <>
struct m2lm::ops::Impl<Op, OwnBackend> {
  static void run(OwnBackend&) {}
};

struct OtherBackend {};

int main() {
#if defined(M2LM_MUST_FAIL)
  OtherBackend backend;
#else
  OwnBackend backend;
#endif
  m2lm::ops::Impl<Op, decltype(backend)>::run(backend);
}
