// One of two files that are compiled with different versions of the headers and linked into one program. SIDE is its own namespace.
#include <m2lm/core.hpp>

#include "sides.hpp"

namespace SIDE {

int version() { return 100 * M2LM_VERSION_MAJOR + M2LM_VERSION_MINOR; }

float normalised() {
  m2lm::Cpu cpu(m2lm::CpuOptions{.threads = 1});
  m2lm::Arena arena;
  m2lm::Context<m2lm::Cpu> ctx{cpu, arena};
  m2lm::Tensor<float> x(m2lm::Shape{2, 4}), weight(m2lm::Shape{4}), y(m2lm::Shape{2, 4});
  for (float& value : x.span()) value = 3.0F;
  for (float& value : weight.span()) value = 0.5F;
  m2lm::ops::rms_norm(ctx, m2lm::Matrix<const float>(x.view<2>()), m2lm::Vector<const float>(weight.view<1>()), 0.0, y.view<2>());
  return y.span()[7];
}

}  // namespace SIDE
