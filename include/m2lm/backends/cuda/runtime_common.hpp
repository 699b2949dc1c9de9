// What both definitions of cuda::Device share: the sentences of their errors, the products that they have, which steps are recorded.
// Floor: backends. May include: core, ops.
#pragma once

#include <m2lm/backends/cuda/runtime.hpp>
#include <m2lm/core/dtype.hpp>
#include <m2lm/core/error.hpp>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace m2lm::inline M2LM_ABI::cuda::detail {

// ---- sentences --------------------------------------------------------------------------------------------------------------

/// Why no device can be used.
enum class NoDevice { no_driver, old_driver, none_visible, other };

/// "13.0" of 13000, as the toolkit counts versions.
inline std::string version_string(int version) { return concat(version / 1000, '.', version % 1000 / 10); }

/// What a person reads who has no device. `driver` and `runtime` are CUDA versions, the driver's 0 when it is not known; `said` is what
/// CUDA itself says.
inline std::string no_device_reason(NoDevice why, int driver, int runtime, std::string_view said) {
  const std::string needed = version_string(runtime);
  switch (why) {
    case NoDevice::no_driver:
      return concat("no NVIDIA driver is installed or loaded on this machine (CUDA ", needed, " needs one); the CPU backend works without");
    case NoDevice::old_driver:
      return concat("the NVIDIA driver is of CUDA ", version_string(driver), ", this program was built with CUDA ", needed,
                    ": install a newer driver, or build with an older toolkit");
    case NoDevice::none_visible:
      return "there is a driver, but no device is visible: look at nvidia-smi, and at the environment variable CUDA_VISIBLE_DEVICES";
    case NoDevice::other: break;
  }
  return concat("the devices cannot be counted: ", said);
}

/// "grid [4, 1, 1], block [256, 1], 1024 bytes of dynamic shared memory".
inline std::string string(const LaunchShape& shape) {
  return concat("grid [", shape.grid_x, ", ", shape.grid_y, ", ", shape.grid_z, "], block [", shape.block_x, ", ", shape.block_y, "], ",
                shape.shared_bytes, " bytes of dynamic shared memory");
}

/// "kernel rms_norm (grid …)".
inline std::string kernel_string(std::string_view kernel, const LaunchShape& shape) { return concat("kernel ", kernel, " (", string(shape), ')'); }

[[noreturn]] inline void throw_out_of_memory(std::size_t asked, std::size_t free, std::size_t total) {
  throw CapacityError(concat("m2lm::cuda: ", asked, " bytes of device memory were asked for, ", free, " of ", total,
                             " are free; choose a smaller precision or context, or free other models and programs on the device"));
}

/// After a fault nothing on the device can be trusted, so every later call says so.
inline std::string lost_device(std::string_view call, std::string_view fault) {
  return concat("m2lm::cuda::", call, ": the device cannot be used any more after an earlier fault (", fault,
                "); the CPU backend still works, and a new process can use the device again");
}

inline void refuse_while_recording(bool recording, std::string_view call) {
  require<DeviceError>(!recording, "m2lm::cuda::Device::", call,
                       ": not while a step is being recorded; do it before Device::replay, or enqueue it as a kernel");
}

inline void require_device(int ordinal) {
  std::string reason;
  const int count = device_count(&reason);
  require<DeviceError>(count > 0, "m2lm::cuda::Device: ", reason);
  require<DeviceError>(0 <= ordinal && ordinal < count, "m2lm::cuda::Device: there is no device ", ordinal, ": ", count, " visible, counted from 0");
}

inline void require_unit(std::size_t bytes, std::size_t unit) {
  require<OptionError>(unit >= 1 && unit <= Device::staging_unit && bytes % unit == 0, "m2lm::cuda::Device::copy_to_device: ", bytes,
                       " bytes in units of ", unit, "; units are whole, and at most ", Device::staging_unit, " bytes");
}

