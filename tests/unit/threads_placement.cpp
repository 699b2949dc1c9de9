// ThreadPool: where its threads run. One woken on the caller's core leaves it; masks are kept; who waits gives the core away.
// labels: serial
#include <doctest/doctest.h>

#include <m2lm/core.hpp>

#include <support.hpp>

#if defined(__linux__)

#include <atomic>

#include <sched.h>
#include <sys/resource.h>

namespace {

using namespace m2lm;

cpu_set_t affinity() {
  cpu_set_t set;
  REQUIRE(sched_getaffinity(0, sizeof(set), &set) == 0);
  return set;
}
/// For this thread. Returns when it runs on one of them.
void set_affinity(const cpu_set_t& set) { REQUIRE(sched_setaffinity(0, sizeof(set), &set) == 0); }
cpu_set_t only(int core) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(static_cast<std::size_t>(core), &set);
  return set;
}
/// The caller's own core for as long as this lives, so that the scheduler does not move it.
struct CallerStays {
  cpu_set_t before = affinity();
  int core = sched_getcpu();
  CallerStays() { set_affinity(only(core)); }
  ~CallerStays() { set_affinity(before); }
};

TEST_CASE("a thread woken on the caller's core leaves it, and keeps its affinity mask") {
  const cpu_set_t all = affinity();
  if (CPU_COUNT(&all) < 2 || ThreadPool::available_cores() < 2) return m2lm_test::skip("threads", "one core only");
  ThreadPool pool(2);
  const CallerStays caller;
  int together = 0;
  for (int i = 0; i < 50; ++i) {
    cpu_set_t before, after;
    pool.run([&](int part) {
      if (part == 0) return;
      before = affinity();
      set_affinity(only(caller.core));  // as after a rest, when the scheduler wakes it where it is woken from
      set_affinity(before);
    });
    pool.run([&](int part) {
      if (part == 0) return;
      if (sched_getcpu() == caller.core) ++together;
      after = affinity();
    });
    CHECK(CPU_EQUAL(&before, &after));
    CHECK(CPU_COUNT(&before) >= 2);
  }
  CHECK(together <= 5);  // the scheduler may have moved it back
}

/// Of all threads of this process.
double seconds_of_processor() {
  rusage used;
  REQUIRE(getrusage(RUSAGE_SELF, &used) == 0);
  const auto seconds = [](const timeval& t) { return static_cast<double>(t.tv_sec) + 1e-6 * static_cast<double>(t.tv_usec); };
  return seconds(used.ru_utime) + seconds(used.ru_stime);
}

TEST_CASE("threads confined to one core stay there, and who waits gives it to the other") {
  if (ThreadPool::available_cores() < 2) return m2lm_test::skip("threads", "one core only");
  ThreadPool pool(2);
  const CallerStays caller;
  pool.run([&](int part) {
    if (part != 0) set_affinity(only(caller.core));
  });
  const int runs = 200, spins = 12000;  // both together; a thread that always spins as long as it may takes 20000 for itself
  std::atomic<int> never{0};
  const double start = seconds_of_processor();
  for (int i = 0; i < runs * spins && never.load(std::memory_order_acquire) == 0; ++i) {
#if M2LM_X86_64
    __builtin_ia32_pause();
#endif
  }
  const double allowed = seconds_of_processor() - start;
  int elsewhere = 0;
  for (int i = 0; i < runs; ++i)
    pool.run([&](int) {
      if (sched_getcpu() != caller.core) ++elsewhere;
    });
  CHECK(elsewhere == 0);
  CHECK(seconds_of_processor() - start - allowed < allowed);
}

}  // namespace

#else

TEST_CASE("where threads run is known on Linux only") { m2lm_test::skip("threads", "no affinity masks on this system"); }

#endif
