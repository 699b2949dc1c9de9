// The linear op: packing of weights, and which kernel does a product.
// Floor: backends. May include: core, ops.
#pragma once

#include <m2lm/backends/cuda/kernels.hpp>
#include <m2lm/backends/cuda/kernels/gemv.cuh>
#include <m2lm/backends/cuda/kernels/linear_quantised.cuh>
#include <m2lm/core/threads.hpp>

#include <cstring>
#include <utility>
#include <vector>

namespace m2lm::inline M2LM_ABI::cuda {

template <class E>
bool has_format(DType format) {
  return format == dtype_of<E> || format == DType::q8 || format == DType::q4;
}

namespace detail {

/// Row `row` of the matrix that the rows of `sources` make, as E. `values` is room for a row of floats.
template <class E>
void convert_row(std::span<const AnyTensor> sources, std::int64_t row, std::int64_t cols, float* values, E* out) {
  std::size_t s = 0;
  while (row >= sources[s].shape()[0]) row -= sources[s++].shape()[0];
  if (sources[s].dtype() == dtype_of<E>) {
    const auto bytes = static_cast<std::size_t>(cols) * sizeof(E);
    std::memcpy(static_cast<void*>(out), sources[s].data() + static_cast<std::size_t>(row) * bytes, bytes);
    return;
  }
  sources[s].copy_to(values, row * cols, cols);
  for (std::int64_t c = 0; c < cols; ++c) {
    if constexpr (std::is_same_v<E, float>)
      out[c] = values[c];
    else if constexpr (std::is_same_v<E, Half>)
      out[c] = to_half(values[c]);
    else
      out[c] = to_bf16(values[c]);
  }
}

/// Below this many elements a matrix is packed by one thread.
inline constexpr std::int64_t elements_for_threads = 1 << 20;

}  // namespace detail

template <class E>
PackedMatrix pack(Device& device, const std::shared_ptr<Device>& owner, std::span<const AnyTensor> sources, DType format, bool gated) {
  require<OptionError>(has_format<E>(format), "m2lm: weights of ", dtype_name(format), " cannot be packed for a device with activations of ",
                       dtype_name(dtype_of<E>), ": it has ", dtype_name(dtype_of<E>), ", q8 and q4");
  PackedMatrix packed{.format = format, .rows = 0, .cols = ops::columns_of(sources[0].shape()), .gated = gated, .data = {}, .bytes = 0};
  for (const AnyTensor& source : sources) {
    require<OptionError>(dtype_size(source.dtype()) != 0 || is_block_format(source.dtype()), "m2lm: a weight of ", dtype_name(source.dtype()),
                         " cannot be packed");
    packed.rows += source.shape()[0];
  }
  const QuantisedLayout layout{format, gated, packed.rows, packed.cols};
  const bool quantised = is_block_format(format);
  const std::size_t unit = quantised ? layout.row_tile_bytes() : static_cast<std::size_t>(packed.cols) * sizeof(E);
  packed.bytes = quantised ? layout.bytes() : static_cast<std::size_t>(packed.rows) * unit;
  auto* const data = static_cast<std::byte*>(device.allocate(packed.bytes));
  packed.data = std::shared_ptr<const std::byte>(data, [owner](const std::byte* p) { owner->release(const_cast<std::byte*>(p)); });
  if (packed.bytes == 0) return packed;

  ThreadPool pool(packed.rows * packed.cols < detail::elements_for_threads ? 1 : 0);
  const auto row_values = static_cast<std::size_t>(quantised ? layout.column_tiles() * QuantisedLayout::tile_columns : packed.cols);
  std::vector<float> values(row_values * static_cast<std::size_t>(pool.size()));
  device.copy_to_device(data, packed.bytes, unit, [&](std::byte* chunk, std::size_t first, std::size_t count) {
    const auto begin = static_cast<std::int64_t>(first / unit);
    pool.run([&](int part) {
      const Range range = split(static_cast<std::int64_t>(count / unit), pool.size(), part);
      const std::span<float> row(values.data() + static_cast<std::size_t>(part) * row_values, row_values);
      for (std::int64_t i = range.begin; i < range.end; ++i) {
        std::byte* const out = chunk + static_cast<std::size_t>(i) * unit;
        if (quantised)
          pack_row_tile(layout, sources, begin + i, row, out);
        else
          detail::convert_row(sources, begin + i, packed.cols, row.data(), reinterpret_cast<E*>(out));
      }
    });
  });
  return packed;
}

/// Room for the sums of a product whose epilogue follows it (finish_product).
template <class E>
std::size_t linear_scratch(std::int64_t m, const PackedMatrix& w) {
  return w.format == dtype_of<E> && m > gemv_policy.most_tokens ? static_cast<std::size_t>(m * w.rows) * sizeof(E) : 0;
}

namespace detail {

/// Many rows of x, weights of E: Device::multiply, with what it has as an epilogue; for anything else finish_product follows it.
template <class E, class Out>
void multiply(Device& device, Matrix<const E> x, const PackedMatrix& w, const E* bias, Activation activation, Matrix<const Out> residual,
              Matrix<Out> y, void* scratch) {
  constexpr bool wide = !std::is_same_v<E, Out>;
  const bool takes_bias = !wide && reinterpret_cast<std::uintptr_t>(bias) % 16 == 0;
  const bool takes_activation =
      activation == Activation::none || (residual.data() == nullptr && (activation == Activation::relu || activation == Activation::gelu_tanh));
  Product product{.dtype = dtype_of<E>, .x = x.data(), .ldx = x.stride(0), .w = w.data.get(), .m = x.extent(0), .n = w.rows, .k = w.cols};
  if (takes_bias) product.bias = std::exchange(bias, nullptr);
  const auto store_in = [&](auto matrix) {
    product.wide_output = !std::is_same_v<E, typename decltype(matrix)::Element>;
    product.y = matrix.data();
    product.ldy = matrix.stride(0);
  };
  if (!w.gated && bias == nullptr && takes_activation) {
    product.activation = activation;
    product.residual = residual.data();
    product.ld_residual = residual.stride(0);
    store_in(y);
    device.multiply(product);
  } else if (!w.gated && residual.data() != y.data()) {  // the sums can wait where y will be
    store_in(y);
    device.multiply(product);
    enqueue_finish_product<E, Out, Out>(device, y, bias, activation, false, residual, y);
  } else {  // as E: half the bytes of f32, and what the layers between them would be rounded to
    const Matrix<E> z(static_cast<E*>(scratch), {x.extent(0), w.rows});
    store_in(z);
    device.multiply(product);
    enqueue_finish_product<E, E, Out>(device, z, bias, activation, w.gated, residual, y);
  }
}

}  // namespace detail

template <class E, class Out>
void linear(Device& device, Matrix<const E> x, const PackedMatrix& w, const E* bias, Activation activation, Matrix<const Out> residual, Matrix<Out> y,
            void* scratch) {
  const FusedEpilogue<E> epilogue{.bias = bias,
                                  .residual = residual.data(),
                                  .y = y.data(),
                                  .ld_residual = residual.stride(0),
                                  .ldy = y.stride(0),
                                  .outputs = y.extent(1),
                                  .activation = activation,
                                  .gated = w.gated,
                                  .wide = !std::is_same_v<E, Out>};
  const QuantisedLayout layout{w.format, w.gated, w.rows, w.cols};
  if (w.format == DType::q8)
    enqueue_linear_quantised<E, Q8Tile>(device, x, layout, w.data.get(), epilogue);
  else if (w.format == DType::q4)
    enqueue_linear_quantised<E, Q4Tile>(device, x, layout, w.data.get(), epilogue);
  else if (x.extent(0) <= gemv_policy.most_tokens)
    enqueue_gemv(device, x, reinterpret_cast<const E*>(w.data.get()), w.rows, epilogue);
  else
    detail::multiply(device, x, w, bias, activation, residual, y, scratch);
}

}  // namespace m2lm::cuda
