// The vocabulary of backends/cuda/device.cuh for a host without CUDA: every thread of a block is a fiber, so barriers, collectives of a
// warp and asynchronous copies behave as on a device, and a misuse of them is an error with a name. Empty under nvcc.
// Floor: testing. May include: models, train.
#pragma once

// What it finds besides wrong results:
// - threads that do not meet: a barrier or a collective that not all of them reach, or that they reach at different places;
// - shared memory that is read before it is written (dynamic shared memory begins as NaN, afresh for every block), and, under
//   AddressSanitizer, accessed outside the size that was asked for (not M2LM_SHARED arrays of an M2LM_DEVICE function);
// - a copy_async16 without its wait (the bytes are NaN until then), or onto bytes that another thread still reads;
// - a missing __syncthreads: threads and blocks run in ascending order in one launch and in descending order in the next;
// - addresses that are not aligned as an access needs.
// What it cannot find: data races within one order of execution, and rounding of approximate instructions, which are exact here.
//
// Kernels of one program run one at a time; ThreadSanitizer does not know the fibers.

#if !defined(__CUDACC__)
#define M2LM_CUDA_EMULATION 1

#include <m2lm/backends/cuda/runtime.hpp>
#include <m2lm/core/dtype.hpp>
#include <m2lm/core/error.hpp>

#include <sys/mman.h>
#include <unistd.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include <array>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#define M2LM_EMULATION_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define M2LM_EMULATION_ASAN 1
#endif
#endif
#if defined(M2LM_EMULATION_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#define M2LM_KERNEL [[maybe_unused]] static  // so that AddressSanitizer watches what a kernel has as M2LM_SHARED
#define M2LM_LAUNCH_BOUNDS(...)
#define M2LM_DEVICE inline
#define M2LM_SHARED static  // of all blocks: they run one after another

namespace m2lm::inline M2LM_ABI::cuda {

struct Index3 {
  unsigned x = 0, y = 0, z = 0;
};

// Of the thread that runs now.
inline constinit Index3 threadIdx{}, blockIdx{}, blockDim{}, gridDim{};

struct alignas(16) Bytes16 {
  std::uint32_t words[4];
};

namespace emulation {

/// A kernel as `launch` enqueues it: runs at once, or is recorded where a step is being recorded. The device's memory can be accessed only
/// while `run` runs; what it throws is a fault of the kernel, which a message names. throws DeviceError for a shape that no launch can
/// have. cuda_emulation_runtime.hpp defines it.
void enqueue(Device& device, std::string_view kernel, const LaunchShape& shape, std::function<void()> run);

/// A line of a kernel.
struct Place {
  const char* file = nullptr;
  unsigned line = 0;
  static constexpr Place here(const char* file = __builtin_FILE(), unsigned line = __builtin_LINE()) { return {file, line}; }
  std::string string() const {
    const std::string_view path = file;
    return concat(path.substr(path.rfind('/') + 1), ":", line);
  }
  friend bool operator==(const Place& a, const Place& b) { return a.line == b.line && std::string_view(a.file) == b.file; }
};

inline std::string index_text(const Index3& index) { return concat("(", index.x, ", ", index.y, ", ", index.z, ")"); }

/// The values that the lanes of a warp bring to a collective, by lane; and those of the threads of a warpgroup.
using Lanes = std::array<void*, 32>;
using WarpgroupThreads = std::array<void*, 128>;

/// Runs the threads of one block after another as fibers on one host thread. A fiber runs until it waits for others.
class Engine {
 public:
  static Engine& instance() {
    static Engine engine;
    return engine;
  }

  /// Runs `body` once per thread of every block. throws what body throws, or DeviceError when threads wait for each other in vain.
  void run(const LaunchShape& shape, std::function<void()> body) {
    const std::lock_guard lock(mutex_);
    shape_ = shape;
    body_ = std::move(body);
    descending_ = !descending_;
    gridDim = {shape.grid_x, shape.grid_y, shape.grid_z};
    blockDim = {shape.block_x, shape.block_y, 1};
    const std::uint64_t blocks = std::uint64_t{shape.grid_x} * shape.grid_y * shape.grid_z;
    for (std::uint64_t i = 0; i < blocks; ++i) {
      const std::uint64_t block = descending_ ? blocks - 1 - i : i;
      blockIdx.x = static_cast<unsigned>(block % shape.grid_x);
      blockIdx.y = static_cast<unsigned>(block / shape.grid_x % shape.grid_y);
      blockIdx.z = static_cast<unsigned>(block / shape.grid_x / shape.grid_y);
      run_block();
    }
  }

