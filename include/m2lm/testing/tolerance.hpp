// Comparing tensors, and how far two computations of the same thing may differ.
// Floor: testing. May include: config, core, ops, backends, layers, parts, io, sampling, models, train.
#pragma once

#include <m2lm/core/tensor.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

namespace m2lm::inline M2LM_ABI::testing {

inline constexpr double epsilon_f64 = 0x1.0p-52;  ///< distance between two elements of f64 at 1
inline constexpr double epsilon_f32 = 0x1.0p-23;  ///< of f32
inline constexpr double epsilon_bf16 = 0x1.0p-7;  ///< of bf16

/// max|a − b| / max|b| over all elements, with b the judge. Infinite when the numbers of elements differ, when anything is not
/// finite, or when b is all zero and a is not. T is the scalar of any backend.
template <class T>
double relative_error(const Tensor<T>& a, const AnyTensor& b) {
  constexpr double never = std::numeric_limits<double>::infinity();
  if (a.elements() != b.shape().elements()) return never;
  double largest = 0, error = 0;
  for (std::int64_t i = 0; i < a.elements(); ++i) {
    const double x = static_cast<double>(a.data()[i]), y = b.at(i);
    if (!std::isfinite(x) || !std::isfinite(y)) return never;
    largest = std::max(largest, std::abs(y));
    error = std::max(error, std::abs(x - y));
  }
  if (largest == 0) return error == 0 ? 0 : never;
  return error / largest;
}
/// The same with a judge of the library.
template <class T, class U>
double relative_error(const Tensor<T>& a, const Tensor<U>& b) {
  return relative_error(a, AnyTensor(b.clone()));
}

/// Bound on relative_error of a residual network of `blocks` blocks whose longest sum has `terms` terms.
/// Two independent roundings of half an epsilon differ by at most one. A stored weight or activation that is rounded moves an
/// output by `storage`, relative to its size: errors of random sign grow with √terms as the sum itself does. Each addition rounds
/// too, so a sum in `sum` drifts by √terms · sum. A block adds four products of two rounded factors, which add up as a random walk.
/// The factor 2 covers the largest of many elements, and gains above one.
inline double network_tolerance(double storage, double sum, std::int64_t terms, std::int64_t blocks) {
  const double roundings = 8.0 * static_cast<double>(blocks + 1);
  return 2.0 * std::sqrt(roundings) * (storage + sum * std::sqrt(static_cast<double>(terms)));
}

}  // namespace m2lm::testing
