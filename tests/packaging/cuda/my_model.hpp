// A user's model.
#pragma once

#include <m2lm/m2lm.hpp>

namespace my {
using Vlm = m2lm::Model<m2lm::Cuda, m2lm::Precision{}, m2lm::LlamaDecoder<>>;
}
