// What each of the two translation units of the ODR test says about itself.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

struct Report {
  bool compiled_with_avx2 = false;
  std::vector<std::size_t> layout;         // size and alignment of the public types
  std::vector<std::vector<float>> linear;  // the same products at each instruction-set level and format
  std::string answer;                      // what the bundled model says about a bundled picture
};

namespace baseline {
Report report();
}
namespace avx2 {
Report report();
}
