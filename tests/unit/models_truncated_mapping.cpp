// A checkpoint that is truncated while it is mapped: an error that names the file, never SIGBUS; other faults go where they went before.
// labels: threads
#include "models_support.hpp"

#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <csignal>
#include <cstring>
#include <thread>

namespace {

using namespace m2lm_test;
using m2lm::CheckpointError;
using m2lm::MappedFile;
using m2lm::NamedTensor;

namespace t = m2lm::testing;

void cut(const std::string& path, std::uintmax_t bytes) { std::filesystem::resize_file(path, bytes); }

// Not watched by ThreadSanitizer: that the handler of one thread puts zeros where another reads is what is tested.
__attribute__((no_sanitize("thread"))) std::size_t sum(std::span<const std::byte> bytes) {
  std::size_t out = 0;
  for (const std::byte b : bytes) out += std::to_integer<std::size_t>(b);
  return out;
}

/// What a child process ends with: its exit status, or minus the signal.
template <class F>
int outcome_of_child(F&& body) {
  const pid_t child = fork();
  REQUIRE(child >= 0);
  if (child == 0) _exit(body());
  int status = 0;
  REQUIRE(waitpid(child, &status, 0) == child);
  return WIFSIGNALED(status) ? -WTERMSIG(status) : WEXITSTATUS(status);
}

/// A mapping that the library knows nothing of, longer than its file.
const volatile char* foreign_mapping(const std::string& path) {
  const int file = open(path.c_str(), O_RDWR);
  void* p = mmap(nullptr, 1 << 16, PROT_READ, MAP_SHARED, file, 0);
  close(file);
  return static_cast<const volatile char*>(p);
}

}  // namespace

TEST_CASE("a mapped file that shrinks reads as zeros behind its end, and says so when asked") {
  const TemporaryDirectory directory;
  const std::string content(100000, 'x');
  for (const std::uintmax_t left : {std::uintmax_t{99999}, std::uintmax_t{50000}, std::uintmax_t{4096}, std::uintmax_t{1}, std::uintmax_t{0}}) {
    CAPTURE(left);
    const std::string path = directory.write("file", content), other_path = directory.write("other", content);
    const MappedFile file = MappedFile::open(path), other = MappedFile::open(other_path);
    CHECK(sum(file.bytes()) == 100000U * 'x');
    CHECK_NOTHROW(file.require_intact());
    cut(path, left);
    CHECK(sum(file.bytes()) == left * 'x');
    const std::string message = message_of<CheckpointError>([&] { file.require_intact(); });
    CHECK(has(message, path));
    CHECK(has(message, "truncated"));
    CHECK(has(message, "of 100000 bytes"));
    CHECK(sum(other.bytes()) == 100000U * 'x');
    CHECK_NOTHROW(other.require_intact());
  }
  // A file that shrank and grew again was read wrongly in between.
  const std::string path = directory.write("file", content);
  const MappedFile file = MappedFile::open(path);
  cut(path, 0);
  CHECK(sum(file.bytes()) == 0);
  cut(path, content.size());
  CHECK(has(message_of<CheckpointError>([&] { file.require_intact(); }), path));
}

TEST_CASE("many threads meet the end of many files at once") {
  const TemporaryDirectory directory;
  const std::string content(1 << 18, 'x');
  for (int round = 0; round < 5; ++round) {
    std::vector<MappedFile> files;
    for (int i = 0; i < 8; ++i) files.push_back(MappedFile::open(directory.write("file" + std::to_string(i), content)));
    std::atomic<bool> go{false};
    std::atomic<std::size_t> total{0};
    std::vector<std::thread> threads;
    for (std::size_t k = 0; k < 6; ++k)
      threads.emplace_back([&, k] {
        while (!go.load()) std::this_thread::yield();
        for (std::size_t i = 0; i < files.size(); ++i) total += sum(files[(i + k) % files.size()].bytes());
        for (int i = 0; i < 20; ++i) (void)MappedFile::open(directory / "file7");  // slots come and go meanwhile
      });
    for (std::size_t i = 0; i < 7; ++i) cut(directory / ("file" + std::to_string(i)), 1 << 14);
    go = true;
    for (std::thread& thread : threads) thread.join();
    CHECK(total.load() == 6U * 'x' * (7U * (1 << 14) + (1 << 18)));
    for (std::size_t i = 0; i < 7; ++i) CHECK_THROWS_AS(files[i].require_intact(), CheckpointError);
    CHECK_NOTHROW(files[7].require_intact());
  }
}