  /// The current thread brings `mine`; the last lane of its warp to arrive calls perform on what all have brought.
  void meet_warp(const char* what, Place place, void* mine, void (*perform)(const Lanes&)) {
    Fiber& fiber = *current_;
    Warp& warp = warps_[fiber.number / 32];
    if ((fiber.number / 32 + 1) * 32 > threads_) fail(concat(what, " at ", place, " needs a whole warp, and the block has ", threads_, " threads"));
    arrive(fiber, warp.meeting, what, place, 32);
    warp.lanes[fiber.number % 32] = mine;
    if (warp.meeting.arrived < 32) return suspend(State::in_warp);
    perform(warp.lanes);
    warp.meeting.arrived = 0;
    for (unsigned lane = 0; lane < 32; ++lane) fibers_[fiber.number / 32 * 32 + lane]->state = State::ready;
  }

  /// The same of the four warps of a warpgroup, which begins at a multiple of 128 threads.
  void meet_warpgroup(const char* what, Place place, void* mine, void (*perform)(const WarpgroupThreads&)) {
    Fiber& fiber = *current_;
    const unsigned number = fiber.number / 128;
    if ((number + 1) * 128 > threads_) fail(concat(what, " at ", place, " needs a whole warpgroup, and the block has ", threads_, " threads"));
    if (warpgroups_.size() <= number) warpgroups_.resize(number + 1);
    Warpgroup& group = warpgroups_[number];
    arrive(fiber, group.meeting, what, place, 128);
    group.threads[fiber.number % 128] = mine;
    if (group.meeting.arrived < 128) return suspend(State::in_warpgroup);
    perform(group.threads);
    group.meeting.arrived = 0;
    for (unsigned i = 0; i < 128; ++i) fibers_[number * 128 + i]->state = State::ready;
  }

  /// The current thread goes on when `done` says so; it is asked while others run.
  void wait_until(const char* what, Place place, std::function<bool()> done) {
    Fiber& fiber = *current_;
    if (done()) return;
    fiber.waits_for = what;
    fiber.place = place;
    fiber.done = std::move(done);
    suspend(State::in_condition);
  }

  /// Work that nobody waits for here: a copy by the device itself. It is done as late as can be, when no thread can go on; of several the
  /// oldest comes first in one launch, the newest in the next. A block that ends before is a fault.
  void do_later(const char* what, Place place, std::function<void()> work) { later_.push_back({what, place, std::move(work)}); }

  /// From here on, until the block ends, the engine knows which thread has written which 16 bytes of dynamic shared memory by store_words,
  /// and has not said so to the async proxy since.
  void watch_stores() {
    if (writer_.empty()) writer_.assign((shape_.shared_bytes + 15) / 16, 0);
  }
  void stored(const void* p, std::size_t bytes) {
    if (writer_.empty() || !in_shared(p)) return;
    const std::size_t first = shared_offset(p) / 16, last = (shared_offset(p) + bytes - 1) / 16;
    for (std::size_t i = first; i <= last && i < writer_.size(); ++i) writer_[i] = current_->number + 1;
  }
  void fence_stores() {
    for (unsigned& writer : writer_)
      if (writer == current_->number + 1) writer = 0;
  }
  void forget_store(const void* p) {
    if (!writer_.empty() && in_shared(p)) writer_[shared_offset(p) / 16] = 0;
  }
  bool is_fenced(const void* p) const { return writer_.empty() || !in_shared(p) || writer_[shared_offset(p) / 16] == 0; }

