// A system that starts no more threads is an error, not an abort.
// labels: no-sanitizer
#include <doctest/doctest.h>

#include <m2lm/core.hpp>

#include <cstring>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

TEST_CASE("more threads than the system starts") {
  if (m2lm::ThreadPool::available_cores() == 1) return;  // one core: the caller is all there is
  const pid_t child = fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    const rlimit limit{std::size_t{1} << 20, std::size_t{1} << 20};  // less than is in use already: no room for a stack
    setrlimit(RLIMIT_AS, &limit);
    try {
      m2lm::ThreadPool pool(1024);
    } catch (const m2lm::CapacityError& error) {
      _exit(std::strstr(error.what(), "threads the system starts") ? 0 : 2);
    } catch (...) {
      _exit(3);
    }
    _exit(4);
  }
  int status = 0;
  REQUIRE(waitpid(child, &status, 0) == child);
  CHECK(WIFEXITED(status));
  CHECK(WEXITSTATUS(status) == 0);
}
