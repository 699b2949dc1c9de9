// Definitions of backends/cpu/cpu.hpp: packing, and the drivers around the kernels.
// Floor: backends. May include: core, ops.
#pragma once

#include <m2lm/backends/cpu/cpu.hpp>

#include <algorithm>
#include <cstring>
#include <vector>

namespace m2lm::inline M2LM_ABI {

M2LM_IMPL Cpu::Cpu(const CpuOptions& options) try {
  const IsaLevel allowed = default_isa();
  const IsaLevel level = options.max_isa && *options.max_isa < allowed ? *options.max_isa : allowed;
  state_ =
      std::make_shared<State>(options.threads, &detail::kernel_table(level, options.bf16_dot.value_or(detail::fast_bf16_dot(level)), options.int8_dot));
} catch (const std::bad_alloc&) {
  detail::throw_out_of_memory("a backend");
}

namespace detail {

/// The kernels of a format of weights. throws OptionError naming the formats there are.
inline const FormatKernels& cpu_format(const Cpu& cpu, DType format, Phase phase = Phase::decode) {
  const FormatKernels* kernels = cpu.kernels().format(format, phase);
  require<OptionError>(kernels != nullptr, "m2lm::Cpu: no kernels for weights in ", dtype_name(format), "; there are f32, bf16, q8, q4, q4_128 and w8a8");
  return *kernels;
}

inline constexpr std::int64_t k_step_of(DType format) { return format == DType::bf16 ? 2 : 1; }

M2LM_IMPL void cpu_for_rows(const Cpu& cpu, std::int64_t rows, std::int64_t elements, FunctionRef<void(std::int64_t)> f) {
  constexpr std::int64_t worth_a_barrier = 1 << 15;
  if (rows < 2 || elements < worth_a_barrier || cpu.threads() == 1) {
    for (std::int64_t i = 0; i < rows; ++i) f(i);
    return;
  }
  cpu.pool().run([&](int part) {
    const Range mine = split(rows, cpu.threads(), part);
    for (std::int64_t i = mine.begin; i < mine.end; ++i) f(i);
  });
}

/// Panels of a matrix: those of a gated one have 16 rows of each half.
inline std::int64_t panels_of(std::int64_t rows, bool gated) {
  const std::int64_t step = gated ? panel_width / 2 : panel_width;
  return round_up(gated ? rows / 2 : rows, step) / step;
}

/// Where the rows of `sources` below each other are found.
struct PackedRows {
  std::span<const AnyTensor> sources;
  std::int64_t rows = 0, cols = 0;
  bool gated = false;

  PackedRows(std::span<const AnyTensor> tensors, bool is_gated) : sources(tensors), cols(ops::columns_of(tensors[0].shape())), gated(is_gated) {
    for (const AnyTensor& s : sources) rows += s.shape()[0];
  }
  std::int64_t step() const { return gated ? panel_width / 2 : panel_width; }
  std::int64_t panels() const { return panels_of(rows, gated); }

