// The one place that includes stb: stb_image and stb_image_write, compiled with internal linkage beside a user's own copy.
// Floor: interop. May include: core.
#pragma once

#include <m2lm/config.hpp>
