// A decode step takes no lock and makes no system call but those by which threads wait for each other, and one woken on the caller's core leaves it:
// with one thread none at all.
// labels: no-sanitizer
#include "models_support.hpp"

#include <atomic>

#if defined(__GLIBC__) && M2LM_X86_64

#include <csignal>
#include <cstddef>

#include <dlfcn.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

namespace {
std::atomic<long> locks{0};
}  // namespace

// Takes the place of the C library's in the whole process.
extern "C" int pthread_mutex_lock(pthread_mutex_t* mutex) noexcept {
  using Lock = int (*)(pthread_mutex_t*);
  static const Lock next = reinterpret_cast<Lock>(dlsym(RTLD_NEXT, "pthread_mutex_lock"));
  locks.fetch_add(1, std::memory_order_relaxed);
  return next(mutex);
}

namespace {

using namespace m2lm_test;
namespace t = m2lm::testing;

/// What a process that was forked tells the test.
struct Told {
  std::atomic<int> refused{-1};  ///< number of a system call that was not allowed
  std::atomic<long> locks{-1};
  std::atomic<int> steps{0};
};
Told* told = nullptr;

void note_refused(int, siginfo_t* information, void*) {
  told->refused = information->si_syscall;
  _exit(1);
}

/// From here on every thread of the process may make these system calls and end; others raise SIGSYS.
void allow_only_waiting(bool waiting) {
  struct sigaction action {};
  action.sa_sigaction = note_refused;
  action.sa_flags = SA_SIGINFO;
  sigaction(SIGSYS, &action, nullptr);
  const auto load = [](std::size_t offset) { return sock_filter BPF_STMT(BPF_LD | BPF_W | BPF_ABS, static_cast<std::uint32_t>(offset)); };
  const auto allow_if = [](std::uint32_t number, unsigned char instructions_to_allow) {
    return sock_filter BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, number, instructions_to_allow, 0);
  };
  // With one thread the calls of waiting and of leaving a core are numbers that no call has.
  const std::uint32_t none = 0xFFFFFFFFU;
  sock_filter code[] = {load(offsetof(seccomp_data, nr)),
                        allow_if(waiting ? SYS_futex : none, 5),
                        allow_if(waiting ? SYS_sched_yield : none, 4),
                        allow_if(waiting ? SYS_sched_getaffinity : none, 3),
                        allow_if(waiting ? SYS_sched_setaffinity : none, 2),
                        allow_if(SYS_exit_group, 1),
                        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_TRAP),
                        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)};
  const sock_fprog program{static_cast<unsigned short>(std::size(code)), code};
  prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
  if (syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, &program) != 0) _exit(77);
}

/// The exit status of a process that runs `prepare`, and what prepare returns under the filter.
template <class Prepare>
int status_of(bool waiting, Prepare prepare) {
  told->refused = -1;
  told->locks = -1;
  told->steps = 0;
  const pid_t child = fork();
  if (child == 0) {
    const auto step = prepare();
    allow_only_waiting(waiting);
    const long before = locks;
    for (int i = 0; i < 100; ++i) {
      step();
      ++told->steps;
    }
    told->locks = locks - before;
    _exit(0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

struct Decoding {
  m2lm::LlamaConfig config;
  Cpu backend;
  m2lm::Arena arena;
  m2lm::Context<Cpu> ctx{backend, arena};
  m2lm::LlamaDecoder<>::On<Cpu, in_f32> decoder{config};
  std::optional<decltype(decoder.make_cache(ctx, DType::f32, 1))> cache;
  Tensor<float> h{Shape{1, config.hidden_size}}, logits{Shape{1, config.vocab_size}};

  Decoding(const std::string& directory, const m2lm::LlamaConfig& of, int threads, DType format) : config(of), backend({.threads = threads}) {
    const m2lm::Checkpoint checkpoint = m2lm::Checkpoint::open(directory);
    require_complete(load_parameters(decoder, checkpoint), directory);
    decoder.prepare(ctx, Precision{.weights = format}, {});
    cache.emplace(decoder.make_cache(ctx, format == DType::f32 ? DType::f32 : DType::bf16, 200));
  }
  void step() {
    const std::int32_t id = 5;
    const m2lm::SequenceRows<Cpu> rows{&*cache, 0, 1};
    decoder.embed_tokens.forward(ctx, std::span(&id, 1), h.view<2>());
    decoder.forward(ctx, h.view<2>(), std::span(&rows, 1));
    decoder.norm.forward(ctx, h.view<2>(), h.view<2>());
    decoder.head.forward(ctx, h.view<2>(), logits.view<2>());
  }
};

}  // namespace

TEST_CASE("a decoder's steps: no lock, and no system call but those of waiting threads") {
  told = new (mmap(nullptr, sizeof(Told), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0)) Told;
  // The filter refuses, and says what: without this nothing below means anything.
  const int refused = status_of(false, [] { return [] { static_cast<void>(getppid()); }; });
  if (refused == 77) return m2lm_test::skip("system calls", "seccomp is not allowed here");
  REQUIRE(refused == 1);
  REQUIRE(told->refused == SYS_getppid);
  static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
  REQUIRE(status_of(false, [] { return [] { pthread_mutex_lock(&mutex), pthread_mutex_unlock(&mutex); }; }) == 0);
  REQUIRE(told->locks == 100);

  const TemporaryDirectory directory;
  m2lm::LlamaConfig config = t::small_llama();
  config.hidden_size = 96;  // large enough for several threads to have something to do
  config.intermediate_size = 400;
  config.vocab_size = 600;
  t::write_synthetic_llama(directory.path(), config);
  for (const int threads : {1, 2, 3})
    for (const DType format : {DType::f32, DType::bf16, DType::q8, DType::q4}) {
      const int status = status_of(threads > 1, [&] {
        auto* decoding = new Decoding(directory.path(), config, threads, format);  // lives as long as the process
        for (int i = 0; i < 3; ++i) decoding->step();                              // the arena learns its size
        return [decoding] { decoding->step(); };
      });
      CAPTURE(threads);
      CAPTURE(static_cast<int>(format));
      CHECK(status == 0);
      CHECK(told->refused == -1);
      CHECK(told->steps == 100);
      CHECK(told->locks == 0);
    }
}

#else

TEST_CASE("system calls are watched on x86-64 Linux only") { m2lm_test::skip("system calls", "no filter for this system"); }

#endif