  bool in_shared(const void* p) const {
    return shared_ && !std::less<>()(p, static_cast<const void*>(shared_.get())) && shared_offset(p) < shape_.shared_bytes;
  }
  /// Addresses of shared memory as a descriptor has them: 18 bits, which are those of the host's address.
  static constexpr std::uintptr_t shared_mask = 0x3FFFF;
  const std::byte* at_shared_address(std::uintptr_t address) const {
    return shared_.get() + ((address - reinterpret_cast<std::uintptr_t>(shared_.get())) & shared_mask);
  }

  /// How many blocks have begun: what belongs to a block is stale when this has changed.
  std::uint64_t blocks_begun() const { return blocks_begun_; }
  unsigned thread_number() const { return current_->number; }

  void meet_block(const char* what, Place place) {
    Fiber& fiber = *current_;
    arrive(fiber, block_, what, place, threads_);
    if (block_.arrived < threads_) return suspend(State::in_block);
    block_.arrived = 0;
    for (unsigned i = 0; i < threads_; ++i) fibers_[i]->state = State::ready;
  }

  void* shared(Place place) {
    if (!shared_) fail(concat("dynamic_shared at ", place, ", and the launch asks for no shared memory"));
    return shared_.get();
  }

  void copy_async(void* to, const void* from, bool valid) {
    current_->copies.push_back({to, valid ? from : nullptr, current_->groups});
    std::memset(to, 0xFF, 16);  // a device may write from here on
  }
  void copy_async_commit() { ++current_->groups; }
  void copy_async_wait(unsigned newest) {
    std::vector<Copy>& copies = current_->copies;
    std::size_t kept = 0;
    for (const Copy& copy : copies) {
      if (copy.group + newest >= current_->groups) {
        copies[kept++] = copy;
      } else if (copy.from != nullptr) {
        std::memcpy(copy.to, copy.from, 16);
      } else {
        std::memset(copy.to, 0, 16);
      }
    }
    copies.resize(kept);
  }

  /// throws DeviceError that names the current thread. Who enqueued the kernel names that.
  [[noreturn]] void fail(const std::string& why) const {
    throw DeviceError(concat("block ", index_text(blockIdx), ", thread ", index_text(current_->index), ": ", why));
  }

  void require_aligned(const void* p, std::size_t bytes, const char* what) const {
    if (reinterpret_cast<std::uintptr_t>(p) % bytes != 0) fail(concat(what, " at an address that is no multiple of ", bytes));
  }

 private:
  enum class State { ready, in_warp, in_warpgroup, in_block, in_condition, left };

  struct Meeting {
    unsigned arrived = 0;
    const char* what = nullptr;
    Place place{};
    const void* first = nullptr;  ///< the fiber that opened it
  };
  struct Warp {
    Meeting meeting;
    Lanes lanes{};
  };
  struct Warpgroup {
    Meeting meeting;
    WarpgroupThreads threads{};
  };
  struct Later {
    const char* what;
    Place place;
    std::function<void()> work;
  };
  struct Copy {
    void* to;
    const void* from;  ///< null: zeros
    std::uint64_t group;
  };
  struct Fiber {
    std::byte* stack = nullptr;
#if defined(__x86_64__)
    void* position = nullptr;
#else
    ucontext_t position{};
#endif
    void* fake_stack = nullptr;  ///< AddressSanitizer's
    unsigned number = 0;
    Index3 index{};
    State state = State::left;
    const char* waits_for = nullptr;
    Place place{};
    std::function<bool()> done{};  ///< what it waits for in State::in_condition
    std::vector<Copy> copies{};
    std::uint64_t groups = 0;  ///< committed
  };

  static constexpr std::size_t stack_bytes = std::size_t{128} * 1024;

  Engine() = default;

  std::size_t shared_offset(const void* p) const { return static_cast<std::size_t>(static_cast<const std::byte*>(p) - shared_.get()); }