TEST_CASE("a checkpoint cut while it is loaded") {
  for (const int step : {1, 2}) {
    const TemporaryDirectory directory;
    m2lm::LlamaConfig config = t::small_llama();
    config.hidden_size = 64;
    config.vocab_size = 500;
    t::write_synthetic_llama(directory.path(), config);
    const std::string path = directory / "model.safetensors";
    const auto size = std::filesystem::file_size(path);
    for (const std::uintmax_t left : {std::uintmax_t{0}, std::uintmax_t{1000}, size / 2, size - 1}) {
      CAPTURE(left);
      t::write_synthetic_llama(directory.path(), config);
      int steps = 0;
      const auto damage = [&](double) {
        if (++steps == step) cut(path, left);
      };
      const std::string message = message_of<CheckpointError>([&] { Lm::from_pretrained(directory.path(), Cpu({.threads = 2}), {.progress = damage}); });
      CHECK(steps >= step);
      CHECK(has(message, path));
      CHECK(has(message, "truncated"));
    }
  }
}

TEST_CASE("a checkpoint cut while it is used: no token, and the session stands where it stood") {
  const TemporaryDirectory directory, whole;
  m2lm::LlamaConfig config = t::small_llama();
  config.vocab_size = 500;
  for (const TemporaryDirectory* d : {&directory, &whole}) t::write_synthetic_llama(d->path(), config);
  const Lm model = Lm::from_pretrained(directory.path()), other = Lm::from_pretrained(whole.path());
  const auto prompt = model.prompt(some_ids(20, config.vocab_size));
  auto session = model.session();
  const auto tokens = session.generate(prompt, {.max_new_tokens = 3, .ignore_eos = true}).tokens;
  REQUIRE(tokens.size() == 3);
  const std::int64_t length = session.length();
  const std::string path = directory / "model.safetensors";
  cut(path, 2000);
  for (const std::string& message :
       {message_of<CheckpointError>([&] { session.generate(prompt, {.max_new_tokens = 3}); }), message_of<CheckpointError>([&] { model.logits(prompt); }),
        message_of<CheckpointError>([&] { model.hidden_states(prompt); })}) {
    CHECK(has(message, path));
    CHECK(has(message, "truncated"));
  }
  CHECK(session.length() == length);
  CHECK(other.generate(other.prompt(some_ids(20, config.vocab_size)), {.max_new_tokens = 3, .ignore_eos = true}).tokens == tokens);
}

TEST_CASE("tensors of a file that was cut are not saved as if they were whole") {
  const TemporaryDirectory directory;
  t::write_synthetic_llama(directory.path());
  const std::string path = directory / "model.safetensors", target = directory.write("copy.safetensors", "old");
  for (const std::uintmax_t less : {std::uintmax_t{1}, std::uintmax_t{20000}}) {
    t::write_synthetic_llama(directory.path());
    const Safetensors file = Safetensors::open(path);
    std::vector<NamedTensor> tensors;
    for (const std::string& name : file.names()) tensors.push_back({name, file.tensor(name)});
    cut(path, file.bytes() - less);
    CHECK_THROWS_AS(m2lm::write_safetensors(target, tensors, {}), m2lm::Error);
    CHECK(m2lm::read_file(target) == "old");
  }
}

TEST_CASE("SIGBUS of others: the default ends the program, a handler that was there before is called") {
  const TemporaryDirectory directory;
  const std::string path = directory.write("short", "x"), own = directory.write("own", std::string(10000, 'x'));
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
  // The sanitizers have a handler of their own, which ends the program in another way.
  CHECK(outcome_of_child([&] {
          const MappedFile file = MappedFile::open(own);
          cut(own, 0);
          if (sum(file.bytes()) != 0) return 2;
          return static_cast<int>(foreign_mapping(path)[1 << 13]);
        }) == -SIGBUS);
  CHECK(outcome_of_child([&] {
          (void)MappedFile::open(own);
          raise(SIGBUS);
          return 3;
        }) == -SIGBUS);
#endif
  // The parent has installed the library's handler already; a child that starts anew is this program with an argument.
  CHECK(outcome_of_child([&] {
          std::string self = std::filesystem::read_symlink("/proc/self/exe").string(), filter = "--test-case=child*", skip = "--no-skip";
          char* arguments[] = {self.data(), filter.data(), skip.data(), nullptr};
          execv(self.c_str(), arguments);
          return 4;
        }) == 0);
}

TEST_CASE("child: a handler that was installed before the library's" * doctest::skip()) {
  static volatile std::sig_atomic_t seen = 0;
  static const volatile char* page = nullptr;
  struct sigaction action {};
  action.sa_sigaction = [](int, siginfo_t*, void*) {
    seen = seen + 1;
    mmap(const_cast<char*>(page), 1 << 16, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
  };
  action.sa_flags = SA_SIGINFO;
  REQUIRE(sigaction(SIGBUS, &action, nullptr) == 0);
  const TemporaryDirectory directory;
  const std::string path = directory.write("short", "x"), own = directory.write("own", std::string(10000, 'x'));
  const MappedFile file = MappedFile::open(own);
  cut(own, 0);
  CHECK(sum(file.bytes()) == 0);
  CHECK(seen == 0);
  page = foreign_mapping(path);
  CHECK(page[1 << 13] == 0);
  CHECK(seen == 1);
}
