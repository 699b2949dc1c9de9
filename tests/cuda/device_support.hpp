// Shared by the tests of kernels: a device, matrices in its memory, random elements and bounds.
#pragma once

#if defined(__CUDACC__)
#include <m2lm/backends/cuda/runtime.cuh>
#else
#include <m2lm/testing/cuda_emulation.hpp>
#include <m2lm/testing/cuda_emulation_runtime.hpp>
#endif

#include <m2lm/core/dtype.hpp>
#include <m2lm/core/rng.hpp>
#include <m2lm/core/view.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

namespace m2lm_test {

using namespace m2lm;

/// Unit roundoff: half a unit in the last place. And half of the smallest number: the error of a result that has underflowed.
template <class E>
inline constexpr double roundoff = std::is_same_v<E, float>  ? 0x1.0p-24
                                   : std::is_same_v<E, Half> ? 0x1.0p-11
                                                             : 0x1.0p-8;
template <class E>
inline constexpr double underflow = std::is_same_v<E, Half> ? 0x1.0p-25 : 0x1.0p-126;

template <class E>
E element(float x) {
  if constexpr (std::is_same_v<E, float>)
    return x;
  else if constexpr (std::is_same_v<E, Half>)
    return to_half(x);
  else
    return to_bf16(x);
}

class Random {
  Rng rng_;

 public:
  explicit Random(std::uint64_t seed) : rng_(seed) {}
  std::int64_t integer(std::int64_t low, std::int64_t high) {
    return low + static_cast<std::int64_t>(rng_.next() % static_cast<std::uint64_t>(high - low + 1));
  }
  bool coin() { return integer(0, 1) == 1; }
  double uniform() { return rng_.uniform(); }
  /// About normal: mean 0, variance 1, |x| < 3.5.
  float value() {
    double sum = -2;
    for (int i = 0; i < 4; ++i) sum += rng_.uniform();
    return static_cast<float>(sum * 1.7320508);
  }
  template <class E>
  std::vector<E> elements(std::int64_t count, float scale = 1, float mean = 0) {
    std::vector<E> out(static_cast<std::size_t>(count));
    for (E& x : out) x = element<E>(mean + scale * value());
    return out;
  }
};

/// `count` values in device memory, `offset` elements behind an aligned address.
template <class T>
class DeviceArray {
  cuda::Device& device_;
  std::size_t count_;
  T* memory_;
  T* data_;

 public:
  DeviceArray(cuda::Device& device, const std::vector<T>& values, std::int64_t offset = 0)
      : device_(device),
        count_(values.size()),
        memory_(static_cast<T*>(device.allocate((values.size() + static_cast<std::size_t>(offset)) * sizeof(T)))),
        data_(memory_ + offset) {
    write(values);
  }
  /// Zeros.
  DeviceArray(cuda::Device& device, std::size_t count) : DeviceArray(device, std::vector<T>(count)) {}
  ~DeviceArray() { device_.release(memory_); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;
  T* data() const { return data_; }
  void write(const std::vector<T>& values) {
    if (!values.empty()) device_.copy_to_device(data_, values.data(), values.size() * sizeof(T));
  }
  std::vector<T> read() const {
    std::vector<T> out(count_);
    if (count_ != 0) device_.copy_to_host(out.data(), data_, count_ * sizeof(T));
    return out;
  }
};

/// A matrix in device memory whose rows are `extra` elements apart; what lies between them holds a pattern.
template <class E>
class DeviceMatrix {
  std::int64_t rows_, cols_, stride_;
  DeviceArray<E> array_;

  static E gap() {
    E out;
    std::memset(static_cast<void*>(&out), 0x5a, sizeof(E));
    return out;
  }
  static std::vector<E> spread(const std::vector<E>& values, std::int64_t rows, std::int64_t cols, std::int64_t stride) {
    std::vector<E> out(static_cast<std::size_t>(rows * stride), gap());
    for (std::int64_t i = 0; i < rows * cols; ++i) out[static_cast<std::size_t>(i / cols * stride + i % cols)] = values[static_cast<std::size_t>(i)];
    return out;
  }

 public:
  DeviceMatrix(cuda::Device& device, std::int64_t rows, std::int64_t cols, const std::vector<E>& values, std::int64_t extra = 0,
               std::int64_t offset = 0)
      : rows_(rows), cols_(cols), stride_(cols + extra), array_(device, spread(values, rows, cols, cols + extra), offset) {}
  /// Filled with the pattern.
  DeviceMatrix(cuda::Device& device, std::int64_t rows, std::int64_t cols, std::int64_t extra = 0, std::int64_t offset = 0)
      : DeviceMatrix(device, rows, cols, std::vector<E>(static_cast<std::size_t>(rows * cols), gap()), extra, offset) {}

  Matrix<E> view() const { return {array_.data(), {rows_, cols_}, {stride_, 1}}; }
  Matrix<const E> const_view() const { return view(); }
  /// The elements [rows, cols]; checks that nothing was written between the rows.
  std::vector<E> read() const {
    const std::vector<E> all = array_.read();
    std::vector<E> out;
    bool untouched = true;
    const E pattern = gap();
    for (std::int64_t i = 0; i < rows_; ++i)
      for (std::int64_t j = 0; j < stride_; ++j) {
        const E& x = all[static_cast<std::size_t>(i * stride_ + j)];
        if (j < cols_)
          out.push_back(x);
        else
          untouched &= std::memcmp(&x, &pattern, sizeof(E)) == 0;
      }
    CHECK_MESSAGE(untouched, "written between the rows");
    return out;
  }
};

template <class E>
bool same_bits(const std::vector<E>& a, const std::vector<E>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(E)) == 0);
}

template <class E>
std::vector<double> doubles(const std::vector<E>& from) {
  std::vector<double> out;
  for (const E& x : from) out.push_back(static_cast<double>(to_float(x)));
  return out;
}

/// The largest |got - expected| / bound (a NaN on one side only counts as infinite); passed when it is at most 1.
class Worst {
  double ratio_ = 0;
  std::string where_;

 public:
  void add(double got, double expected, double bound, std::int64_t at) {
    if (std::isnan(got) && std::isnan(expected)) return;
    const double error = std::abs(got - expected);
    const double ratio = error == 0 ? 0 : !(error <= std::numeric_limits<double>::max()) ? HUGE_VAL : error / bound;
    if (ratio <= ratio_) return;
    ratio_ = ratio;
    char text[160];
    std::snprintf(text, sizeof(text), "%lld: %.9g instead of %.9g, bound %.3g", static_cast<long long>(at), got, expected, bound);
    where_ = text;
  }
  bool passed() const { return ratio_ <= 1; }
  const std::string& where() const { return where_; }
};

}  // namespace m2lm_test