  void run_block() {
    ++blocks_begun_;
    threads_ = shape_.block_x * shape_.block_y;
    shared_.reset(shape_.shared_bytes == 0 ? nullptr : new std::byte[shape_.shared_bytes]);
    if (shared_) std::memset(shared_.get(), 0xFF, shape_.shared_bytes);
    warps_.assign((threads_ + 31) / 32, Warp{});
    warpgroups_.clear();
    later_.clear();
    writer_.clear();
    block_ = {};
    while (fibers_.size() < threads_) fibers_.push_back(make_fiber());
    for (unsigned i = 0; i < threads_; ++i) begin(*fibers_[i], i);
    failure_ = nullptr;
    for (unsigned left = 0; left < threads_;) {
      const unsigned before = left;
      bool progress = false;
      for (unsigned i = 0; i < threads_ && !failure_; ++i) {
        Fiber& fiber = *fibers_[descending_ ? threads_ - 1 - i : i];
        if (fiber.state == State::in_condition && fiber.done()) fiber.state = State::ready;
        if (fiber.state != State::ready) continue;
        resume(fiber);
        progress = true;
        left += fiber.state == State::left;
      }
      if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
      if (progress || left != before) continue;
      if (later_.empty()) fail_to_meet();
      const auto next = descending_ ? later_.begin() : later_.end() - 1;
      const Later later = std::move(*next);
      later_.erase(next);
      later.work();
    }
    if (!later_.empty()) fail(concat("the block has ended, and what ", later_[0].what, " at ", later_[0].place, " began has not"));
  }

  void begin(Fiber& fiber, unsigned number) {
    fiber.number = number;
    fiber.index = {number % shape_.block_x, number / shape_.block_x, 0};
    fiber.state = State::ready;
    fiber.copies.clear();
    fiber.groups = 0;
    fiber.fake_stack = nullptr;
#if defined(M2LM_EMULATION_ASAN)
    __asan_unpoison_memory_region(fiber.stack, stack_bytes);  // a fiber that never ended has left its frames there
#endif
#if defined(__x86_64__)
    // What switch_stack pops: six registers, then the address that it returns to, then a return address of none, which keeps the stack
    // as a function finds it (16·n + 8) and ends backtraces.
    void** top = reinterpret_cast<void**>(fiber.stack + stack_bytes) - 8;
    for (int i = 0; i < 8; ++i) top[i] = nullptr;
    top[6] = reinterpret_cast<void*>(&Engine::enter);
    fiber.position = top;
#else
    getcontext(&fiber.position);
    fiber.position.uc_stack.ss_sp = fiber.stack;
    fiber.position.uc_stack.ss_size = stack_bytes;
    fiber.position.uc_link = nullptr;
    makecontext(&fiber.position, &Engine::enter, 0);
#endif
  }

  /// A page below each stack faults when it overflows.
  static std::unique_ptr<Fiber> make_fiber() {
    const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    void* memory = mmap(nullptr, stack_bytes + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory, page, PROT_NONE);
    auto fiber = std::make_unique<Fiber>();
    fiber->stack = static_cast<std::byte*>(memory) + page;
    return fiber;
  }

  /// The first function of a fiber. It never returns.
  static void enter() {
    Engine& engine = instance();
    engine.arrived_in_fiber(nullptr);
    try {
      engine.body_();
    } catch (...) {
      engine.failure_ = std::current_exception();
    }
    engine.suspend(State::left);
  }

#if defined(__x86_64__)
  /// Keeps the registers that a call preserves on the stack, its position in *from, and goes on at `to`.
  [[gnu::naked, gnu::noinline]] static void switch_stack([[maybe_unused]] void** from, [[maybe_unused]] void* to) {
    asm("pushq %rbp\n\tpushq %rbx\n\tpushq %r12\n\tpushq %r13\n\tpushq %r14\n\tpushq %r15\n\t"
        "movq %rsp, (%rdi)\n\tmovq %rsi, %rsp\n\t"
        "popq %r15\n\tpopq %r14\n\tpopq %r13\n\tpopq %r12\n\tpopq %rbx\n\tpopq %rbp\n\tret");
  }
  static void switch_position(void*& from, void*& to) { switch_stack(&from, to); }
#else
  static void switch_position(ucontext_t& from, ucontext_t& to) { swapcontext(&from, &to); }
#endif

  void resume(Fiber& fiber) {
    current_ = &fiber;
    threadIdx = fiber.index;
#if defined(M2LM_EMULATION_ASAN)
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(&fake_stack, fiber.stack, stack_bytes);
#endif
    switch_position(host_position_, fiber.position);
#if defined(M2LM_EMULATION_ASAN)
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
  }

