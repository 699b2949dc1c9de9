// ThreadPool: persistent threads that run one function on every part of a piece of work.
// Floor: core. May include: config, core.
#pragma once

#include <m2lm/core/error.hpp>
#include <m2lm/core/function_ref.hpp>

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace m2lm::inline M2LM_ABI {

/// A fixed number of parts; the caller runs the first, other threads the rest. There are no more threads than cores, and with more parts
/// than those each thread runs several: threads that wait for a core of each other's would make every call wait for the scheduler.
/// Between calls the threads spin for a moment, then park. A thread that the system wakes on the caller's core moves to another of its affinity
/// mask, none is bound to a core; a caller that waits for a thread that has not begun parks soon, as that may be waiting for this core.
/// `run` may be called from several threads: a caller that finds the pool busy runs all parts itself, in order. No result may
/// depend on which thread runs a part, so both ways give the same bits.
class ThreadPool {
  int size_ = 1, runners_ = 1;  // runners: the threads there are, with the caller
  struct alignas(64) Begun {  // on a cache line of its own: the thread writes it each time, the caller seldom reads it
    std::atomic<std::uint32_t> epoch{0};
  };
  std::mutex busy_;
  std::vector<Begun> begun_;
  std::vector<std::thread> workers_;
  const FunctionRef<void(int)>* work_ = nullptr;
  std::atomic<std::uint32_t> epoch_{0};
  std::atomic<int> pending_{0};
  std::atomic<bool> stop_{false};
  int caller_core_ = -1;  // where `run` was called

 public:
  /// requires threads >= 0; 0 means one part per available core (affinity mask and container quota respected).
  /// throws OptionError for a number out of range, CapacityError when the system starts fewer.
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  /// Threads that share the work, the caller among them.
  int size() const { return size_; }
  /// Calls work(part) for part = 0 … size() - 1 and returns when all are done. `work` must not throw and must not call `run`.
  void run(FunctionRef<void(int)> work);

  /// Cores this process may use.
  static int available_cores();

 private:
  void worker(int index);
  bool all_began(std::uint32_t epoch) const;
  void run_parts_of(int index, FunctionRef<void(int)> work) const;
  void stop();
};

/// Part `part` of `parts` of the range [0, count), cut at multiples of `grain`.
struct Range {
  std::int64_t begin = 0, end = 0;
};
/// The part itself: parts differ by one grain at most, and the last ones may be empty.
constexpr Range split(std::int64_t count, int parts, int part, std::int64_t grain = 1) {
  const std::int64_t blocks = (count + grain - 1) / grain;
  const std::int64_t b = blocks * part / parts * grain, e = blocks * (part + 1) / parts * grain;
  return {b < count ? b : count, e < count ? e : count};
}

}  // namespace m2lm
