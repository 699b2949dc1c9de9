// Definitions of core/threads.hpp.
// Floor: core. May include: config, core.
#pragma once

#include <m2lm/core/threads.hpp>

#include <cstdio>
#include <system_error>

#if defined(__linux__)
#include <sched.h>
#endif

namespace m2lm::inline M2LM_ABI {

M2LM_IMPL int ThreadPool::available_cores() {
  int cores = static_cast<int>(std::thread::hardware_concurrency());
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) cores = CPU_COUNT(&set);
  // A container's share of the processors: "quota period" in microseconds, or "max period".
  if (std::FILE* file = std::fopen("/sys/fs/cgroup/cpu.max", "r")) {
    long long quota = 0, period = 0;
    if (std::fscanf(file, "%lld %lld", &quota, &period) == 2 && quota > 0 && period > 0) {
      const long long allowed = (quota + period - 1) / period;
      if (allowed < cores) cores = static_cast<int>(allowed);
    }
    std::fclose(file);
  }
#endif
  return cores > 0 ? cores : 1;
}

M2LM_IMPL ThreadPool::ThreadPool(int threads) {
  require<OptionError>(threads >= 0 && threads <= 1024, "m2lm: threads = ", threads, ": give 0 (one per core) or 1 to 1024");
  const int cores = available_cores();
  size_ = threads ? threads : cores;
  runners_ = size_ < cores ? size_ : cores;
  try {
    begun_ = std::vector<Begun>(static_cast<std::size_t>(runners_ - 1));
    workers_.reserve(begun_.size());
    for (int index = 1; index < runners_; ++index) workers_.emplace_back([this, index] { worker(index); });
  } catch (const std::system_error& error) {
    const std::size_t started = workers_.size();
    stop();
    throw CapacityError(concat("m2lm: of ", runners_, " threads the system starts ", started + 1, " (", error.what(), "); ask for fewer"));
  } catch (const std::bad_alloc&) {
    stop();
    detail::throw_out_of_memory("the threads of a backend");
  }
}

M2LM_IMPL ThreadPool::~ThreadPool() { stop(); }

M2LM_IMPL void ThreadPool::stop() {
  stop_.store(true);
  epoch_.fetch_add(1);
  epoch_.notify_all();
  for (auto& w : workers_) w.join();
}

namespace detail {

// 0.2 to 0.8 milliseconds: longer than what one thread does alone in a decode step, and than a neighbour is late.
constexpr int patient_spins = 20000;
// 50 to 160 microseconds: a thread that has been woken on another core begins sooner. One that has not may be waiting for this core.
constexpr int spins_for_a_beginning = 4000;

inline void pause() {
#if M2LM_X86_64
  __builtin_ia32_pause();
#endif
}

/// Waits until `value` differs from `old`: spins, but not for long, as another program may want the core, then parks.
template <class T>
void wait_for_change(const std::atomic<T>& value, T old, int spins) {
  for (int i = 0; i < spins; ++i) {
    if (value.load(std::memory_order_acquire) != old) return;
    pause();
  }
  while (value.load(std::memory_order_acquire) == old) value.wait(old, std::memory_order_acquire);
}

/// Number of the core that this thread runs on, -1 where it is not known. No system call where the kernel shares it with the process.
inline int current_core() {
#if defined(__linux__)
  return sched_getcpu();
#else
  return -1;
#endif
}

/// Whether this thread runs on another core than that one. If not it moves to one of its affinity mask, if there is one, and has the same mask
/// afterwards; cores that the system gives the process later are not in it. Linux wakes a thread where it is woken from if it takes no other core
/// for idle, as in virtual machines whose idle cores the host runs something else on, and then lets both threads share that core for tens of
/// milliseconds.
inline bool leave_core(int core) {
  if (core < 0 || current_core() != core) return true;
#if defined(__linux__)
  cpu_set_t mask;
  if (core < CPU_SETSIZE && sched_getaffinity(0, sizeof(mask), &mask) == 0) {
    cpu_set_t others = mask;
    CPU_CLR(static_cast<std::size_t>(core), &others);
    // Fails, and leaves the thread where it is, if no core is left.
    if (sched_setaffinity(0, sizeof(others), &others) == 0) static_cast<void>(sched_setaffinity(0, sizeof(mask), &mask));
  }
#endif
  return current_core() != core;
}

}  // namespace detail

M2LM_IMPL void ThreadPool::run_parts_of(int index, FunctionRef<void(int)> work) const {
  const Range mine = split(size_, runners_, index);
  for (std::int64_t part = mine.begin; part < mine.end; ++part) work(static_cast<int>(part));
}

M2LM_IMPL bool ThreadPool::all_began(std::uint32_t epoch) const {
  for (const Begun& thread : begun_)
    if (thread.epoch.load(std::memory_order_relaxed) != epoch) return false;
  return true;
}

M2LM_IMPL void ThreadPool::worker(int index) {
  std::uint32_t seen = 0;
  for (bool apart = true;;) {
    detail::wait_for_change(epoch_, seen, apart ? detail::patient_spins : 0);  // else the caller waits for this core
    seen = epoch_.load(std::memory_order_acquire);
    if (stop_.load()) return;
    begun_[static_cast<std::size_t>(index - 1)].epoch.store(seen, std::memory_order_relaxed);
    apart = detail::leave_core(caller_core_);
    run_parts_of(index, *work_);
    if (pending_.fetch_sub(1, std::memory_order_acq_rel) == 1) pending_.notify_one();
  }
}

M2LM_IMPL void ThreadPool::run(FunctionRef<void(int)> work) {
  std::unique_lock lock(busy_, std::try_to_lock);
  if (runners_ == 1 || !lock.owns_lock()) {
    for (int part = 0; part < size_; ++part) work(part);
    return;
  }
  work_ = &work;
  caller_core_ = detail::current_core();
  pending_.store(runners_ - 1, std::memory_order_relaxed);
  const std::uint32_t epoch = epoch_.fetch_add(1, std::memory_order_release) + 1;
  epoch_.notify_all();
  run_parts_of(0, work);
  int left = pending_.load(std::memory_order_acquire);
  for (int i = 0; left != 0 && i < detail::spins_for_a_beginning; ++i, left = pending_.load(std::memory_order_acquire)) detail::pause();
  // Who began on another core needs no core of ours, who did not may be waiting for this one.
  const int spins = left == 0 || all_began(epoch) ? detail::patient_spins : 0;
  for (; left != 0; left = pending_.load(std::memory_order_acquire)) detail::wait_for_change(pending_, left, spins);
}

}  // namespace m2lm
