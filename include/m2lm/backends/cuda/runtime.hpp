// The CUDA runtime as the backend needs it: one device, one stream, its memory, products by cuBLASLt, recorded steps. Compiles without
// CUDA; runtime.cuh defines it over the toolkit, testing/cuda_emulation.hpp over host memory.
// Floor: backends. May include: core, ops.
#pragma once

#include <m2lm/core/function_ref.hpp>
#include <m2lm/core/memory.hpp>
#include <m2lm/core/view.hpp>
#include <m2lm/ops/activation.hpp>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>

namespace m2lm::inline M2LM_ABI::cuda {

/// What a device is and can hold.
struct DeviceProperties {
  std::string name;
  int ordinal = 0;
  int compute_capability = 0;  ///< 90 = sm_90
  int multiprocessors = 0;
  std::size_t memory_bytes = 0;            ///< of the device, in all
  std::size_t shared_bytes_per_block = 0;  ///< that a kernel may ask for (opt-in)
};

/// Devices that can be used: 0 without a driver. Never throws; `reason`, if given, says why there are none.
int device_count(std::string* reason = nullptr);

/// Threads of a launch.
struct LaunchShape {
  unsigned grid_x = 1, grid_y = 1, grid_z = 1;
  unsigned block_x = 1, block_y = 1;
  std::size_t shared_bytes = 0;  ///< dynamic shared memory
};

/// y = x·wᵀ (+ bias) (activation) (+ residual), all row-major; x or w may be stored as its transpose, as gradients want it. requires
/// activation none, relu or gelu_tanh: what cuBLASLt has as an epilogue (its GELU is the tanh form); a residual only with activation none, a
/// bias only without wide_output; x, w and y hold elements of `dtype` (f32, f16 or bf16), y f32 instead where wide_output.
struct Product {
  DType dtype = DType::bf16;
  bool wide_output = false;
  const void* x = nullptr;  ///< [m, k]
  std::int64_t ldx = 0;
  bool transpose_x = false;  ///< x is stored as [k, m]
  const void* w = nullptr;   ///< [n, k]
  std::int64_t ldw = 0;      ///< 0: its rows follow each other
  bool transpose_w = false;  ///< w is stored as [k, n]
  std::int64_t m = 0, n = 0, k = 0;
  const void* bias = nullptr;  ///< [n] of `dtype` on a 16-byte border, or null
  Activation activation = Activation::none;
  const void* residual = nullptr;  ///< [m, n] as y, or null; may be y
  std::int64_t ld_residual = 0;
  void* y = nullptr;
  std::int64_t ldy = 0;
};

/// What a recorded step depends on besides the memory that it reads: equal keys, equal work at equal addresses.
struct ReplayKey {
  std::uint64_t words[8]{};
  friend constexpr bool operator==(const ReplayKey&, const ReplayKey&) = default;
};

/// A device, its stream and the handles that go with it. All work is enqueued on the one stream, in order. One thread at a time.
/// Errors are DeviceError: they name the call or the kernel, its launch shape, and what CUDA said.
class Device : public MemoryResource {
 public:
  struct Implementation;

  /// throws DeviceError naming the reason: no driver, a driver older than the runtime, no such device, a device that is in use.
  explicit Device(int ordinal);
  ~Device() override;
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  const DeviceProperties& properties() const;

  /// While one thread holds this, others that ask for it wait: models, sessions and their ends take it. It may be taken again by who has it.
  [[nodiscard]] std::unique_lock<std::recursive_mutex> exclusive() { return std::unique_lock(mutex_); }

  // MemoryResource. allocate throws CapacityError naming both sizes when the device is full. zero is enqueued.
  void* allocate(std::size_t bytes) override;
  void* allocate_zeroed(std::size_t bytes) override;
  void release(void* p) noexcept override;
  void zero(void* p, std::size_t bytes) override;
  std::size_t available() const override;

  /// Copies through pinned staging memory; `from` may be reused at once, the device sees the bytes in stream order.
  void copy_to_device(void* to, const void* from, std::size_t bytes);
  /// Copies what `fill` writes into pinned staging memory, chunk after chunk: it is called with (chunk, first, count) and writes bytes
  /// [first, first + count) of what `to` is to hold. While it fills one chunk the one before it is copied. Chunks are whole units of
  /// `unit` bytes. requires bytes % unit == 0, 1 <= unit <= staging_unit.
  void copy_to_device(void* to, std::size_t bytes, std::size_t unit, FunctionRef<void(std::byte*, std::size_t, std::size_t)> fill);
  static constexpr std::size_t staging_unit = std::size_t{4} << 20;
  /// Waits for the stream.
  void copy_to_host(void* to, const void* from, std::size_t bytes);
  /// Waits for the stream; throws DeviceError for a fault of a kernel since the last wait.
  void synchronize();
  /// How often this device has made the host wait: a decode step adds nothing.
  std::uint64_t waits() const;

  /// Runs a product. throws OptionError for a dtype or activation that it has not.
  void multiply(const Product& product);

  /// Enqueues what `body` enqueues. The first time a key is seen, body runs as it is (memory settles); the second time it is recorded
  /// as a graph; from then on the graph is launched and body is not run. Returns whether body was run. While it is recorded body must
  /// not allocate, copy to or from the host, or wait: DeviceError.
  bool replay(const ReplayKey& key, FunctionRef<void()> body);
  /// Forgets all recorded steps: addresses have changed.
  void forget_replays();

  /// Memory of the host that the device writes to directly (pinned), `bytes` long, freed with the pointer.
  std::shared_ptr<void> pinned(std::size_t bytes);
  /// Enqueues a copy to pinned memory, and a mark behind it; not inside a recorded step.
  void copy_to_pinned(void* to, const void* from, std::size_t bytes, int mark);
  /// Waits until mark `mark` (0 to 7) is reached; this is no wait for the stream.
  void wait_for(int mark);

  Implementation& implementation() const { return *implementation_; }

 private:
  std::recursive_mutex mutex_;
  std::unique_ptr<Implementation> implementation_;
};

}  // namespace m2lm::cuda
