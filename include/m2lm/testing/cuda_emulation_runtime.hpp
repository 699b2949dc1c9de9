// cuda::Device over host memory, for tests without a GPU. Device memory faults when the host touches it, fresh memory is NaN, reads and
// writes past an allocation fault, and a machine can be made that has no device, little memory, or a kernel that fails.
// Empty under nvcc: there runtime.cuh defines it.
// Floor: testing. May include: models, train.
#pragma once

#if !defined(__CUDACC__)

#include <m2lm/backends/cuda/runtime.hpp>
#include <m2lm/backends/cuda/runtime_common.hpp>
#include <m2lm/testing/cuda_emulation.hpp>
#include <m2lm/testing/cuda_emulation_sm90.hpp>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include <sys/mman.h>
#include <unistd.h>

namespace m2lm::inline M2LM_ABI::cuda::emulation {

/// The machine that the emulation pretends to be. A Device takes what holds when it is made, but for the faults, which hold at once.
struct Machine {
  int devices = 1;
  detail::NoDevice why_none = detail::NoDevice::no_driver;  ///< where devices == 0
  int driver = 13000;                                       ///< CUDA version of the driver
  std::size_t memory_bytes = std::size_t{4} << 30;
  std::size_t staging_bytes = 4096;  ///< of a chunk; small, so that copies have several. Grows with a large unit or copy
  int compute_capability = 90;
  int multiprocessors = 16;
  std::size_t shared_bytes_per_block = 232448;
  std::optional<std::uint64_t> faulty_launch;       ///< the launch that fails, counted as launches() counts
  std::optional<std::uint64_t> failing_allocation;  ///< the allocation for which there is no memory, counted as allocations() counts
};

inline Machine& machine() {
  static Machine machine;
  return machine;
}

/// Changes the machine for a scope.
class MachineScope {
  Machine saved_ = machine();

 public:
  explicit MachineScope(Machine changed) { machine() = std::move(changed); }
  ~MachineScope() { machine() = saved_; }
  MachineScope(const MachineScope&) = delete;
  MachineScope& operator=(const MachineScope&) = delete;
};

/// Of all devices of the process since it began: launches (replayed ones too), allocations, and what is alive or was lost.
struct Counts {
  std::atomic<std::uint64_t> launches{0};
  std::atomic<std::uint64_t> allocated{0};
  std::atomic<std::int64_t> devices{0};
  std::atomic<std::int64_t> allocations{0};
  std::atomic<std::int64_t> pinned{0};
  std::atomic<std::int64_t> lost{0};  ///< allocations that were not released before their device was destroyed
};
inline Counts& counts() {
  static Counts counts;
  return counts;
}

/// Kernel launches and products that have run, and allocations that were asked for.
inline std::uint64_t launches() { return counts().launches; }
inline std::uint64_t allocations() { return counts().allocated; }

namespace detail {

inline std::size_t round_up(std::size_t n, std::size_t unit) { return (n + unit - 1) / unit * unit; }

inline void poison([[maybe_unused]] const void* p, [[maybe_unused]] std::size_t bytes) {
#if defined(M2LM_EMULATION_ASAN)
  ASAN_POISON_MEMORY_REGION(p, bytes);
#endif
}
inline void unpoison([[maybe_unused]] const void* p, [[maybe_unused]] std::size_t bytes) {
#if defined(M2LM_EMULATION_ASAN)
  ASAN_UNPOISON_MEMORY_REGION(p, bytes);
#endif
}

/// The memory of a device: one range of addresses, each used once. What is not allocated is a mapping of an empty file, which faults
/// (SIGBUS) whatever its protection, so one mprotect over the range opens and closes all allocations and still leaves guards between
/// them. An allocation ends on a page border, or less than 64 bytes before one; those bytes are watched.
class Memory {
  struct Block {
    std::byte* pages;  ///< where its pages begin
    std::size_t page_bytes;
    std::size_t bytes;  ///< as asked for
  };
  static constexpr std::size_t range_bytes = std::size_t{1} << 38;
  static constexpr std::size_t alignment = 64;
  static constexpr unsigned char fresh = 0xFF;  ///< NaN in every float format
  static constexpr unsigned char watch = 0xA7;