  struct Row {
    const AnyTensor* source = nullptr;  // null in the padding
    std::int64_t row = 0;
  };
  /// Row `lane` of a panel: gated panels hold 16 rows of the first matrix, then 16 of the second.
  Row at(std::int64_t panel, std::int64_t lane) const {
    std::int64_t row = panel * step() + lane % step();
    if (row >= (gated ? rows / 2 : rows)) return {};
    if (gated) row += lane / step() * (rows / 2);
    const AnyTensor* source = sources.data();
    while (row >= source->shape()[0]) row -= (source++)->shape()[0];
    return {source, row};
  }
};

/// Inputs [k0, k0 + words · step) of a row as a panel holds them, step = k_step_of(format): a float, or a pair of bf16, per word of 32 bits. Zeros
/// where there is no input.
inline void panel_words(const PackedRows::Row& at, std::int64_t cols, DType format, std::int64_t k0, std::int64_t words, std::uint32_t* out) {
  const std::int64_t count = words * k_step_of(format), given = at.source ? std::clamp<std::int64_t>(cols - k0, 0, count) : 0;
  if (given < count) std::memset(out, 0, static_cast<std::size_t>(words) * sizeof(std::uint32_t));
  if (given == 0) return;
  const std::int64_t first = at.row * cols + k0;
  if (at.source->dtype() == format) {
    std::memcpy(out, at.source->data() + static_cast<std::size_t>(first) * dtype_size(format), static_cast<std::size_t>(given) * dtype_size(format));
    return;
  }
  constexpr std::int64_t piece = 64;
  float floats[piece];
  Bf16 narrow[piece];
  auto* bytes = reinterpret_cast<std::byte*>(out);
  for (std::int64_t i = 0; i < given; i += piece) {
    const std::int64_t here = std::min(piece, given - i);
    at.source->copy_to(floats, first + i, here);
    if (format == DType::bf16)
      for (std::int64_t j = 0; j < here; ++j) narrow[j] = to_bf16(floats[j]);
    const std::size_t size = dtype_size(format);
    std::memcpy(bytes + static_cast<std::size_t>(i) * size, format == DType::bf16 ? static_cast<const void*>(narrow) : floats, static_cast<std::size_t>(here) * size);
  }
}

/// One panel of plain numbers: a transposition of words.
inline void pack_panel(const PackedRows& from, DType format, std::int64_t panel, std::int64_t k, std::byte* to) {
  constexpr std::int64_t chunk = 64;  // words of a row at a time, so that the transposition stays in L1
  const std::int64_t step = k_step_of(format), words = k / step;
  std::uint32_t rows[panel_width][chunk];
  PackedRows::Row at[panel_width];
  for (std::int64_t lane = 0; lane < panel_width; ++lane) at[lane] = from.at(panel, lane);
  for (std::int64_t w = 0; w < words; w += chunk) {
    const std::int64_t count = std::min(chunk, words - w);
    for (std::int64_t lane = 0; lane < panel_width; ++lane) panel_words(at[lane], from.cols, format, w * step, count, rows[lane]);
    for (std::int64_t i = 0; i < count; ++i)
      for (std::int64_t lane = 0; lane < panel_width; ++lane, to += sizeof(std::uint32_t)) std::memcpy(to, &rows[lane][i], sizeof(std::uint32_t));
  }
}

/// Block `b` of a row. One that is stored in the same format is taken as it is; so is one of 4 bits for 8, whose values are the same.
template <class Block>
Block block_of(const AnyTensor& source, std::int64_t row, std::int64_t cols, std::int64_t b) {
  constexpr std::int64_t count = Block::dtype == DType::q4_128 ? group_values : block_values;
  const std::int64_t first = row * cols + b * count;
  if (source.dtype() == Block::dtype) return load_block<Block>(source.data(), first / block_values);
  if constexpr (Block::dtype == DType::q8)
    if (source.dtype() == DType::q4) {
      const auto narrow = load_block<Q4Block>(source.data(), first / block_values);
      Q8Block block{.scale = narrow.scale};
      for (std::int64_t i = 0; i < block_values; ++i) block.values[static_cast<std::size_t>(i)] = static_cast<std::int8_t>(narrow.value(i));
      return block;
    }
  float values[count] = {};
  source.copy_to(values, first, std::min(count, cols - b * count));
  return quantise<Block>(values);
}

template <class Block>
void pack_panel_of_blocks(const PackedRows& from, std::int64_t panel, std::int64_t k, std::byte* to) {
  constexpr QuantisedFormat layout = quantised_format(Block::dtype);
  for (std::int64_t lane = 0; lane < panel_width; ++lane) {
    const auto [source, row] = from.at(panel, lane);
    std::byte* strip = to + lane / strip_width * layout.strip_bytes(k);
    for (std::int64_t b = 0; b < layout.tiles(k); ++b)
      store_in_tile(source ? block_of<Block>(*source, row, from.cols, b) : Block{}, lane % strip_width, strip + b * tile_bytes(Block::dtype));
  }
}

/// One panel of rows of bytes with a scale each.
inline void pack_panel_of_rows(const PackedRows& from, std::int64_t panel, std::int64_t k, std::byte* to) {
  constexpr QuantisedFormat layout = quantised_format(DType::w8a8);
  std::vector<float> x(static_cast<std::size_t>(from.cols));
  std::vector<std::int8_t> values(static_cast<std::size_t>(k));
  for (std::int64_t lane = 0; lane < panel_width; ++lane) {
    const auto [source, row] = from.at(panel, lane);
    float scale = 0;
    if (source && from.cols > 0) {
      source->copy_to(x.data(), row * from.cols, from.cols);
      scale = quantise_w8(x.data(), from.cols, values.data());
    } else {
      std::fill(values.begin(), values.end(), std::int8_t{0});
    }
    std::byte* strip = to + lane / strip_width * layout.strip_bytes(k);
    for (std::int64_t i = 0; i < k; ++i)
      strip[at_in_tile(lane % strip_width, i)] = static_cast<std::byte>(values[static_cast<std::size_t>(i)] + layout.offset());
    std::memcpy(strip + layout.values_bytes(k) + lane % strip_width * layout.scale_bytes, &scale, sizeof(scale));
  }
}

/// Bytes of a panel with k inputs.
inline std::size_t panel_bytes(DType format, std::int64_t k) {
  if (is_quantised(format)) return static_cast<std::size_t>(panel_width / strip_width * quantised_format(format).strip_bytes(k));
  return static_cast<std::size_t>(panel_width * k) * dtype_size(format);
}

M2LM_IMPL std::shared_ptr<std::byte> WeightMemory::take(std::size_t bytes) {
  // A buffer is address space until it is written to. A matrix that is small beside a huge page, or large beside a buffer, has memory of its own.
  constexpr std::size_t buffer_bytes = std::size_t{1} << 26, smallest = huge_page / 4, largest = buffer_bytes / 2;
  if (bytes < smallest || bytes > largest) {
    const auto owner = std::make_shared<AlignedBytes>(aligned_bytes(bytes));
    return {owner, owner->get()};
  }
  const std::lock_guard lock(busy_);
  std::shared_ptr<AlignedBytes> buffer = buffer_.lock();
  if (!buffer || used_ + bytes > buffer_bytes) {
    buffer_ = buffer = std::make_shared<AlignedBytes>(aligned_bytes(buffer_bytes));
    used_ = 0;
  }
  std::byte* const begin = buffer->get() + used_;
  used_ = (used_ + bytes + tensor_alignment - 1) / tensor_alignment * tensor_alignment;
  return {buffer, begin};
}

M2LM_IMPL std::size_t cpu_packed_bytes(const Cpu& cpu, DType format, std::int64_t rows, std::int64_t cols, bool gated) {
  return static_cast<std::size_t>(panels_of(rows, gated)) * panel_bytes(format, round_up(cols, cpu_format(cpu, format).k_step));
}

M2LM_IMPL PackedMatrix cpu_pack(const Cpu& cpu, std::span<const AnyTensor> sources, DType format, bool gated) {
  const PackedRows from(sources, gated);
  require<OptionError>(format != DType::w8a8 || from.cols <= most_row_inputs, "m2lm::Cpu: a weight with ", from.cols, " inputs has no form in w8a8, which adds at most ",
                       most_row_inputs, " products in 32 bits; use q8");
  const std::int64_t k = round_up(from.cols, cpu_format(cpu, format).k_step), panels = from.panels();
  const std::size_t each = panel_bytes(format, k), bytes = static_cast<std::size_t>(panels) * each;
  const std::shared_ptr<std::byte> memory = cpu.weights().take(bytes);
  std::byte* out = memory.get();
  cpu.pool().run([&](int part) {
    const Range mine = split(panels, cpu.threads(), part);
    for (std::int64_t panel = mine.begin; panel < mine.end; ++panel) {
      std::byte* to = out + static_cast<std::size_t>(panel) * each;
      if (format == DType::q8)
        pack_panel_of_blocks<Q8Block>(from, panel, k, to);
      else if (format == DType::q4)
        pack_panel_of_blocks<Q4Block>(from, panel, k, to);
      else if (format == DType::q4_128)
        pack_panel_of_blocks<Q4Group>(from, panel, k, to);
      else if (format == DType::w8a8)
        pack_panel_of_rows(from, panel, k, to);
      else
        pack_panel(from, format, panel, k, to);
    }
  });
  return {.format = format, .rows = from.rows, .cols = from.cols, .gated = gated, .data = memory, .bytes = bytes};
}

M2LM_IMPL void cpu_linear(const Cpu& cpu, Arena& arena, Phase phase, Matrix<const float> x, const PackedMatrix& w,
                          const Epilogue<float>& epilogue, Matrix<float> y) {
  const FormatKernels& kernels = cpu_format(cpu, w.format, phase);
  const Arena::Scope scope(arena);
  const std::int64_t m = x.extent(0);
  const int parts = cpu.threads();
  const std::int64_t k = round_up(w.cols, kernels.k_step);
  GemmJob job{.x = x.data(), .ldx = x.stride(0), .w = w.data.get(), .m = m, .n = w.rows, .k = k, .cols = w.cols,
              .gated = w.gated, .bias = epilogue.bias, .activation = epilogue.activation, .residual = epilogue.residual.data(),
              .ld_residual = epilogue.residual.stride(0), .y = y.data(), .ldy = y.stride(0)};
  if (kernels.quantise) {
    job.rows.group = std::min(m, kernels.row_group);
    const QuantisedFormat layout = quantised_format(w.format);
    job.rows.block = layout.inputs_of_tile(k);
    job.rows.blocks = layout.tiles(k);
    job.rows.chunk = layout.chunk;
    job.rows.chunks = round_up(k, layout.chunk) / layout.chunk;
    job.rows.offset = layout.offset();
    const std::int64_t padded = round_up(m, job.rows.group);
    job.rows.values = arena.take<std::int8_t>(padded * job.rows.chunks * layout.chunk * kernels.value_bytes);
    if (kernels.value_bytes == 1) {
      job.rows.scales = arena.take<float>(padded * job.rows.blocks);
      job.rows.starts = arena.take<std::int32_t>(padded * job.rows.blocks);
    }
    cpu_for_rows(cpu, m, m * k, [&](std::int64_t i) { kernels.quantise(x.row(i), w.cols, job.rows, i); });
  }
  const std::size_t scratch_bytes = kernels.gemm_scratch(m);
  std::byte* scratch = arena.take<std::byte>(static_cast<std::int64_t>(scratch_bytes) * parts);
  constexpr std::int64_t worth_a_barrier = 1 << 18;  // products: some microseconds of one thread
  if (parts == 1 || m * w.rows * w.cols < worth_a_barrier) {
    kernels.gemm(job, 0, 1, scratch);
    return;
  }
  // With few rows threads wait for memory, one longer than the other, and a product is over when the last is done: each takes pieces of its own
  // panels, one after the other as they lie, and then what is left of its neighbours'. Kernels that read x itself convert it for every piece.
  const std::int64_t few_rows = kernels.quantise ? 16 : 4;
  constexpr std::int64_t pieces_of_thread = 8;
  const std::int64_t pieces = m <= few_rows ? pieces_of_thread : 1;
  auto* taken = arena.take<std::int32_t>(parts * next_stride);
  std::memset(taken, 0, static_cast<std::size_t>(parts * next_stride) * sizeof(std::int32_t));
  cpu.pool().run([&](int part) {
    std::byte* own_scratch = scratch + static_cast<std::size_t>(part) * scratch_bytes;
    for (int i = 0; i < parts; ++i) {
      const int owner = (part + i) % parts;
      const auto take = [&] { return __atomic_fetch_add(taken + owner * next_stride, 1, __ATOMIC_RELAXED); };
      for (std::int64_t piece = take(); piece < pieces; piece = take())
        kernels.gemm(job, static_cast<int>(owner * pieces + piece), static_cast<int>(parts * pieces), own_scratch);
    }
  });
}

M2LM_IMPL KeyValuesPlan cpu_plan_key_values(DType format, std::int64_t kv_heads, std::int64_t head_dim, std::int64_t capacity) {
  require<OptionError>(format == DType::f32 || format == DType::bf16, "m2lm::Cpu: a KV cache in ", dtype_name(format), " is not supported; use f32 or bf16");
  const std::int64_t rounded = round_up(capacity, panel_width);
  return {rounded, static_cast<std::size_t>(kv_heads * rounded * round_up(head_dim, panel_width)) * dtype_size(format)};
}

M2LM_IMPL void cpu_append_key_values(const Cpu& cpu, Matrix<const float> k, Matrix<const float> v, std::int64_t first, const KeyValues& kv) {
  const AttentionKernels& kernels = cpu_format(cpu, kv.format).attention;
  // All heads of a panel of keys, then the next panel: so k and v are read as they lie.
  const std::int64_t first_panel = first / panel_width, panels = (first + k.extent(0) - 1) / panel_width + 1 - first_panel;
  cpu_for_rows(cpu, panels * kv.kv_heads, k.elements(), [&](std::int64_t i) {
    const std::int64_t panel = (first_panel + i / kv.kv_heads) * panel_width;
    const std::int64_t begin = std::max(panel, first), end = std::min(panel + panel_width, first + k.extent(0));
    kernels.append(k.row(begin - first), k.stride(0), v.row(begin - first), v.stride(0), end - begin, begin, kv, i % kv.kv_heads);
  });
}

M2LM_IMPL void cpu_copy_key_values(const KeyValues& from, std::int64_t count, const KeyValues& to) {
  const auto element = static_cast<std::int64_t>(dtype_size(from.format)), pair = k_step_of(from.format);
  const std::int64_t dk = round_up(from.head_dim, pair) * element, dv = round_up(from.head_dim, panel_width);
  const auto copy = [](const std::byte* source, std::byte* target, std::int64_t bytes) { std::memcpy(target, source, static_cast<std::size_t>(bytes)); };
  for (std::int64_t h = 0; h < from.kv_heads; ++h) {
    // Whole panels of keys; of values, each panel's part of the positions. What lies behind `count` in a panel is multiplied by 0: it is copied too.
    copy(from.keys + h * from.capacity * dk, to.keys + h * to.capacity * dk, round_up(count, panel_width) * dk);
    for (std::int64_t c = 0; c < dv; c += panel_width)
      copy(from.values + (h * dv + c) * from.capacity * element, to.values + (h * dv + c) * to.capacity * element, round_up(count, panel_width) * panel_width * element);
  }
}

M2LM_IMPL void cpu_attention(const Cpu& cpu, Arena& arena, Matrix<const float> q, const KeyValues& kv, std::int64_t keys, std::int64_t first,
                             AttentionMask mask, double scale, Matrix<float> y, Sinks sinks) {
  const AttentionKernels& kernels = cpu_format(cpu, kv.format).attention;
  const Arena::Scope scope(arena);
  AttentionJob job{.q = q.data(), .ldq = q.stride(0), .keys_data = kv.keys, .values_data = kv.values, .tokens = q.extent(0),
                   .heads = q.extent(1) / kv.head_dim, .kv_heads = kv.kv_heads, .head_dim = kv.head_dim, .capacity = kv.capacity,
                   .keys = keys, .first = first, .mask = mask, .sinks = sinks, .scale = scale, .y = y.data(), .ldy = y.stride(0)};
  constexpr std::int64_t worth_a_barrier = 1 << 15, tiles_per_thread = 4;
  const int parts = q.elements() * keys < worth_a_barrier ? 1 : cpu.threads();
  const std::int64_t tiles = kv.kv_heads * ((job.tokens * (job.heads / kv.kv_heads) + kernels.rows - 1) / kernels.rows);
  const bool share_keys = parts > 1 && tiles < parts * tiles_per_thread && keys > key_segment;
  const std::int64_t counters = parts * next_stride + (share_keys ? tiles : 0);
  job.next = arena.take<std::int32_t>(counters);
  std::memset(job.next, 0, static_cast<std::size_t>(counters) * sizeof(std::int32_t));
  if (share_keys) {
    job.segments_done = job.next + parts * next_stride;
    job.segments = round_up(kv.capacity, key_segment) / key_segment;  // of the capacity, so that the arena does not grow with the keys
    job.partials = arena.take<float>(tiles * job.segments * kernels.partial_floats(kv.head_dim));
  }
  const std::size_t scratch_bytes = kernels.scratch(kv.head_dim);
  std::byte* scratch = arena.take<std::byte>(static_cast<std::int64_t>(scratch_bytes) * parts);
  if (parts == 1)
    kernels.run(job, 0, 1, scratch);
  else
    cpu.pool().run([&](int part) { kernels.run(job, part, parts, scratch + static_cast<std::size_t>(part) * scratch_bytes); });
}

M2LM_IMPL void cpu_patchify(View<const float, 3> pixels, std::int64_t patch, Matrix<float> y) {
  const std::int64_t columns = pixels.extent(2) / patch;
  for (std::int64_t i = 0; i < y.extent(0); ++i)
    for (std::int64_t c = 0; c < pixels.extent(0); ++c)
      for (std::int64_t r = 0; r < patch; ++r)
        std::copy_n(&pixels(c, i / columns * patch + r, i % columns * patch), patch, y.row(i) + (c * patch + r) * patch);
}

}  // namespace detail
}  // namespace m2lm
