// A plain build, -O3 without -march, runs the kernels of the machine: asked of the operating system's list of flags and of the symbols that
// the kernel table points to, not of the library's own detection.
#include <m2lm/core.hpp>

#include <cstdio>
#include <fstream>
#include <set>
#include <sstream>
#include <string>

#include <dlfcn.h>
#if M2LM_X86_64
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

using namespace m2lm;

std::set<std::string> flags_of_the_system() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    if (!line.starts_with("flags")) continue;
    std::istringstream words(line.substr(line.find(':') + 1));
    std::set<std::string> out;
    for (std::string word; words >> word;) out.insert(word);
    return out;
  }
  return {};
}

bool tiles_granted() {
#if M2LM_X86_64 && defined(SYS_arch_prctl)
  return syscall(SYS_arch_prctl, 0x1023, 18) == 0;  // ARCH_REQ_XCOMP_PERM, XTILEDATA
#else
  return false;
#endif
}

int failures = 0;

/// The function at `kernel` lies in namespace `name` (mangled: its length comes first, so that one name is no beginning of another).
template <class F>
void expect(const char* what, F* kernel, const std::string& name) {
  const std::string part = std::to_string(name.size()) + name;
  Dl_info information{};
  const bool found = dladdr(reinterpret_cast<void*>(kernel), &information) != 0 && information.dli_sname != nullptr;
  const std::string symbol = found ? information.dli_sname : "no symbol";
  const bool right = symbol.find(part) != std::string::npos;
  if (!right) ++failures;
  std::printf("%s %s: %s, expected %s\n", right ? "ok    " : "FAILED", what, symbol.c_str(), part.c_str());
}

}  // namespace

int main() {
  const std::set<std::string> flags = flags_of_the_system();
  const auto has = [&](std::initializer_list<const char*> names) {
    for (const char* name : names)
      if (!flags.contains(name)) return false;
    return true;
  };
  std::string level = "baseline";
  if (has({"avx2", "fma", "f16c"})) level = "avx2";
  if (level == "avx2" && has({"avx512f", "avx512bw", "avx512dq", "avx512vl"})) level = "avx512";
  if (level == "avx512" && has({"avx512_bf16", "avx512_vnni"})) level = "avx512_bf16";
  const bool tiles = level == "avx512_bf16" && has({"amx_tile", "amx_bf16", "amx_int8"}) && tiles_granted();

  const Cpu cpu(CpuOptions{.threads = 1});
  const std::string chosen(isa_name(cpu.isa())), wanted = tiles ? "amx" : level;
  std::printf("%s level %s, expected %s\n", chosen == wanted ? "ok    " : "FAILED", chosen.c_str(), wanted.c_str());
  failures += chosen != wanted ? 1 : 0;

  // The namespaces of kernels are named after their levels; where there are tiles, products of bf16 and of bytes go through them.
  const detail::KernelTable& kernels = cpu.kernels();
  expect("rms_norm", kernels.rms_norm, "cpu_" + level);
  expect("f32 gemm", kernels.f32.gemm, "cpu_" + level);
  expect("bf16 gemm", kernels.bf16.gemm, tiles ? "amx" : "cpu_" + level);
  const bool vnni = has({"avx512_vnni"}) || (level == "avx2" && has({"avx_vnni"}));
  for (const DType format : {DType::q8, DType::q4, DType::q4_128, DType::w8a8})
    expect(std::string(dtype_name(format)).c_str(), kernels.format(format)->gemm, tiles ? "amx" : vnni ? "vnni" : level == "baseline" ? "floats" : "shorts");
  // A prompt multiplies blocks of 32 as bf16 where that is faster.
  for (const DType format : {DType::q8, DType::q4})
    expect(("prefill " + std::string(dtype_name(format))).c_str(), kernels.format(format, Phase::prefill)->gemm,
           tiles ? "DequantisedProducts" : vnni ? "vnni" : level == "baseline" ? "floats" : "shorts");
  return failures == 0 ? 0 : 1;
}
