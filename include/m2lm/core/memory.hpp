// Where elements live: MemoryResource, the memory of a device, and OnDevice, an element that the host cannot read.
// Floor: core. May include: config, core.
#pragma once

#include <m2lm/config.hpp>

#include <cstddef>
#include <cstdint>

namespace m2lm::inline M2LM_ABI {

/// The memory of a device: where its tensors, arenas and KV caches take their bytes from. (Those of the host use operator new.)
class MemoryResource {
 public:
  MemoryResource() = default;
  MemoryResource(const MemoryResource&) = delete;
  MemoryResource& operator=(const MemoryResource&) = delete;
  virtual ~MemoryResource() = default;

  /// At least 256-byte aligned, uninitialised. throws CapacityError.
  virtual void* allocate(std::size_t bytes) = 0;
  /// The same, zero.
  virtual void* allocate_zeroed(std::size_t bytes) = 0;
  /// Gives back what allocate or allocate_zeroed returned; null does nothing.
  virtual void release(void* p) noexcept = 0;
  /// Sets bytes to zero, in order with what the backend computes.
  virtual void zero(void* p, std::size_t bytes) = 0;
  /// Bytes that can still be had, as far as is known.
  virtual std::size_t available() const = 0;
};

/// An element in the memory of a device: it has the size of a T, and the host can neither read, write nor copy it. So a View, Tensor or
/// Matrix of such elements goes through layers and ops as any other, and code that touches its elements does not compile.
template <class T>
class OnDevice {
  T value_;

 public:
  /// The element without its place.
  using Value = T;
  OnDevice() = default;
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
};

namespace detail {
template <class T>
struct DeviceElement {
  static constexpr bool value = false;
  using Value = T;
};
template <class T>
struct DeviceElement<OnDevice<T>> {
  static constexpr bool value = true;
  using Value = T;
};
template <class T>
struct DeviceElement<const OnDevice<T>> {
  static constexpr bool value = true;
  using Value = const T;
};
}  // namespace detail

/// Whether the host may touch elements of type T.
template <class T>
concept HostElement = !detail::DeviceElement<T>::value;

/// The address of the values themselves, for a backend to pass on.
template <class T>
auto* values_of(T* p) {
  return reinterpret_cast<typename detail::DeviceElement<T>::Value*>(p);
}

}  // namespace m2lm