  void suspend(State state) {
    Fiber& fiber = *current_;
    fiber.state = state;
#if defined(M2LM_EMULATION_ASAN)
    __sanitizer_start_switch_fiber(state == State::left ? nullptr : &fiber.fake_stack, host_stack_, host_stack_bytes_);
#endif
    switch_position(fiber.position, host_position_);
    arrived_in_fiber(fiber.fake_stack);
  }

  void arrived_in_fiber([[maybe_unused]] void* fake_stack) {
#if defined(M2LM_EMULATION_ASAN)
    __sanitizer_finish_switch_fiber(fake_stack, &host_stack_, &host_stack_bytes_);
#endif
  }

  void arrive(Fiber& fiber, Meeting& meeting, const char* what, Place place, unsigned expected) {
    fiber.waits_for = what;
    fiber.place = place;
    if (meeting.arrived == 0) {
      meeting = {0, what, place, &fiber};
    } else if (meeting.what != what || !(meeting.place == place)) {
      const Fiber& first = *static_cast<const Fiber*>(meeting.first);
      fail(concat("it is in ", what, " at ", place, ", and thread ", index_text(first.index), " waits for it in ", meeting.what, " at ",
                  meeting.place, ": all ", expected, " threads have to meet at one place"));
    }
    ++meeting.arrived;
  }

  /// Nobody can run, and not all have left.
  [[noreturn]] void fail_to_meet() {
    const Fiber* waiting = nullptr;
    const Fiber* missing = nullptr;
    for (unsigned i = 0; i < threads_ && waiting == nullptr; ++i)
      if (fibers_[i]->state == State::in_warp) waiting = fibers_[i].get();
    for (const State state : {State::in_warpgroup, State::in_block, State::in_condition})
      for (unsigned i = 0; i < threads_ && waiting == nullptr; ++i)
        if (fibers_[i]->state == state) waiting = fibers_[i].get();
    current_ = const_cast<Fiber*>(waiting);
    if (waiting->state == State::in_condition) fail(concat("it waits in ", waiting->waits_for, " at ", waiting->place, " for what nobody does"));
    const unsigned together = waiting->state == State::in_warp ? 32 : waiting->state == State::in_warpgroup ? 128 : threads_;
    for (unsigned i = 0; i < threads_ && missing == nullptr; ++i)
      if (fibers_[i]->state != waiting->state && i / together == waiting->number / together) missing = fibers_[i].get();
    fail(
        concat("it waits in ", waiting->waits_for, " at ", waiting->place, " for thread ", index_text(missing->index), ", which ",
               missing->state == State::left ? std::string("has left the kernel") : concat("waits in ", missing->waits_for, " at ", missing->place)));
  }

