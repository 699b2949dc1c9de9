// The headers of xtensor that tests and examples use beside those of m2lm/interop/xtensor.hpp, in the layout of 0.24 or of 0.26.
#pragma once

#if __has_include(<xtensor/generators/xbuilder.hpp>)
#include <xtensor/core/xmath.hpp>
#include <xtensor/generators/xbuilder.hpp>
#include <xtensor/misc/xmanipulation.hpp>
#include <xtensor/views/xview.hpp>
#else
#include <xtensor/xbuilder.hpp>
#include <xtensor/xmanipulation.hpp>
#include <xtensor/xmath.hpp>
#include <xtensor/xview.hpp>
#endif
