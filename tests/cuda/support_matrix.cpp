// docs/support_matrix.md says which backend has which op, forward and backward, on which elements and in which formats of weights: asked
// of the backends here. With M2LM_UPDATE=1 in the environment the file is written instead.
// labels: emulated-only
#include <m2lm/testing/cuda_emulation_runtime.hpp>

#include <m2lm/m2lm.cuh>

#include <m2lm/backends/reference/reference.hpp>

#include <doctest/doctest.h>

#include <support.hpp>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <regex>
#include <span>
#include <string>
#include <vector>

namespace {

using namespace m2lm;

struct Row {
  std::string name;
  std::vector<std::string> ops, cells;
};

template <class B, class Forward, class... Backward>
std::string cell() {
  if constexpr (!ops::Implements<Forward, B>)
    return "–";
  else if constexpr (sizeof...(Backward) != 0 && (ops::Implements<Backward, B> && ...))
    return "forward, backward";
  else
    return "forward";
}

template <class Forward, class... Backward>
Row row(std::string name, std::vector<std::string> ops) {
  return {std::move(name),
          std::move(ops),
          {cell<Reference<double>, Forward, Backward...>(), cell<Cpu, Forward, Backward...>(), cell<BasicCuda<float>, Forward, Backward...>(),
           cell<BasicCuda<Half>, Forward, Backward...>(), cell<BasicCuda<Bf16>, Forward, Backward...>()}};
}

#define ROW(Forward) row<ops::Forward>(#Forward, {#Forward})
#define ROW2(Forward, Backward) row<ops::Forward, ops::Backward>(#Forward, {#Forward, #Backward})
#define ROW3(Forward, Backward, Other) row<ops::Forward, ops::Backward, ops::Other>(#Forward, {#Forward, #Backward, #Other})

std::vector<Row> rows() {
  return {ROW3(Linear, LinearInputGradient, LinearWeightGradient),
          ROW2(RmsNorm, RmsNormBackward),
          ROW2(LayerNorm, LayerNormBackward),
          ROW2(Rope, RopeBackward),
          ROW2(Attention, AttentionBackward),
          ROW2(ActivationForward, ActivationBackward),
          ROW2(GatherRows, ScatterAddRows),
          ROW2(CrossEntropy, CrossEntropy),
          ROW(Pack),
          ROW(Patchify),
          ROW(AddRows),
          ROW(PlanKeyValues),
          ROW(AppendKeyValues),
          ROW(CopyKeyValues),
          ROW(CopyRows),
          ROW(RopeAngles),
          ROW(RopeAppend),
          ROW(AddToLength),
          ROW(SetLength),
          ROW(Sample),
          ROW(Replay),
          ROW(Upload),
          ROW(UploadValues),
          ROW(UploadTensor),
          ROW(Download)};
}

bool cpu_packs(DType format) {
  Cpu cpu{{.threads = 1}};
  Arena arena;
  Context<Cpu> ctx{cpu, arena};
  const AnyTensor weight(Tensor<float>({1, block_values}));
  try {
    ops::pack(ctx, std::span(&weight, 1), format);
    return true;
  } catch (const OptionError&) {
    return false;
  }
}

std::string line(const std::string& head, const std::vector<std::string>& cells) {
  std::string out = "| " + head + " |";
  for (const std::string& c : cells) out += " " + c + " |";
  return out + "\n";
}

std::string document() {
  std::string out =
      "# What each backend has\n\n"
      "Written by `tests/cuda/support_matrix.cpp` (`M2LM_UPDATE=1 build/dev/tests/cuda_support_matrix`); the test `cuda.support_matrix` fails when\n"
      "it is out of date. What is tested of it: `tests/unit/ops_*.cpp` on the CPU, `tests/cuda/*.cpp` on the emulated device. On a real one\n"
      "nothing has run so far ([cuda.md](cuda.md)).\n\n"
      "## Ops\n\n"
      "`Reference<T>` has any scalar, `Cpu` computes in f32, `BasicCuda<E>` has activations of E. Ops from CopyRows on are of backends with memory\n"
      "of their own; on the others the host does what they do.\n\n";
  out += line("op", {"Reference", "Cpu", "Cuda f32", "Cuda f16", "Cuda bf16"}) + "|---|---|---|---|---|---|\n";
  for (const Row& r : rows()) out += line(r.name, r.cells);
  out += "\n## Formats of weights\n\n`Reference` keeps them as T.\n\n";
  out += line("format", {"Cpu", "Cuda f32", "Cuda f16", "Cuda bf16"}) + "|---|---|---|---|---|\n";
  const auto mark = [](bool has) { return std::string(has ? "yes" : "–"); };
  for (const DType format : {DType::f32, DType::f16, DType::bf16, DType::q8, DType::q4, DType::q4_128, DType::w8a8})
    out += line(std::string(dtype_name(format)), {mark(cpu_packs(format)), mark(cuda::has_format<float>(format)),
                                                  mark(cuda::has_format<Half>(format)), mark(cuda::has_format<Bf16>(format))});
  return out;
}

std::string read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

}  // namespace

TEST_CASE("every op has its row") {
  std::string listed = " ";
  for (const Row& r : rows())
    for (const std::string& op : r.ops) listed += op + " ";
  const std::regex declaration("\nstruct (\\w+);");
  int declared = 0;
  for (const auto& entry : std::filesystem::directory_iterator(m2lm_test::source_file("include/m2lm/ops"))) {
    const std::string text = read(entry.path().string());
    for (std::sregex_iterator at(text.begin(), text.end(), declaration), end; at != end; ++at, ++declared) {
      INFO(entry.path().string(), ": ", (*at)[1].str());
      CHECK(listed.find(" " + (*at)[1].str() + " ") != std::string::npos);
    }
  }
  CHECK(declared >= 30);
}

TEST_CASE("docs/support_matrix.md is what the backends have") {
  const std::string path = m2lm_test::source_file("docs/support_matrix.md");
  if (std::getenv("M2LM_UPDATE")) std::ofstream(path, std::ios::binary) << document();
  CHECK(read(path) == document());
}
