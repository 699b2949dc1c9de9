// Saving under faults: a full disk, a failing disk, short writes, and kill -9 at a thousand moments. The old file or the new one is
// there, whole. write, fsync, rename and close are interposed here; everything else is the library's own way.
#include <m2lm/io/directory.hpp>
#include <m2lm/io/file.hpp>
#include <m2lm/io/safetensors.hpp>

#include <doctest/doctest.h>

#include <support.hpp>

#include <fcntl.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

namespace {

/// What the interposed calls do, and what they saw. Only the test's own thread writes files.
struct Faulty {
  bool on = false;
  std::vector<std::string> calls = {};  // "write", "fsync file", "close", "rename", "fsync directory"
  int fail_at = -1, error = 0;     // this call fails so
  std::size_t at_most = 0;         // bytes that a write takes; 0 = all
  int interrupt_every = 0;         // every so many calls a write is interrupted
} faulty;

/// True when this call shall fail; errno is then set.
bool fails(const char* what) {
  if (!faulty.on) return false;
  const int now = static_cast<int>(faulty.calls.size());
  faulty.calls.emplace_back(what);
  if (now != faulty.fail_at) return false;
  errno = faulty.error;
  return true;
}

}  // namespace

extern "C" {
ssize_t write(int file, const void* bytes, std::size_t n) {
  if (faulty.on && file > 2) {
    if (faulty.interrupt_every > 0 && faulty.calls.size() % static_cast<std::size_t>(faulty.interrupt_every) == 1) {
      faulty.calls.emplace_back("interrupted");
      errno = EINTR;
      return -1;
    }
    if (fails("write")) return -1;
    if (faulty.at_most > 0) n = std::min(n, faulty.at_most);
  }
  return syscall(SYS_write, file, bytes, n);
}
int fsync(int file) {
  struct stat status {};
  const bool directory = ::fstat(file, &status) == 0 && S_ISDIR(status.st_mode);
  if (fails(directory ? "fsync directory" : "fsync file")) return -1;
  return static_cast<int>(syscall(SYS_fsync, file));
}
int close(int file) {
  const int done = static_cast<int>(syscall(SYS_close, file));
  return fails("close") ? -1 : done;
}
int rename(const char* from, const char* to) noexcept {
  if (fails("rename")) return -1;
  return static_cast<int>(syscall(SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, 0U));
}
}

namespace {

using m2lm::AnyTensor;
using m2lm::CapacityError;
using m2lm::InputError;
using m2lm::NamedTensor;
using m2lm::Safetensors;
using m2lm::Shape;
using m2lm::Tensor;
using m2lm_test::has;
using m2lm_test::message_of;

/// Tensors all of whose elements say which version of the checkpoint this is.
std::vector<NamedTensor> version(float number, int tensors, std::int64_t elements) {
  std::vector<NamedTensor> out;
  for (int i = 0; i < tensors; ++i) {
    Tensor<float> values(Shape{elements});
    std::fill(values.span().begin(), values.span().end(), number);
    out.push_back({"tensor" + std::to_string(i), AnyTensor(std::move(values))});
  }
  return out;
}

/// The version of a whole file; -1 when it cannot be read, -2 when it is a mixture.
float version_of(const std::string& path) {
  try {
    const Safetensors file = Safetensors::open(path);
    const auto first = static_cast<float>(file.tensor(file.names()[0]).at(0));
    for (const std::string& name : file.names()) {
      const Tensor<float> values = file.tensor(name).to<float>();
      if (std::any_of(values.data(), values.data() + values.elements(), [&](float x) { return x != first; })) return -2;
    }
    return first;
  } catch (const m2lm::Error&) {
    return -1;
  }
}

std::size_t files_in(const std::string& directory) {
  return static_cast<std::size_t>(std::distance(std::filesystem::directory_iterator(directory), std::filesystem::directory_iterator{}));
}

/// Switches the faults on for a scope.
struct Armed {
  explicit Armed(const Faulty& how) {
    faulty = how;
    faulty.calls.reserve(100000);
    faulty.on = true;
  }
  ~Armed() { faulty.on = false; }
  Armed(const Armed&) = delete;
  Armed& operator=(const Armed&) = delete;
};

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr int kills = 150;  // a fork takes ten times as long
#else
constexpr int kills = 1000;
#endif

/// tmpfs where there is one: what a killed process leaves does not depend on the disk, and a thousand fsyncs on a disk take minutes.
struct Directory {
  std::string path;
  Directory() : path(access("/dev/shm", W_OK) == 0 ? "/dev/shm/m2lm-save-XXXXXX" : "/tmp/m2lm-save-XXXXXX") { REQUIRE(mkdtemp(path.data()) != nullptr); }
  ~Directory() { std::filesystem::remove_all(path); }
  Directory(const Directory&) = delete;
  Directory& operator=(const Directory&) = delete;
};

/// Forks; the child runs `save` and is killed `microseconds` after it began. True when it was killed before it was done.
template <class F>
bool kill_while(std::int64_t microseconds, F&& save) {
  const pid_t child = fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    sigevent event{};
    event.sigev_notify = SIGEV_SIGNAL;
    event.sigev_signo = SIGKILL;
    timer_t timer{};
    itimerspec when{};
    when.it_value.tv_sec = static_cast<time_t>(microseconds / 1000000);
    when.it_value.tv_nsec = static_cast<long>(microseconds % 1000000 * 1000) + 1;
    if (timer_create(CLOCK_MONOTONIC, &event, &timer) != 0 || timer_settime(timer, 0, &when, nullptr) != 0) _exit(1);
    save();
    _exit(0);
  }
  int status = 0;
  REQUIRE(waitpid(child, &status, 0) == child);
  if (!WIFSIGNALED(status)) REQUIRE(WEXITSTATUS(status) == 0);
  return WIFSIGNALED(status);
}

