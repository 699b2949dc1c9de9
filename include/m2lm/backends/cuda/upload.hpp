// Tensors of a checkpoint, from the mapped file to the memory of a device.
// Floor: backends. May include: core, ops.
#pragma once

#include <m2lm/backends/cuda/runtime.hpp>
#include <m2lm/core/dtype.hpp>
#include <m2lm/core/function_ref.hpp>
#include <m2lm/core/tensor.hpp>
#include <m2lm/core/threads.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace m2lm::inline M2LM_ABI::cuda {

namespace detail {

/// Elements [begin, begin + count) of a tensor as E = float, Half or Bf16. Formats that an f32 holds exactly (16-bit floats, blocks) are
/// rounded once; an f64 is rounded to f32 first.
template <class E>
void convert_elements(const AnyTensor& tensor, std::int64_t begin, std::int64_t count, E* out) {
  if (tensor.dtype() == dtype_of<E>) {
    std::memcpy(out, tensor.data() + static_cast<std::size_t>(begin) * sizeof(E), static_cast<std::size_t>(count) * sizeof(E));
    return;
  }
  constexpr std::int64_t block = 1024;  // stays in L1
  float values[block];
  for (std::int64_t done = 0; done < count; done += block) {
    const std::int64_t now = std::min(block, count - done);
    tensor.copy_to(values, begin + done, now);
    for (std::int64_t i = 0; i < now; ++i) {
      if constexpr (std::is_same_v<E, Bf16>)
        out[done + i] = to_bf16(values[i]);
      else if constexpr (std::is_same_v<E, Half>)
        out[done + i] = to_half(values[i]);
      else
        out[done + i] = values[i];
    }
  }
}

template <class E>
void upload_as(Device& device, const AnyTensor& tensor, void* to, FunctionRef<void(std::size_t, std::size_t)> progress) {
  const auto elements = static_cast<std::size_t>(tensor.shape().elements());
  const std::size_t bytes = elements * sizeof(E);
  constexpr std::size_t worth_threads = std::size_t{1} << 20;  // elements; below, starting threads costs more than they bring
  ThreadPool pool(elements < worth_threads ? 1 : 0);
  // The pages of the mapping are read here, converted into pinned memory, and fetched from there while the next chunk is converted.
  device.copy_to_device(to, bytes, sizeof(E), [&](std::byte* chunk, std::size_t first, std::size_t count) {
    const auto begin = static_cast<std::int64_t>(first / sizeof(E));
    pool.run([&](int part) {
      constexpr std::int64_t grain = 4096;
      const Range mine = split(static_cast<std::int64_t>(count / sizeof(E)), pool.size(), part, grain);
      convert_elements(tensor, begin + mine.begin, mine.end - mine.begin, reinterpret_cast<E*>(chunk) + mine.begin);
    });
    if (progress) progress(first + count, bytes);
  });
}

}  // namespace detail

/// Copies a tensor to device memory with room for its elements as `dtype` (f32, f16 or bf16), converted where they are stored otherwise.
/// The copy is enqueued; the tensor may go at once. `progress(done, total)`, in bytes of the copy, is called after each chunk.
/// throws OptionError for a dtype that is none of these, or elements that are no numbers.
inline void upload_tensor(Device& device, const AnyTensor& tensor, void* to, DType dtype, FunctionRef<void(std::size_t, std::size_t)> progress = {}) {
  require<OptionError>(tensor.dtype() != DType::native && tensor.dtype() != DType::inherit, "m2lm::cuda::upload_tensor: elements of ",
                       dtype_name(tensor.dtype()), " cannot be converted");
  switch (dtype) {
    case DType::f32: return detail::upload_as<float>(device, tensor, to, progress);
    case DType::f16: return detail::upload_as<Half>(device, tensor, to, progress);
    case DType::bf16: return detail::upload_as<Bf16>(device, tensor, to, progress);
    default:
      throw OptionError(concat("m2lm::cuda::upload_tensor: a tensor of ", dtype_name(tensor.dtype()), " cannot be uploaded as ", dtype_name(dtype)));
  }
}

}  // namespace m2lm::cuda