inline void require_mark(int mark) { require<OptionError>(0 <= mark && mark < 8, "m2lm::cuda::Device: marks are 0 to 7, not ", mark); }

// ---- products ---------------------------------------------------------------------------------------------------------------

/// A product in a message: "x [4, 64] by w [128, 64] of bf16".
struct ProductText {
  const Product& product;
  std::string string() const {
    const Product& p = product;
    return concat("x [", p.m, ", ", p.k, p.transpose_x ? "] (transposed)" : "]", " by w [", p.n, ", ", p.k, p.transpose_w ? "] (transposed)" : "]",
                  " of ", dtype_name(p.dtype), p.wide_output ? ", y of f32" : "");
  }
};

/// Between the rows of w as it is stored.
inline std::int64_t ldw_of(const Product& p) { return p.ldw != 0 ? p.ldw : p.transpose_w ? p.n : p.k; }

/// throws OptionError or ShapeError for a product that cuBLASLt has not in one call: its bias has the type of y and stands on a 16-byte
/// border, and its residual is added before the activation.
inline void check_product(const Product& p) {
  const ProductText text{p};
  constexpr std::string_view who = "m2lm::cuda::Device::multiply of ";
  require<OptionError>(p.dtype == DType::f32 || p.dtype == DType::f16 || p.dtype == DType::bf16, who, text, ": elements are f32, f16 or bf16");
  require<OptionError>(p.activation == Activation::none || p.activation == Activation::relu || p.activation == Activation::gelu_tanh, who, text,
                       ": the activations are none, relu and gelu_tanh");
  require<OptionError>(p.residual == nullptr || p.activation == Activation::none, who, text, ": a residual goes with no activation");
  require<OptionError>(p.bias == nullptr || !p.wide_output || p.dtype == DType::f32, who, text, ": a wide output goes with no bias");
  require<OptionError>(reinterpret_cast<std::uintptr_t>(p.bias) % 16 == 0, who, text, ": the bias stands on no 16-byte border");
  require(p.m >= 0 && p.n >= 0 && p.k >= 1, who, text, ": a size is negative, or k is 0");
  require(p.m == 0 || p.n == 0 || (p.x != nullptr && p.w != nullptr && p.y != nullptr), who, text, ": x, w or y is null");
  require(p.ldx >= (p.transpose_x ? p.m : p.k) && ldw_of(p) >= (p.transpose_w ? p.n : p.k) && p.ldy >= p.n &&
              (p.residual == nullptr || p.ld_residual >= p.n),
          who, text, ": rows overlap");
}

// ---- recorded steps ---------------------------------------------------------------------------------------------------------

/// How many steps a device keeps. A session has one per bucket of lengths; a recorded step costs some hundred KiB of host memory.
struct ReplayPolicy {
  std::size_t kept = 64;
};

/// The steps of Device::replay by key: seen once, or recorded. The one that was used least recently makes room for a new one.
template <class Recorded>
class ReplayCache {
 public:
  struct Entry {
    ReplayKey key;
    std::uint64_t used = 0;
    bool seen = false;
    std::optional<Recorded> recorded;
  };

 private:
  std::vector<Entry> entries_;  // few: looked through in order
  std::uint64_t clock_ = 0;

 public:
  /// The entry of a key, made if there is none. Valid until the next call.
  Entry& at(const ReplayKey& key, ReplayPolicy policy = {}) {
    Entry* oldest = nullptr;
    for (Entry& entry : entries_) {
      if (entry.key == key) {
        entry.used = ++clock_;
        return entry;
      }
      if (oldest == nullptr || entry.used < oldest->used) oldest = &entry;
    }
    Entry fresh{key, ++clock_, false, std::nullopt};
    if (entries_.size() < policy.kept) return entries_.emplace_back(std::move(fresh));
    return *oldest = std::move(fresh);
  }
  void clear() { entries_.clear(); }
  std::size_t size() const { return entries_.size(); }
};

}  // namespace m2lm::cuda::detail