  std::size_t page_ = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
  int empty_file_ = -1;
  std::byte* range_ = nullptr;
  std::size_t end_ = 0;  ///< addresses handed out
  std::map<const std::byte*, Block> blocks_;
  std::size_t used_ = 0;

 public:
  Memory() {
    empty_file_ = ::memfd_create("m2lm-emulated-device", MFD_CLOEXEC);
    if (empty_file_ < 0) throw std::bad_alloc();
    void* p = ::mmap(nullptr, range_bytes, PROT_NONE, MAP_SHARED | MAP_NORESERVE, empty_file_, 0);
    if (p == MAP_FAILED) {
      ::close(empty_file_);
      throw std::bad_alloc();
    }
    range_ = static_cast<std::byte*>(p);
  }
  ~Memory() {
    unpoison(range_, end_);
    ::munmap(range_, range_bytes);
    ::close(empty_file_);
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  std::size_t used() const { return used_; }
  std::size_t blocks() const { return blocks_.size(); }

  void* allocate(std::size_t bytes, bool zeroed) {
    const std::size_t whole = round_up(std::max<std::size_t>(bytes, 1), alignment);
    const std::size_t page_bytes = round_up(whole, page_);
    if (page_bytes + 2 * page_ > range_bytes - end_) throw std::bad_alloc();
    std::byte* pages = range_ + end_ + page_;  // a guard before the first, and so one between any two
    void* mapped = ::mmap(pages, page_bytes, PROT_READ | PROT_WRITE, MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED) throw std::bad_alloc();
    std::byte* p = pages + (page_bytes - whole);
    blocks_.emplace(p, Block{pages, page_bytes, bytes});
    end_ += page_ + page_bytes;
    used_ += whole;
    if (!zeroed) std::memset(p, fresh, bytes);
    std::memset(p + bytes, watch, whole - bytes);
    poison(pages, page_bytes - whole);
    poison(p + bytes, whole - bytes);
    ::mprotect(pages, page_bytes, PROT_NONE);
    ++counts().allocations;
    return p;
  }

  /// Returns whether p was allocated. Its addresses fault from now on.
  bool release(const void* p) noexcept {
    const auto it = blocks_.find(static_cast<const std::byte*>(p));
    if (it == blocks_.end()) return false;
    const Block block = it->second;
    unpoison(block.pages, block.page_bytes);
    // Fails only where the kernel has no room for another mapping; then the pages stay as they are.
    ::mmap(block.pages, block.page_bytes, PROT_NONE, MAP_FIXED | MAP_SHARED | MAP_NORESERVE, empty_file_, block.pages - range_);
    used_ -= round_up(std::max<std::size_t>(block.bytes, 1), alignment);
    blocks_.erase(it);
    --counts().allocations;
    return true;
  }

  bool holds(const void* p, std::size_t bytes) const {
    const auto* begin = static_cast<const std::byte*>(p);
    auto it = blocks_.upper_bound(begin);
    if (it == blocks_.begin()) return false;
    --it;
    const auto offset = static_cast<std::size_t>(begin - it->first);
    return offset <= it->second.bytes && bytes <= it->second.bytes - offset;
  }
  bool in_range(const void* p) const { return std::less_equal<>()(range_, p) && std::less<>()(p, range_ + range_bytes); }

  /// The size of an allocation behind whose end something was written.
  std::optional<std::size_t> overrun() {
    const Opened opened(*this);
    for (const auto& [p, block] : blocks_) {
      const std::byte* end = block.pages + block.page_bytes;
      unpoison(p + block.bytes, static_cast<std::size_t>(end - p) - block.bytes);
      const bool whole = std::all_of(p + block.bytes, end, [](std::byte b) { return b == std::byte{watch}; });
      poison(p + block.bytes, static_cast<std::size_t>(end - p) - block.bytes);
      if (!whole) return block.bytes;
    }
    return std::nullopt;
  }

  /// While one lives, allocations can be read and written: all, or the pages around some bytes.
  class Opened {
    std::byte* begin_;
    std::size_t bytes_;

   public:
    explicit Opened(Memory& memory) : Opened(memory, memory.range_, memory.end_) {}
    Opened(Memory& memory, const void* p, std::size_t bytes) {
      const auto offset = static_cast<std::size_t>(static_cast<const std::byte*>(p) - memory.range_) / memory.page_ * memory.page_;
      begin_ = memory.range_ + offset;
      bytes_ = round_up(static_cast<std::size_t>(static_cast<const std::byte*>(p) - begin_) + bytes, memory.page_);
      protect(PROT_READ | PROT_WRITE);
    }
    ~Opened() { protect(PROT_NONE); }
    Opened(const Opened&) = delete;
    Opened& operator=(const Opened&) = delete;

   private:
    void protect(int protection) const {
      if (bytes_ != 0) ::mprotect(begin_, bytes_, protection);
    }
  };
};

/// Pinned memory of the process: [begin, end) by begin.
struct PinnedRanges {
  std::mutex mutex;
  std::map<const std::byte*, const std::byte*> ranges;

