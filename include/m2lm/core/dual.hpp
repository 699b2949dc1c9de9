// Dual numbers: a value and its derivative along one direction. Reference<Dual<double>> differentiates any forward pass exactly.
// Floor: core. May include: config.
#pragma once

#include <m2lm/config.hpp>

#include <cmath>
#include <numbers>

namespace m2lm::inline M2LM_ABI {

/// value + tangent·ε with ε² = 0. Comparisons look at the value. source: W. K. Clifford 1873; forward-mode differentiation.
template <class T>
struct Dual {
  T value{};
  T tangent{};

  constexpr Dual() = default;
  /// A constant: its tangent is 0.
  constexpr Dual(T v) : value(v) {}  // NOLINT: a constant is a dual number whose tangent is 0
  /// A value and its derivative.
  constexpr Dual(T v, T t) : value(v), tangent(t) {}

  friend constexpr Dual operator+(Dual a) { return a; }
  friend constexpr Dual operator-(Dual a) { return {-a.value, -a.tangent}; }
  friend constexpr Dual operator+(Dual a, Dual b) { return {a.value + b.value, a.tangent + b.tangent}; }
  friend constexpr Dual operator-(Dual a, Dual b) { return {a.value - b.value, a.tangent - b.tangent}; }
  friend constexpr Dual operator*(Dual a, Dual b) { return {a.value * b.value, a.tangent * b.value + a.value * b.tangent}; }
  friend constexpr Dual operator/(Dual a, Dual b) {
    const T quotient = a.value / b.value;
    return {quotient, (a.tangent - quotient * b.tangent) / b.value};
  }
  constexpr Dual& operator+=(Dual b) { return *this = *this + b; }
  constexpr Dual& operator-=(Dual b) { return *this = *this - b; }
  constexpr Dual& operator*=(Dual b) { return *this = *this * b; }
  constexpr Dual& operator/=(Dual b) { return *this = *this / b; }

  friend constexpr bool operator==(Dual a, Dual b) { return a.value == b.value; }
  friend constexpr auto operator<=>(Dual a, Dual b) { return a.value <=> b.value; }

  friend Dual exp(Dual a) {
    const T e = std::exp(a.value);
    return {e, e * a.tangent};
  }
  friend Dual log(Dual a) { return {std::log(a.value), a.tangent / a.value}; }
  friend Dual sqrt(Dual a) {
    const T root = std::sqrt(a.value);
    return {root, a.tangent / (T(2) * root)};
  }
  friend Dual tanh(Dual a) {
    const T t = std::tanh(a.value);
    return {t, (T(1) - t * t) * a.tangent};
  }
  friend Dual erf(Dual a) { return {std::erf(a.value), T(2) * std::numbers::inv_sqrtpi_v<T> * std::exp(-a.value * a.value) * a.tangent}; }
  friend Dual sin(Dual a) { return {std::sin(a.value), std::cos(a.value) * a.tangent}; }
  friend Dual cos(Dual a) { return {std::cos(a.value), -std::sin(a.value) * a.tangent}; }
  friend Dual abs(Dual a) { return a.value < T(0) ? -a : a; }
};

}  // namespace m2lm
