// Which instruction-set level the CPU backend chooses, and how it is capped.
#include <doctest/doctest.h>

#include <m2lm/core.hpp>

#include <cstdio>
#include <cstdlib>
#include <optional>
#include <set>
#include <string>

namespace {

using namespace m2lm;

constexpr IsaLevel all_levels[] = {IsaLevel::baseline, IsaLevel::avx2, IsaLevel::avx512, IsaLevel::avx512_bf16, IsaLevel::amx};

/// Sets or removes M2LM_MAX_ISA for the life of the object.
class MaxIsa {
  std::optional<std::string> before_;

 public:
  explicit MaxIsa(const char* value) {
    if (const char* old = std::getenv("M2LM_MAX_ISA")) before_ = old;
    set(value);
  }
  ~MaxIsa() { set(before_ ? before_->c_str() : nullptr); }
  MaxIsa(const MaxIsa&) = delete;
  MaxIsa& operator=(const MaxIsa&) = delete;

 private:
  static void set(const char* value) {
    if (value)
      setenv("M2LM_MAX_ISA", value, 1);
    else
      unsetenv("M2LM_MAX_ISA");
  }
};

std::string name(IsaLevel level) { return std::string(isa_name(level)); }

TEST_CASE("without M2LM_MAX_ISA the level is the one that the machine has") {
  for (const char* unset : {static_cast<const char*>(nullptr), ""}) {
    const MaxIsa environment(unset);
    CHECK(name(default_isa()) == name(detect_isa()));
    CHECK(name(Cpu{}.isa()) == name(detect_isa()));
  }
  std::printf("level chosen on this machine: %s\n", name(detect_isa()).c_str());
}

TEST_CASE("M2LM_MAX_ISA caps the level, and never raises it") {
  for (const IsaLevel cap : all_levels) {
    const MaxIsa environment(name(cap).c_str());
    const IsaLevel expected = cap < detect_isa() ? cap : detect_isa();
    CHECK(name(default_isa()) == name(expected));
    CHECK(name(Cpu{}.isa()) == name(expected));
    for (const IsaLevel option : all_levels) {
      const Cpu cpu(CpuOptions{.threads = 1, .max_isa = option});
      CHECK(name(cpu.isa()) == name(option < expected ? option : expected));
      CHECK(cpu.kernels().level == cpu.isa());
    }
  }
}

TEST_CASE("M2LM_MAX_ISA with another value is an error that lists the levels") {
  for (const char* value : {"avx9000", "AVX2", "avx512 ", "0"}) {
    const MaxIsa environment(value);
    const std::string message =
        concat("m2lm: M2LM_MAX_ISA=", value, " names no level; the levels are baseline, avx2, avx512, avx512_bf16, amx");
    CHECK_THROWS_WITH_AS(default_isa(), message.c_str(), OptionError);
    CHECK_THROWS_AS(Cpu{}, OptionError);
  }
}

TEST_CASE("the level agrees with the operating system's list of flags") {
  std::FILE* file = std::fopen("/proc/cpuinfo", "r");
  if (!file || !M2LM_X86_64) {
    if (file) std::fclose(file);
    return;
  }
  std::string text;
  for (int c = 0; (c = std::fgetc(file)) != EOF;) text += static_cast<char>(c);
  std::fclose(file);
  const std::size_t begin = text.find("\nflags");
  if (begin == std::string::npos) return;
  const std::size_t end = text.find('\n', begin + 1);
  std::set<std::string> flags;
  std::string word;
  for (std::size_t i = text.find(':', begin) + 1; i <= end; ++i) {
    if (text[i] != ' ' && text[i] != '\n') {
      word += text[i];
    } else if (!word.empty()) {
      flags.insert(word);
      word.clear();
    }
  }
  const auto has = [&](std::initializer_list<const char*> names) {
    for (const char* n : names)
      if (!flags.contains(n)) return false;
    return true;
  };
  IsaLevel expected = IsaLevel::baseline;
  if (has({"avx2", "fma", "f16c"})) expected = IsaLevel::avx2;
  if (expected == IsaLevel::avx2 && has({"avx512f", "avx512bw", "avx512dq", "avx512vl"})) expected = IsaLevel::avx512;
  if (expected == IsaLevel::avx512 && has({"avx512_bf16", "avx512_vnni"})) expected = IsaLevel::avx512_bf16;
  // The list names what the kernel lets a process ask for; whether this one may (a container's filter) only asking tells.
  if (expected == IsaLevel::avx512_bf16 && has({"amx_tile", "amx_bf16", "amx_int8"}) && detect_isa() == IsaLevel::amx) expected = IsaLevel::amx;
  CHECK(name(detect_isa()) == name(expected));
}

TEST_CASE("options outside their range are errors that name the value") {
  CHECK_THROWS_WITH_AS(Cpu(CpuOptions{.threads = -1}), "m2lm: threads = -1: give 0 (one per core) or 1 to 1024", OptionError);
  CHECK_THROWS_AS(Cpu(CpuOptions{.threads = 1025}), OptionError);
  CHECK(Cpu(CpuOptions{.threads = 3}).threads() == 3);
  CHECK(Cpu(CpuOptions{.threads = 0}).threads() == ThreadPool::available_cores());
}

TEST_CASE("BF16 products: only at the levels that have them; by default where fast_bf16_dot says so") {
  for (const IsaLevel level : all_levels) {
    const Cpu with(CpuOptions{.threads = 1, .max_isa = level, .bf16_dot = true}), without(CpuOptions{.threads = 1, .max_isa = level, .bf16_dot = false});
    CHECK(with.kernels().bf16.bf16_activations == (with.isa() >= IsaLevel::avx512_bf16));
    CHECK_FALSE(without.kernels().bf16.bf16_activations);
    CHECK_FALSE(with.kernels().f32.bf16_activations);
  }
  const Cpu cpu(CpuOptions{.threads = 1});
  CHECK(cpu.kernels().bf16.bf16_activations == detail::fast_bf16_dot(cpu.isa()));
  CHECK(detail::fast_bf16_dot(IsaLevel::amx) == (M2LM_X86_64 == 1));
  CHECK_FALSE(detail::fast_bf16_dot(IsaLevel::avx512));
}

TEST_CASE("the kernel table has f32 and bf16 and no other format") {
  const Cpu cpu(CpuOptions{.threads = 1});
  CHECK(cpu.kernels().format(DType::f32) != nullptr);
  CHECK(cpu.kernels().format(DType::bf16) != nullptr);
  for (const DType other : {DType::f16, DType::f64, DType::i8, DType::native, DType::inherit}) CHECK(cpu.kernels().format(other) == nullptr);
}

}  // namespace