  bool holds(const void* p, std::size_t bytes) {
    const std::lock_guard lock(mutex);
    const auto* begin = static_cast<const std::byte*>(p);
    auto it = ranges.upper_bound(begin);
    return it != ranges.begin() && bytes <= static_cast<std::size_t>((--it)->second - it->first) && begin + bytes <= it->second;
  }
};
inline const std::shared_ptr<PinnedRanges>& pinned_ranges() {
  static const auto ranges = std::make_shared<PinnedRanges>();
  return ranges;
}

/// Work of the stream.
struct Step {
  std::string name;  ///< in a message
  bool launch;       ///< counted, and can be made to fail
  std::function<void()> run;
};

inline float gelu_tanh(float x) { return 0.5F * x * (1 + std::tanh(0.7978845608028654F * (x + 0.044715F * x * x * x))); }

/// The product by plain loops: f32 sums, one rounding to y. E is the type of x and w, Y that of y, bias and residual.
template <class E, class Y>
void multiply(const Product& p) {
  const auto store = [](Y& y, float v) {
    if constexpr (std::is_same_v<Y, Bf16>)
      y = to_bf16(v);
    else if constexpr (std::is_same_v<Y, Half>)
      y = to_half(v);
    else
      y = v;
  };
  const auto m = static_cast<std::size_t>(p.m), n = static_cast<std::size_t>(p.n), k = static_cast<std::size_t>(p.k);
  const auto ldx = static_cast<std::size_t>(p.ldx), ldw = static_cast<std::size_t>(cuda::detail::ldw_of(p));
  // Row i of a matrix that is stored as it is, or column i of one that is stored as its transpose.
  const auto copy_row = [&](const void* matrix, std::size_t i, bool transposed, std::size_t ld, float* row) {
    const E* first = static_cast<const E*>(matrix) + (transposed ? i : i * ld);
    for (std::size_t l = 0; l < k; ++l) row[l] = to_float(first[transposed ? l * ld : l]);
  };
  std::vector<float> x(m * k), w(k);
  for (std::size_t i = 0; i < m; ++i) copy_row(p.x, i, p.transpose_x, ldx, x.data() + i * k);
  for (std::size_t j = 0; j < n; ++j) {
    copy_row(p.w, j, p.transpose_w, ldw, w.data());
    const float bias = p.bias != nullptr ? to_float(static_cast<const E*>(p.bias)[j]) : 0.0F;
    for (std::size_t i = 0; i < m; ++i) {
      float sum = 0;
      for (std::size_t l = 0; l < k; ++l) sum += x[i * k + l] * w[l];
      sum += bias;
      if (p.activation == Activation::relu && sum < 0) sum = 0;
      if (p.activation == Activation::gelu_tanh) sum = gelu_tanh(sum);
      if (p.residual != nullptr) sum += to_float(static_cast<const Y*>(p.residual)[i * static_cast<std::size_t>(p.ld_residual) + j]);
      store(static_cast<Y*>(p.y)[i * static_cast<std::size_t>(p.ldy) + j], sum);
    }
  }
}

}  // namespace detail
}  // namespace m2lm::cuda::emulation

namespace m2lm::inline M2LM_ABI::cuda {

struct Device::Implementation {
  using Step = emulation::detail::Step;
  using Memory = emulation::detail::Memory;

