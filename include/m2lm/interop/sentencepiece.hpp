// The one place that includes sentencepiece.
// Floor: interop. May include: core.
#pragma once

#include <m2lm/config.hpp>

#include <sentencepiece_processor.h>
