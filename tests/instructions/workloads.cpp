// Small fixed workloads whose instructions check_instructions.py counts: one thread, fixed seeds. usage: instruction_workloads NAME
// Everything before the call of m2lm_counted_work is set-up and is not counted. Exit status 77: the level that is counted is not there.
#include "../../bench/workload.hpp"

#include <m2lm/core.hpp>
#include <m2lm/io/image.hpp>
#include <m2lm/io/image_processor.hpp>
#include <m2lm/io/tokenizer.hpp>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <span>
#include <string>
#include <string_view>
#include <vector>

/// callgrind collects while this runs.
extern "C" [[gnu::noinline]] void m2lm_counted_work(m2lm::FunctionRef<void()> work) {
  work();
  asm volatile("" ::: "memory");  // no tail call: the frame stays until the work is done
}

namespace {

using namespace m2lm;
using workload::Machine;
using workload::matrix;
using workload::values;

/// 64 rows of 512 normalised, and 8 heads of 64 rotated.
void rows(Machine& machine) {
  const Tensor<float> x = values(64, 512, 1), weight = values(1, 512, 2), cos = values(64, 32, 3), sin = values(64, 32, 4);
  Tensor<float> y(x.shape());
  m2lm_counted_work([&] {
    ops::rms_norm(machine.ctx, matrix(x), Vector<const float>(weight.data(), {512}), 1e-5, y.view<2>());
    ops::rope(machine.ctx, y.view<2>(), 64, matrix(cos), matrix(sin));
  });
}

/// 512 outputs of 512 inputs, for one row (as in decoding) and for 24.
void linear(Machine& machine, DType format) {
  const AnyTensor source(values(512, 512, 1));
  const PackedMatrix w = ops::pack(machine.ctx, std::span(&source, 1), format);
  const Tensor<float> x = values(24, 512, 2);
  Tensor<float> y(Shape{24, 512});
  const auto multiply = [&](std::int64_t m) {
    ops::linear(machine.ctx, Matrix<const float>(x.data(), {m, 512}), w, {}, Matrix<float>(y.data(), {m, 512}));
  };
  multiply(24);  // the arena learns its size
  m2lm_counted_work([&] {
    multiply(1);
    multiply(24);
  });
}

/// 48 queries of 8 heads over 48 keys of 2, causal, then one query over 200 keys; head_dim 64, bf16.
void attention(Machine& machine) {
  const KeyValuesPlan plan = ops::plan_key_values(machine.ctx, DType::bf16, 2, 64, 200);
  std::vector<std::byte> keys(plan.bytes), held(plan.bytes);
  const KeyValues kv{DType::bf16, 2, 64, plan.capacity, keys.data(), held.data()};
  const Tensor<float> q = values(48, 512, 1), k = values(200, 128, 2), v = values(200, 128, 3);
  Tensor<float> y(q.shape());
  const AttentionMask causal{.causal = true, .window = 0};
  const auto prefill = [&] {
    ops::append_key_values(machine.ctx, matrix(k), matrix(v), 0, kv);
    ops::attention(machine.ctx, matrix(q), kv, 48, 0, causal, 0.125, y.view<2>());
  };
  prefill();
  m2lm_counted_work([&] {
    prefill();
    ops::attention(machine.ctx, Matrix<const float>(q.data(), {1, 512}), kv, 200, 199, causal, 0.125, Matrix<float>(y.data(), {1, 512}));
  });
}

/// A text into ids, a picture into pixels.
void inputs() {
  const Tokenizer tokenizer = Tokenizer::from_directory("tests/golden/bpe/llama3");
  std::string text;
  for (int i = 0; i < 20; ++i) text += "How many green triangles are there, and why isn't it 12? \xC3\xA9\xE4\xB8\xAD\n";
  std::size_t ids = 0;
  m2lm_counted_work([&] {
    ids = tokenizer.encode(text).size();
    const Tensor<float> pixels = preprocess(load_image("tests/golden/images/rgb_200x150.png"), clip_image_processor(112));
    ids += static_cast<std::size_t>(pixels.elements());
  });
  std::printf("%zu\n", ids);
}

}  // namespace

int main(int argc, char** argv) {
  const std::string_view name = argc == 2 ? argv[1] : "";
  Machine machine({.threads = 1, .max_isa = IsaLevel::avx2});
  if (machine.cpu.isa() != IsaLevel::avx2) {
    std::printf("SKIPPED: no avx2 here\n");
    return 77;
  }
  if (name == "rows") rows(machine);
  else if (name == "linear_f32") linear(machine, DType::f32);
  else if (name == "linear_bf16") linear(machine, DType::bf16);
  else if (name == "linear_q8") linear(machine, DType::q8);
  else if (name == "linear_q4") linear(machine, DType::q4);
  else if (name == "attention") attention(machine);
  else if (name == "inputs") inputs();
  else return 2;
  return 0;
}