  /// Bytes that reach pinned memory when the host waits for them, not before: a missing wait is seen.
  struct Delivery {
    void* to;
    std::vector<std::byte> bytes;
    int mark;
  };

  emulation::Machine machine = emulation::machine();
  DeviceProperties properties;
  Memory memory;
  std::string fault;  ///< what made this device unusable
  std::uint64_t waits = 0;
  std::vector<Delivery> deliveries;
  detail::ReplayCache<std::vector<Step>> replays;
  bool recording = false;
  std::vector<Step> recorded;
  std::vector<void*> released;  ///< while recording: released when that is over
  std::vector<std::byte> staging;

  Implementation() { ++emulation::counts().devices; }
  ~Implementation() {
    emulation::counts().lost += static_cast<std::int64_t>(memory.blocks());
    emulation::counts().allocations -= static_cast<std::int64_t>(memory.blocks());
    --emulation::counts().devices;
  }
  Implementation(const Implementation&) = delete;
  Implementation& operator=(const Implementation&) = delete;

  void check(std::string_view call) const {
    if (!fault.empty()) throw DeviceError(detail::lost_device(call, fault));
  }
  void check_host_call(std::string_view call) const {
    check(concat("Device::", call));
    detail::refuse_while_recording(recording, call);
  }
  void check_range(std::string_view call, const void* p, std::size_t bytes) const {
    require<DeviceError>(bytes == 0 || memory.holds(p, bytes), "m2lm::cuda::Device::", call, ": ", bytes,
                         " bytes that are not all in one allocation of this device");
  }

