// What main.cpp calls of the two sides: no type of m2lm crosses.
#pragma once

namespace older {
int version();
float normalised();
}  // namespace older

namespace newer {
int version();
float normalised();
}  // namespace newer