  std::mutex mutex_;
  LaunchShape shape_{};
  std::function<void()> body_;
  bool descending_ = true;
  unsigned threads_ = 0;
  std::unique_ptr<std::byte[]> shared_;
  std::vector<std::unique_ptr<Fiber>> fibers_;  ///< kept, with their stacks, for the next block
  std::vector<Warp> warps_;
  std::vector<Warpgroup> warpgroups_;
  std::vector<Later> later_;
  std::vector<unsigned> writer_;  ///< of each 16 bytes of shared memory: a thread's number + 1, or 0; empty unless stores are watched
  std::uint64_t blocks_begun_ = 0;
  Meeting block_;
  Fiber* current_ = nullptr;
  std::exception_ptr failure_;
#if defined(__x86_64__)
  void* host_position_ = nullptr;
#else
  ucontext_t host_position_{};
#endif
#if defined(M2LM_EMULATION_ASAN)
  const void* host_stack_ = nullptr;
  std::size_t host_stack_bytes_ = 0;
#endif
};

/// The lanes of a warp exchange: `perform` sees the State of every lane.
template <class State>
void exchange(const char* what, Place place, State& mine, void (*perform)(const Lanes&)) {
  Engine::instance().meet_warp(what, place, &mine, perform);
}
template <class State>
State& of_lane(const Lanes& lanes, unsigned lane) {
  return *static_cast<State*>(lanes[lane]);
}

template <class T>
struct Moved {
  T value;
  unsigned source;  ///< the lane whose value is wanted
  T result;
};
template <class T>
T move_between_lanes(const char* what, Place place, T value, unsigned source) {
  Moved<T> mine{value, source, value};
  exchange(what, place, mine, [](const Lanes& lanes) {
    for (unsigned lane = 0; lane < 32; ++lane) {
      auto& moved = of_lane<Moved<T>>(lanes, lane);
      moved.result = of_lane<Moved<T>>(lanes, moved.source).value;
    }
  });
  return mine.result;
}

inline unsigned lane() { return (threadIdx.y * blockDim.x + threadIdx.x) % 32; }

}  // namespace emulation

/// Enqueues kernel(arguments…) with copies of the arguments. throws DeviceError naming the kernel and a shape that it cannot have.
template <class... Parameter>
void launch(Device& device, const char* name, void (*kernel)(Parameter...), const LaunchShape& shape, std::type_identity_t<Parameter>... arguments) {
  static_assert((std::is_trivially_copyable_v<Parameter> && ...), "m2lm: parameters of a kernel are copied byte by byte");
  emulation::enqueue(device, name, shape, [=] { emulation::Engine::instance().run(shape, [=] { kernel(arguments...); }); });
}

// ---- values -----------------------------------------------------------------------------------------------------------------

inline float float_of_bits(std::uint32_t bits) { return std::bit_cast<float>(bits); }
inline std::uint32_t bits_of_float(float x) { return std::bit_cast<std::uint32_t>(x); }

inline float load(float x) { return x; }
inline float load(Half x) { return to_float(x); }
inline float load(Bf16 x) { return to_float(x); }

template <class E>
E store(float x) {
  if constexpr (std::is_same_v<E, float>) {
    return x;
  } else if constexpr (std::is_same_v<E, Half>) {
    return to_half(x);
  } else {
    static_assert(std::is_same_v<E, Bf16>, "m2lm: kernels have elements of float, Half and Bf16");
    return to_bf16(x);
  }
}

template <class E>
std::uint32_t pack(float low, float high) {
  static_assert(std::is_same_v<E, Half> || std::is_same_v<E, Bf16>, "m2lm: pack is for Half and Bf16");
  return store<E>(low).bits | static_cast<std::uint32_t>(store<E>(high).bits) << 16;
}

inline std::uint32_t and_or(std::uint32_t x, std::uint32_t mask, std::uint32_t bits) { return (x & mask) | bits; }
inline std::uint32_t and_xor(std::uint32_t x, std::uint32_t mask, std::uint32_t bits) { return (x & mask) ^ bits; }
inline std::uint32_t permute_bytes(std::uint32_t low, std::uint32_t high, std::uint32_t selector) {
  const std::uint64_t bytes = low | std::uint64_t{high} << 32;
  std::uint32_t out = 0;
  for (unsigned i = 0; i < 4; ++i) out |= static_cast<std::uint32_t>(bytes >> 8 * (selector >> 4 * i & 7U) & 0xffU) << 8 * i;
  return out;
}

template <class E>
std::uint32_t subtract_pairs(std::uint32_t a, std::uint32_t b) {
  const auto element = [](std::uint32_t word, unsigned i) { return to_float(E{static_cast<std::uint16_t>(word >> (16 * i) & 0xffffU)}); };
  return pack<E>(element(a, 0) - element(b, 0), element(a, 1) - element(b, 1));
}

inline float exp2_approx(float x) { return std::exp2(x); }
inline float rsqrt_approx(float x) { return 1.0F / std::sqrt(x); }
inline float fast_divide(float x, float y) { return x / y; }

namespace emulation {

/// Byte i of a register, signed.
inline std::int32_t byte_of(std::uint32_t word, unsigned i) { return static_cast<std::int8_t>(word >> (8 * i) & 0xffU); }

}  // namespace emulation

inline std::int32_t dot4(std::uint32_t a, std::uint32_t b, std::int32_t sum) {
  for (unsigned i = 0; i < 4; ++i) sum += emulation::byte_of(a, i) * emulation::byte_of(b, i);
  return sum;
}

// ---- memory -----------------------------------------------------------------------------------------------------------------

template <class T>
T* dynamic_shared(emulation::Place place = emulation::Place::here()) {
  return static_cast<T*>(emulation::Engine::instance().shared(place));
}

template <int Words>
void load_words(const void* p, std::uint32_t (&out)[Words]) {
  static_assert(Words == 1 || Words == 2 || Words == 4);
  emulation::Engine::instance().require_aligned(p, sizeof(out), "a load");
  std::memcpy(out, p, sizeof(out));
}
template <int Words>
void store_words(void* p, const std::uint32_t (&in)[Words]) {
  static_assert(Words == 1 || Words == 2 || Words == 4);
  emulation::Engine::instance().require_aligned(p, sizeof(in), "a store");
  emulation::Engine::instance().stored(p, sizeof(in));
  std::memcpy(p, in, sizeof(in));
}
inline Bytes16 load16_streaming(const void* p) {
  Bytes16 value{};
  load_words(p, value.words);
  return value;
}

template <class T>
T atomic_add(T* p, T value) {
  const T before = *p;
  *p = before + value;
  return before;
}

inline void copy_async16(void* shared, const void* global, bool valid = true) {
  emulation::Engine::instance().require_aligned(shared, 16, "copy_async16 to shared memory");
  emulation::Engine::instance().require_aligned(global, 16, "copy_async16 from global memory");
  emulation::Engine::instance().copy_async(shared, global, valid);
}
inline void copy_async_commit() { emulation::Engine::instance().copy_async_commit(); }
template <int N>
void copy_async_wait() {
  emulation::Engine::instance().copy_async_wait(N);
}

// ---- barriers and the warp --------------------------------------------------------------------------------------------------

inline void __syncthreads(emulation::Place place = emulation::Place::here()) { emulation::Engine::instance().meet_block("__syncthreads", place); }
inline void __syncwarp(emulation::Place place = emulation::Place::here()) {
  emulation::Engine::instance().meet_warp("__syncwarp", place, nullptr, [](const emulation::Lanes&) {});
}

template <class T>
T shuffle(T value, int lane, emulation::Place place = emulation::Place::here()) {
  return emulation::move_between_lanes("shuffle", place, value, static_cast<unsigned>(lane) % 32);
}
template <class T>
T shuffle_xor(T value, int mask, emulation::Place place = emulation::Place::here()) {
  return emulation::move_between_lanes("shuffle_xor", place, value, (emulation::lane() ^ static_cast<unsigned>(mask)) % 32);
}
template <class T>
T shuffle_down(T value, unsigned distance, emulation::Place place = emulation::Place::here()) {
  const unsigned lane = emulation::lane();
  return emulation::move_between_lanes("shuffle_down", place, value, lane + distance < 32 ? lane + distance : lane);
}
inline std::uint32_t ballot(bool predicate, emulation::Place place = emulation::Place::here()) {
  std::uint32_t mine = predicate;
  emulation::exchange("ballot", place, mine, [](const emulation::Lanes& lanes) {
    std::uint32_t bits = 0;
    for (unsigned i = 0; i < 32; ++i) bits |= emulation::of_lane<std::uint32_t>(lanes, i) << i;
    for (unsigned i = 0; i < 32; ++i) emulation::of_lane<std::uint32_t>(lanes, i) = bits;
  });
  return mine;
}

namespace emulation {

/// The registers of one lane in a product of matrices.
template <class D>
struct Fragments {
  D (&d)[4];
  const std::uint32_t (&a)[4];
  const std::uint32_t (&b)[2];
};

/// d [16, 8] += a [16, K]·b [K, 8], where a register holds `PerRegister` elements that element(register, i) reads. PTX ISA, fragments of
/// mma.m16n8k16 and m16n8k32: with g = lane / 4 and t = lane mod 4, registers 0 and 2 of a are row g, 1 and 3 row g + 8; registers 0 and 1
/// begin at column PerRegister·t, 2 and 3 half of K later; register i of b begins at row PerRegister·t + i·K/2 of column g; d is rows g
/// (0, 1) and g + 8 (2, 3), columns 2·t and 2·t + 1. Summed in Sum, rounded once.
template <int K, int PerRegister, class Sum, class D, class Element>
void multiply_fragments(const Lanes& lanes, Element element) {
  Sum a[16][K], b[K][8];
  for (unsigned lane = 0; lane < 32; ++lane) {
    const auto& of = of_lane<Fragments<D>>(lanes, lane);
    const unsigned g = lane / 4, t = lane % 4;
    for (unsigned i = 0; i < PerRegister; ++i) {
      for (unsigned r = 0; r < 4; ++r) a[g + r % 2 * 8][t * PerRegister + i + r / 2 * K / 2] = element(of.a[r], i);
      for (unsigned r = 0; r < 2; ++r) b[t * PerRegister + i + r * K / 2][g] = element(of.b[r], i);
    }
  }
  for (unsigned lane = 0; lane < 32; ++lane) {
    const auto& of = of_lane<Fragments<D>>(lanes, lane);
    for (unsigned i = 0; i < 4; ++i) {
      const unsigned row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      Sum sum = of.d[i];
      for (unsigned k = 0; k < K; ++k) sum += a[row][k] * b[k][column];
      of.d[i] = static_cast<D>(sum);
    }
  }
}

template <class E>
double half_of_register(std::uint32_t word, unsigned i) {
  return to_float(E{static_cast<std::uint16_t>(word >> (16 * i) & 0xffffU)});
}

struct LoadedMatrices {
  const void* row;
  std::uint32_t (&r)[4];
};
template <bool Transposed>
void load_matrices(const Lanes& lanes) {
  for (unsigned lane = 0; lane < 32; ++lane) {
    for (unsigned matrix = 0; matrix < 4; ++matrix) {
      std::uint32_t word = 0;
      for (unsigned i = 0; i < 2; ++i) {
        const unsigned row = Transposed ? lane % 4 * 2 + i : lane / 4, column = Transposed ? lane / 4 : lane % 4 * 2 + i;
        std::uint16_t element = 0;
        std::memcpy(&element, static_cast<const std::byte*>(of_lane<LoadedMatrices>(lanes, matrix * 8 + row).row) + 2 * column, 2);
        word |= static_cast<std::uint32_t>(element) << (16 * i);
      }
      of_lane<LoadedMatrices>(lanes, lane).r[matrix] = word;
    }
  }
}

}  // namespace emulation

template <class E>
void mma_16x8x16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2], emulation::Place place = emulation::Place::here()) {
  static_assert(std::is_same_v<E, Half> || std::is_same_v<E, Bf16>, "m2lm: mma_16x8x16 is for Half and Bf16");
  emulation::Fragments<float> mine{d, a, b};
  emulation::exchange("mma_16x8x16", place, mine, [](const emulation::Lanes& lanes) {
    emulation::multiply_fragments<16, 2, double, float>(lanes, &emulation::half_of_register<E>);
  });
}