  /// Runs a step now, or records it. A step that fails is reported by the next call, as a fault of a kernel is.
  void enqueue(Step step) {
    check(step.name);
    if (recording)
      recorded.push_back(std::move(step));
    else
      run(step);
  }
  void run(const Step& step) {
    if (!fault.empty()) return;
    try {
      if (step.launch) {
        const std::uint64_t count = emulation::counts().launches++;
        if (emulation::machine().faulty_launch == count) throw std::runtime_error("an illegal memory access was encountered");
      }
      const Memory::Opened opened(memory);
      step.run();
    } catch (const std::exception& error) {
      fault = concat(step.name, ": ", error.what());
    }
  }
  /// The host waits: all that was enqueued is done.
  void wait(std::string_view call) {
    ++waits;
    check(concat("Device::", call));
    if (const auto bytes = memory.overrun()) {
      fault = concat("something was written behind the end of an allocation of ", *bytes, " bytes");
      check(concat("Device::", call));
    }
    deliver(deliveries.size());
  }
  void deliver(std::size_t count) {
    for (std::size_t i = 0; i < count; ++i) {
      const Delivery& delivery = deliveries[i];
      if (emulation::detail::pinned_ranges()->holds(delivery.to, delivery.bytes.size()))
        std::memcpy(delivery.to, delivery.bytes.data(), delivery.bytes.size());
    }
    deliveries.erase(deliveries.begin(), deliveries.begin() + static_cast<std::ptrdiff_t>(count));
  }
  void* allocate(std::size_t bytes, bool zeroed) {
    check_host_call("allocate");
    const std::size_t free = machine.memory_bytes - memory.used();
    const bool fits = bytes <= free && emulation::detail::round_up(std::max<std::size_t>(bytes, 1), 64) <= free;
    if (emulation::machine().failing_allocation == emulation::counts().allocated++ || !fits)
      detail::throw_out_of_memory(bytes, free, machine.memory_bytes);
    return memory.allocate(bytes, zeroed);
  }
  void end_recording() noexcept {
    recording = false;
    for (void* p : released) memory.release(p);
    released.clear();
  }
};

inline int device_count(std::string* reason) {
  const emulation::Machine& machine = emulation::machine();
  if (machine.devices == 0 && reason != nullptr) *reason = detail::no_device_reason(machine.why_none, machine.driver, 13000, "");
  return machine.devices;
}

inline Device::Device(int ordinal) {
  detail::require_device(ordinal);
  implementation_ = std::make_unique<Implementation>();
  const emulation::Machine& machine = implementation_->machine;
  implementation_->properties = {.name = "emulated device",
                                 .ordinal = ordinal,
                                 .compute_capability = machine.compute_capability,
                                 .multiprocessors = machine.multiprocessors,
                                 .memory_bytes = machine.memory_bytes,
                                 .shared_bytes_per_block = machine.shared_bytes_per_block};
}
inline Device::~Device() = default;

inline const DeviceProperties& Device::properties() const { return implementation_->properties; }

inline void* Device::allocate(std::size_t bytes) { return implementation_->allocate(bytes, false); }
inline void* Device::allocate_zeroed(std::size_t bytes) { return implementation_->allocate(bytes, true); }
inline void Device::release(void* p) noexcept {
  if (p == nullptr) return;
  const auto turn = exclusive();  // no other thread is recording
  if (implementation_->recording)
    implementation_->released.push_back(p);
  else if (!implementation_->memory.release(p))
    implementation_->fault = "memory was released that is not allocated";
}
inline void Device::zero(void* p, std::size_t bytes) {
  implementation_->check_range("zero", p, bytes);
  implementation_->enqueue({"Device::zero", false, [=] { std::memset(p, 0, bytes); }});
}
inline std::size_t Device::available() const { return implementation_->machine.memory_bytes - implementation_->memory.used(); }

inline void Device::copy_to_device(void* to, const void* from, std::size_t bytes) {
  require<DeviceError>(bytes == 0 || !implementation_->memory.in_range(from), "m2lm::cuda::Device::copy_to_device: `from` is device memory");
  copy_to_device(to, bytes, 1, [from](std::byte* chunk, std::size_t first, std::size_t count) {
    std::memcpy(chunk, static_cast<const std::byte*>(from) + first, count);
  });
}
inline void Device::copy_to_device(void* to, std::size_t bytes, std::size_t unit, FunctionRef<void(std::byte*, std::size_t, std::size_t)> fill) {
  Implementation& self = *implementation_;
  self.check_host_call("copy_to_device");
  detail::require_unit(bytes, unit);
  self.check_range("copy_to_device", to, bytes);
  constexpr std::size_t most_chunks = 64;
  const std::size_t chunk = std::max(std::max(self.machine.staging_bytes, bytes / most_chunks) / unit, std::size_t{1}) * unit;
  for (std::size_t first = 0; first < bytes; first += chunk) {
    const std::size_t count = std::min(chunk, bytes - first);
    self.staging.assign(count, std::byte{0xFF});
    fill(self.staging.data(), first, count);
    const Implementation::Memory::Opened opened(self.memory, static_cast<std::byte*>(to) + first, count);
    std::memcpy(static_cast<std::byte*>(to) + first, self.staging.data(), count);
  }
}
inline void Device::copy_to_host(void* to, const void* from, std::size_t bytes) {
  Implementation& self = *implementation_;
  self.check_host_call("copy_to_host");
  self.check_range("copy_to_host", from, bytes);
  require<DeviceError>(bytes == 0 || !self.memory.in_range(to), "m2lm::cuda::Device::copy_to_host: `to` is device memory");
  self.wait("copy_to_host");
  if (bytes == 0) return;
  const Implementation::Memory::Opened opened(self.memory, from, bytes);
  std::memcpy(to, from, bytes);
}
inline void Device::synchronize() {
  implementation_->check_host_call("synchronize");
  implementation_->wait("synchronize");
}
inline std::uint64_t Device::waits() const { return implementation_->waits; }

inline void Device::multiply(const Product& p) {
  detail::check_product(p);
  if (p.m == 0 || p.n == 0) return;
  implementation_->enqueue({concat("cublasLtMatmul of ", detail::ProductText{p}), true, [p] {
                              using emulation::detail::multiply;
                              if (p.dtype == DType::f32) return multiply<float, float>(p);
                              if (p.dtype == DType::f16) return p.wide_output ? multiply<Half, float>(p) : multiply<Half, Half>(p);
                              return p.wide_output ? multiply<Bf16, float>(p) : multiply<Bf16, Bf16>(p);
                            }});
}

inline bool Device::replay(const ReplayKey& key, FunctionRef<void()> body) {
  Implementation& self = *implementation_;
  self.check_host_call("replay");
  auto& entry = self.replays.at(key);
  if (entry.recorded) {
    for (const auto& step : *entry.recorded) self.run(step);
    return false;
  }
  if (!entry.seen) {
    body();
    self.replays.at(key).seen = true;
    return true;
  }
  self.recorded.clear();
  self.recording = true;
  try {
    body();
  } catch (...) {
    self.end_recording();
    throw;
  }
  self.end_recording();
  const auto& steps = self.replays.at(key).recorded.emplace(std::move(self.recorded));
  for (const auto& step : steps) self.run(step);
  return true;
}
inline void Device::forget_replays() {
  detail::refuse_while_recording(implementation_->recording, "forget_replays");
  implementation_->replays.clear();
}

inline std::shared_ptr<void> Device::pinned(std::size_t bytes) {
  implementation_->check_host_call("pinned");
  const auto& ranges = emulation::detail::pinned_ranges();
  auto* p = static_cast<std::byte*>(::operator new (std::max<std::size_t>(bytes, 1), std::align_val_t{64}));
  std::memset(p, 0xFF, bytes);
  std::shared_ptr<void> owner(p, [ranges](void* memory) {
    {
      const std::lock_guard lock(ranges->mutex);
      ranges->ranges.erase(static_cast<std::byte*>(memory));
    }
    ::operator delete (memory, std::align_val_t{64});
    --emulation::counts().pinned;
  });
  ++emulation::counts().pinned;
  const std::lock_guard lock(ranges->mutex);
  ranges->ranges.emplace(p, p + bytes);
  return owner;
}
inline void Device::copy_to_pinned(void* to, const void* from, std::size_t bytes, int mark) {
  Implementation& self = *implementation_;
  detail::require_mark(mark);
  self.check_host_call("copy_to_pinned");
  self.check_range("copy_to_pinned", from, bytes);
  require<DeviceError>(emulation::detail::pinned_ranges()->holds(to, bytes), "m2lm::cuda::Device::copy_to_pinned: `to` is not in pinned memory");
  self.enqueue({"Device::copy_to_pinned", false, [=, &self] {
                  const auto* p = static_cast<const std::byte*>(from);
                  self.deliveries.push_back({to, {p, p + bytes}, mark});
                }});
}
inline void Device::wait_for(int mark) {
  Implementation& self = *implementation_;
  detail::require_mark(mark);
  self.check_host_call("wait_for");
  const auto last = std::find_if(self.deliveries.rbegin(), self.deliveries.rend(), [mark](const auto& delivery) { return delivery.mark == mark; });
  self.deliver(static_cast<std::size_t>(self.deliveries.rend() - last));
}

namespace emulation {

inline void enqueue(Device& device, std::string_view kernel, const LaunchShape& shape, std::function<void()> run) {
  const DeviceProperties& properties = device.properties();
  const bool possible = shape.grid_x >= 1 && shape.grid_y >= 1 && shape.grid_z >= 1 && shape.grid_x <= 0x7fffffffU && shape.grid_y <= 65535U &&
                        shape.grid_z <= 65535U && shape.block_x >= 1 && shape.block_y >= 1 && std::uint64_t{shape.block_x} * shape.block_y <= 1024 &&
                        shape.shared_bytes <= properties.shared_bytes_per_block;
  if (!possible) throw DeviceError(concat("m2lm::cuda: ", cuda::detail::kernel_string(kernel, shape), ": invalid configuration argument"));
  device.implementation().enqueue({cuda::detail::kernel_string(kernel, shape), true, std::move(run)});
}

}  // namespace emulation
}  // namespace m2lm::cuda

#endif  // !__CUDACC__
