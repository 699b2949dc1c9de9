// Runs both sides and compares them. Exit status 77: this machine has no AVX2.
#include <odr/report.hpp>

#include <algorithm>
#include <cmath>
#include <cstdio>

namespace {

int failures = 0;
void expect(bool ok, const char* what) {
  if (!ok) {
    std::printf("FAILED: %s\n", what);
    ++failures;
  }
}

// The sides may contract a·b + c differently, so sums of 131 terms may differ by a few roundings.
bool close(const std::vector<float>& a, const std::vector<float>& b) {
  return std::ranges::equal(a, b, [](float x, float y) { return std::abs(x - y) <= 1e-5F * std::max(1.0F, std::abs(x)); });
}

}  // namespace

int main() {
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) {
    std::puts("SKIPPED: this machine has no AVX2");
    return 77;
  }
  const Report a = baseline::report(), b = avx2::report(), c = baseline::report();
  expect(!a.compiled_with_avx2 && b.compiled_with_avx2, "the two sides are compiled for different instruction sets");
  expect(a.layout == b.layout, "public types have the same layout on both sides");
  expect(std::ranges::equal(a.linear, b.linear, close), "linear agrees at every level and format");
  expect(a.linear == c.linear, "what one side computes does not depend on the other having run");
  expect(!a.answer.empty() && a.answer == b.answer, "both sides give the same answer about a picture");
  std::printf("%zu products and the answer \"%s\" compared\n", a.linear.size(), a.answer.c_str());
  return failures == 0 ? 0 : 1;
}
