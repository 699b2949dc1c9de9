// The one place that includes nlohmann/json.
// Floor: interop. May include: core.
#pragma once

#include <m2lm/config.hpp>

#include <nlohmann/json.hpp>