inline void mma_16x8x32_s8(std::int32_t (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
                           emulation::Place place = emulation::Place::here()) {
  emulation::Fragments<std::int32_t> mine{d, a, b};
  emulation::exchange("mma_16x8x32_s8", place, mine, [](const emulation::Lanes& lanes) {
    emulation::multiply_fragments<32, 4, std::int32_t, std::int32_t>(lanes, &emulation::byte_of);
  });
}

inline void load_matrix_x4(std::uint32_t (&r)[4], const void* row_address, emulation::Place place = emulation::Place::here()) {
  emulation::Engine::instance().require_aligned(row_address, 16, "load_matrix_x4");
  emulation::LoadedMatrices mine{row_address, r};
  emulation::exchange("load_matrix_x4", place, mine, &emulation::load_matrices<false>);
}
inline void load_matrix_x4_transposed(std::uint32_t (&r)[4], const void* row_address, emulation::Place place = emulation::Place::here()) {
  emulation::Engine::instance().require_aligned(row_address, 16, "load_matrix_x4_transposed");
  emulation::LoadedMatrices mine{row_address, r};
  emulation::exchange("load_matrix_x4_transposed", place, mine, &emulation::load_matrices<true>);
}

}  // namespace m2lm::cuda

#endif  // !defined(__CUDACC__)
