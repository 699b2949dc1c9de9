#include <odr/report.hpp>

int main() { return baseline::report().layout.empty() ? 1 : 0; }
