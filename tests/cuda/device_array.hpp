// An array in the memory of a device, for tests of kernels.
#pragma once

#include <m2lm/backends/cuda/runtime.hpp>

#include <cstddef>
#include <vector>

namespace m2lm_test {

template <class T>
class DeviceArray {
  m2lm::cuda::Device& device_;
  T* data_;
  std::size_t size_;

 public:
  /// Uninitialised.
  DeviceArray(m2lm::cuda::Device& device, std::size_t size)
      : device_(device), data_(static_cast<T*>(device.allocate(size * sizeof(T)))), size_(size) {}
  DeviceArray(m2lm::cuda::Device& device, const std::vector<T>& values) : DeviceArray(device, values.size()) {
    device.copy_to_device(data_, values.data(), size_ * sizeof(T));
  }
  ~DeviceArray() { device_.release(data_); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;

  T* data() const { return data_; }
  std::size_t size() const { return size_; }
  /// Waits for the device. throws DeviceError for a fault of a kernel.
  std::vector<T> read() const {
    std::vector<T> values(size_);
    device_.copy_to_host(values.data(), data_, size_ * sizeof(T));
    return values;
  }
};

}  // namespace m2lm_test