/// Random moments over about twice as long as a save takes now, which follows the machine's load: half of the saves are killed.
class Moments {
  std::mt19937 random_{1};
  double span_ = 300;

 public:
  template <class F>
  bool kill_while(F&& save) {
    const bool killed = ::kill_while(static_cast<std::int64_t>(random_() % static_cast<std::uint64_t>(span_)), save);
    span_ = std::clamp(span_ * (killed ? 1.05 : 1 / 1.05), 20.0, 1e6);
    return killed;
  }
  double span() const { return span_; }
};

}  // namespace

TEST_CASE("a file is on the disk before it gets its name, and its name is before commit returns") {
  const m2lm_test::TemporaryDirectory directory;
  std::vector<std::string> calls;
  {
    const Armed armed{Faulty{}};
    m2lm::write_safetensors(directory / "model.safetensors", version(1, 3, 100), {});
    calls = faulty.calls;
  }
  const auto at = [&](const char* what) { return std::find(calls.begin(), calls.end(), what) - calls.begin(); };
  const auto last_write = calls.rend() - std::find(calls.rbegin(), calls.rend(), "write") - 1;
  CHECK(at("write") < at("fsync file"));
  CHECK(last_write < at("fsync file"));
  CHECK(at("fsync file") < at("rename"));
  CHECK(at("rename") < at("fsync directory"));
  CHECK(at("fsync directory") < static_cast<std::ptrdiff_t>(calls.size()));
}

TEST_CASE("each call of a save fails in turn: the old file or the new one is there, whole, and nothing beside it") {
  const m2lm_test::TemporaryDirectory directory;
  const std::string path = directory / "model.safetensors";
  m2lm::write_safetensors(path, version(1, 3, 100), {});
  int calls = 0;
  {
    const Armed armed{Faulty{}};
    m2lm::write_safetensors(path, version(1, 3, 100), {});
    calls = static_cast<int>(faulty.calls.size());
  }
  REQUIRE(calls >= 8);
  int kept = 0, replaced = 0;
  for (const int error : {ENOSPC, EIO, EDQUOT})
    for (int fail_at = 0; fail_at < calls; ++fail_at) {
      CAPTURE(error);
      CAPTURE(fail_at);
      m2lm::write_safetensors(path, version(1, 3, 100), {});
      const std::vector<NamedTensor> next = version(2, 3, 100);
      std::string capacity, input, failed;
      {
        const Armed armed{Faulty{.fail_at = fail_at, .error = error}};
        try {
          m2lm::write_safetensors(path, next, {});
        } catch (const CapacityError& e) {
          capacity = e.what();
        } catch (const InputError& e) {
          input = e.what();
        }
        failed = faulty.calls[static_cast<std::size_t>(fail_at)];
      }
      CAPTURE(failed);
      const float found = version_of(path);
      CHECK((found == 1 || found == 2));
      CHECK(files_in(directory.path()) == 1);
      ++(found == 1 ? kept : replaced);
      // The last close is that of the directory: it tells nothing about the file.
      const bool harmless = failed == "close" && found == 2;
      if (harmless) continue;
      CHECK(found == (failed == "fsync directory" ? 2 : 1));
      const std::string& message = error == EIO ? input : capacity;
      CHECK(has(message, path));
      CHECK(has(message, error == ENOSPC ? "No space left" : error == EIO ? "Input/output error" : "quota"));
      if (error != EIO) CHECK(has(message, "free some space"));
    }
  CHECK(kept > 10);
  CHECK(replaced >= 3);
}

