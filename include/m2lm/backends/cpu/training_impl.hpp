// Definitions of backends/cpu/training.hpp: the drivers around the kernels of backward passes.
// Floor: backends. May include: core, ops.
#pragma once

#include <m2lm/backends/cpu/cpu_impl.hpp>
#include <m2lm/backends/cpu/training.hpp>

#include <algorithm>
#include <cmath>

namespace m2lm::inline M2LM_ABI::detail {

namespace training {

/// Columns whose panels of `inputs` rows are made at a time: at most as many as the GEMM keeps sums of, and 4 MB.
constexpr std::int64_t columns_at_once(std::int64_t inputs) {
  const std::int64_t fit = (std::int64_t{1} << 20) / (inputs > 0 ? inputs : 1) / panel_width * panel_width;
  return fit < panel_width ? panel_width : fit > 384 ? 384 : fit;
}
/// Rows of a weight's gradient that a thread turns at a time.
inline constexpr std::int64_t row_group = 240;
inline constexpr std::int64_t worth_a_barrier = 1 << 18;

/// f(part, parts) on all threads, or on this one when there is little to do.
inline void run_parts(const Cpu& cpu, std::int64_t products, FunctionRef<void(int, int)> f) {
  if (products < worth_a_barrier || cpu.threads() == 1) {
    f(0, 1);
    return;
  }
  cpu.pool().run([&](int part) { f(part, cpu.threads()); });
}

}  // namespace training

M2LM_IMPL void cpu_linear_input_gradient(const Cpu& cpu, Arena& arena, Matrix<const float> dy, const PackedMatrix& w, Matrix<float> dx, bool accumulate) {
  const std::int64_t k_padded = round_up(w.cols, cpu_format(cpu, w.format).k_step);
  const FormatKernels& kernels = cpu.kernels().f32;
  const TrainingKernels& training = cpu.kernels().training;
  const Arena::Scope scope(arena);
  const std::int64_t m = dy.extent(0), n = w.rows, k = w.cols;
  // dx = dy·w is the product with the transposed weight: its panels are made from those of w, a group at a time.
  const std::int64_t group = std::min(training::columns_at_once(n), round_up(k, panel_width));
  const auto scratch_floats = static_cast<std::int64_t>((kernels.gemm_scratch(m) + sizeof(float) - 1) / sizeof(float));
  const std::int64_t per_thread = round_up(group * n + scratch_floats, 16);
  float* scratch = arena.take<float>(per_thread * cpu.threads());
  training::run_parts(cpu, m * n * k, [&](int part, int parts) {
    float* panels = scratch + per_thread * part;
    const Range mine = split(k, parts, part, panel_width);
    for (std::int64_t c0 = mine.begin; c0 < mine.end; c0 += group) {
      const std::int64_t columns = std::min(group, mine.end - c0);
      training.transpose_panels(w.data.get(), w.format, n, k_padded, c0, columns, panels);
      const GemmJob job{.x = dy.data(), .ldx = dy.stride(0), .w = reinterpret_cast<const std::byte*>(panels), .m = m, .n = columns, .k = n, .cols = n,
                        .gated = false, .bias = nullptr, .activation = Activation::none, .residual = accumulate ? dx.data() + c0 : nullptr,
                        .ld_residual = dx.stride(0), .y = dx.data() + c0, .ldy = dx.stride(0)};
      kernels.gemm(job, 0, 1, reinterpret_cast<std::byte*>(panels + group * n));
    }
  });
}

M2LM_IMPL void cpu_linear_weight_gradient(const Cpu& cpu, Arena& arena, Matrix<const float> x, Matrix<const float> dy, Matrix<float> dw, Vector<float> db) {
  const FormatKernels& kernels = cpu.kernels().f32;
  const TrainingKernels& training = cpu.kernels().training;
  const Arena::Scope scope(arena);
  const std::int64_t m = x.extent(0), n = dy.extent(1), k = x.extent(1);
  if (db.data())
    training::run_parts(cpu, m * n, [&](int part, int parts) {
      const Range mine = split(n, parts, part, panel_width);
      if (mine.begin < mine.end)
        training.norm_weight_gradient(dy.data() + mine.begin, dy.stride(0), nullptr, 0, nullptr, nullptr, m, mine.end - mine.begin, nullptr,
                                      db.data() + mine.begin);
    });
  if (dw.data() == nullptr || k == 0) return;
  // dw = dyᵀ·x: the columns of x are panels as they lie; dy is turned. Groups of columns are packed together, then every thread takes
  // rows of dw.
  const std::int64_t group = std::min(training::columns_at_once(m), round_up(k, panel_width));
  const std::int64_t rows_at_once = std::min(training::row_group, n);
  const auto scratch_floats = static_cast<std::int64_t>((kernels.gemm_scratch(rows_at_once) + sizeof(float) - 1) / sizeof(float));
  const std::int64_t per_thread = round_up(rows_at_once * m + scratch_floats, 16);
  float* panels = arena.take<float>(group * m);
  float* scratch = arena.take<float>(per_thread * cpu.threads());
  for (std::int64_t c0 = 0; c0 < k; c0 += group) {
    const std::int64_t columns = std::min(group, k - c0);
    training::run_parts(cpu, m * columns * 8, [&](int part, int parts) {
      const Range mine = split(round_up(columns, panel_width), parts, part, panel_width);
      for (std::int64_t c = mine.begin; c < mine.end; c += panel_width) training.copy_panel(x.data(), x.stride(0), m, k, c0 + c, panels + c * m);
    });
    training::run_parts(cpu, m * n * columns, [&](int part, int parts) {
      float* turned = scratch + per_thread * part;
      const Range mine = split(n, parts, part);
      for (std::int64_t r0 = mine.begin; r0 < mine.end; r0 += rows_at_once) {
        const std::int64_t rows = std::min(rows_at_once, mine.end - r0);
        training.transpose(dy.data() + r0, dy.stride(0), m, rows, turned, m);
        float* to = dw.data() + r0 * k + c0;
        const GemmJob job{.x = turned, .ldx = m, .w = reinterpret_cast<const std::byte*>(panels), .m = rows, .n = columns, .k = m, .cols = m,
                          .gated = false, .bias = nullptr, .activation = Activation::none, .residual = to, .ld_residual = k, .y = to, .ldy = k};
        kernels.gemm(job, 0, 1, reinterpret_cast<std::byte*>(turned + rows_at_once * m));
      }
    });
  }
}

M2LM_IMPL void cpu_norm_backward(const Cpu& cpu, Arena& arena, Matrix<const float> dy, Matrix<const float> x, Vector<const float> weight, double eps,
                                 bool centred, Matrix<float> dx, bool accumulate, Vector<float> dweight, Vector<float> dbias) {
  const TrainingKernels& training = cpu.kernels().training;
  const Arena::Scope scope(arena);
  const std::int64_t m = x.extent(0), n = x.extent(1);
  float* mean = arena.take<float>(m);
  float* inverse = arena.take<float>(m);
  cpu_for_rows(cpu, m, m * n, [&](std::int64_t i) {
    training.norm_statistics(x.row(i), n, static_cast<float>(eps), centred, mean + i, inverse + i);
    if (dx.data()) training.norm_backward(dy.row(i), x.row(i), weight.data(), mean[i], inverse[i], centred, dx.row(i), accumulate, n);
  });
  if (dweight.data() == nullptr && dbias.data() == nullptr) return;
  training::run_parts(cpu, m * n * 4, [&](int part, int parts) {
    const Range mine = split(n, parts, part, panel_width);
    if (mine.begin == mine.end) return;
    const auto at = [&](const Vector<float>& v) { return v.data() ? v.data() + mine.begin : nullptr; };
    training.norm_weight_gradient(dy.data() + mine.begin, dy.stride(0), x.data() + mine.begin, x.stride(0), mean, inverse, m, mine.end - mine.begin,
                                  at(dweight), at(dbias));
  });
}

M2LM_IMPL void cpu_attention_backward(const Cpu& cpu, Arena& arena, const AttentionBackwardJob& job) {
  const TrainingKernels& training = cpu.kernels().training;
  const Arena::Scope scope(arena);
  const std::int64_t floats = round_up(training.attention_backward_floats(job.keys, job.head_dim), 16);
  float* scratch = arena.take<float>(floats * cpu.threads());
  training::run_parts(cpu, job.heads * job.queries * job.keys * job.head_dim, [&](int part, int parts) {
    for (std::int64_t head = part; head < job.kv_heads; head += parts) training.attention_backward(job, head, scratch + floats * part);
  });
}

M2LM_IMPL void cpu_cross_entropy(const Cpu& cpu, Matrix<const float> logits, std::span<const std::int32_t> targets, double scale, Vector<float> losses,
                                 Matrix<float> dlogits) {
  const TrainingKernels& training = cpu.kernels().training;
  const std::int64_t n = logits.extent(1);
  cpu_for_rows(cpu, logits.extent(0), logits.elements(), [&](std::int64_t i) {
    const std::int32_t target = targets[static_cast<std::size_t>(i)];
    if (target == ignored_target) {
      losses(i) = 0;
      if (dlogits.data()) std::fill_n(dlogits.row(i), n, 0.0F);
      return;
    }
    float largest = 0;
    double sum = 0;
    training.softmax_statistics(logits.row(i), n, &largest, &sum);
    losses(i) = static_cast<float>(std::log(sum) + static_cast<double>(largest) - static_cast<double>(logits(i, target)));
    if (dlogits.data() == nullptr) return;
    training.scaled_softmax(logits.row(i), n, largest, static_cast<float>(scale / sum), dlogits.row(i));
    dlogits(i, target) -= static_cast<float>(scale);
  });
}

}  // namespace m2lm::detail