TEST_CASE("short and interrupted writes make the same file") {
  const m2lm_test::TemporaryDirectory directory;
  const std::vector<NamedTensor> tensors = version(3, 3, 500);
  m2lm::write_safetensors(directory / "whole", tensors, {});
  for (const std::size_t at_most : {std::size_t{1}, std::size_t{7}, std::size_t{1000}}) {
    {
      const Armed armed{Faulty{.at_most = at_most, .interrupt_every = 3}};
      m2lm::write_safetensors(directory / "pieces", tensors, {});
      CHECK(faulty.calls.size() > 6000 / at_most);
    }
    CHECK(m2lm::read_file(directory / "pieces") == m2lm::read_file(directory / "whole"));
  }
}

TEST_CASE("kill -9 at a thousand random moments of a save") {
  const Directory directory;
  const std::string path = directory.path + "/model.safetensors";
  const std::vector<NamedTensor> old_tensors = version(1, 24, 4096), new_tensors = version(2, 24, 4096);
  const auto save = [&] { m2lm::write_safetensors(path, new_tensors, {}); };
  Moments moments;
  int old_found = 0, new_found = 0, killed = 0, torn = 0, leftovers = 0;
  m2lm::write_safetensors(path, old_tensors, {});
  for (int i = 0; i < kills; ++i) {
    if (version_of(path) != 1) m2lm::write_safetensors(path, old_tensors, {});
    killed += moments.kill_while(save);
    const float found = version_of(path);
    old_found += found == 1;
    new_found += found == 2;
    torn += found < 0;
    // What a killed process leaves has another name, and is no part of a checkpoint.
    for (const auto& entry : std::filesystem::directory_iterator(directory.path))
      if (entry.path() != path) {
        ++leftovers;
        CHECK(entry.path().extension() == ".part");
        std::filesystem::remove(entry.path());
      }
  }
  std::printf("%d saves, killed within about %.0f us: %d before they were done; old file %d, new file %d, torn %d, unfinished parts %d\n", kills,
              moments.span(), killed, old_found, new_found, torn, leftovers);
  CHECK(torn == 0);
  CHECK(old_found + new_found == kills);
  CHECK(killed > kills / 5);
  CHECK(old_found > kills / 20);
  CHECK(new_found > kills / 20);
  CHECK(leftovers > 0);  // else the moments lie beside the writing

  // The check itself: a save that writes in place is seen to leave torn files.
  int torn_in_place = 0;
  const std::string bytes = m2lm::read_file(path);
  for (int i = 0; i < kills / 5; ++i)
    if (moments.kill_while([&] {
          const int file = open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600);
          for (std::size_t at = 0; at < bytes.size(); at += 4096) (void)!write(file, bytes.data() + at, std::min<std::size_t>(4096, bytes.size() - at));
          close(file);
        }))
      torn_in_place += version_of(path) < 0;
  CHECK(torn_in_place > 0);
}

TEST_CASE("kill -9 while a whole directory is replaced: all old files or all new ones, and the user's own file is never lost") {
  const Directory directory;
  const std::string target = directory.path + "/checkpoint";
  const auto write = [&](float number) {
    m2lm::DirectoryWriter writer(target);
    m2lm::write_file(writer / "config.json", std::to_string(number));
    m2lm::write_safetensors(writer / "model-1.safetensors", version(number, 4, 4096), {});
    m2lm::write_safetensors(writer / "model-2.safetensors", version(number, 4, 4096), {});
    writer.commit([](std::string_view name) { return name != "notes.txt"; });
  };
  const auto state = [&] {  // the version of the directory, or -2 for a mixture
    const float first = version_of(target + "/model-1.safetensors"), second = version_of(target + "/model-2.safetensors");
    return first == second && m2lm::read_file(target + "/config.json") == std::to_string(first) ? first : -2;
  };
  write(1);
  Moments moments;
  int old_found = 0, new_found = 0, mixed = 0, set_aside = 0;
  for (int i = 0; i < kills / 2; ++i) {
    if (state() != 1) write(1);
    m2lm::write_file(target + "/notes.txt", "mine");
    moments.kill_while([&] { write(2); });
    const float found = state();
    old_found += found == 1;
    new_found += found == 2;
    mixed += found != 1 && found != 2;
    bool kept = m2lm::file_exists(target + "/notes.txt");
    for (const auto& entry : std::filesystem::directory_iterator(directory.path)) {
      if (entry.path() == target) continue;
      CHECK(entry.path().extension() == ".part");
      if (!kept && m2lm::file_exists(entry.path().string() + "/notes.txt")) {
        kept = true;
        ++set_aside;
      }
      std::filesystem::remove_all(entry.path());
    }
    CHECK(kept);
  }
  std::printf("%d saves of a directory: old %d, new %d, mixed %d, the user's file set aside %d\n", kills / 2, old_found, new_found, mixed, set_aside);
  CHECK(mixed == 0);
  CHECK(old_found > kills / 40);
  CHECK(new_found > kills / 40);
}
