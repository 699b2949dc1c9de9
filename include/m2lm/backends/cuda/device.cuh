// The vocabulary that kernels are written in: over nvcc's intrinsics and PTX here, over testing/cuda_emulation.hpp without nvcc. A kernel
// uses nothing of CUDA besides, so that the same source also runs on a host that has no GPU.
// Floor: backends. May include: core, ops.
#pragma once

// A kernel file includes this header and no other of CUDA. Without nvcc, a program includes m2lm/testing/cuda_emulation_runtime.hpp
// before the first kernel file.
//
// What a kernel may use:
//   M2LM_KERNEL void f(…)             a kernel: a function (template) of values, pointers and trivially copyable structs
//   M2LM_LAUNCH_BOUNDS(threads, blocks)   after M2LM_KERNEL: what the kernel is compiled for
//   M2LM_DEVICE                       a function that kernels call
//   M2LM_SHARED T tile[n];            shared memory of a size that is known; T has no constructor (not Half, not Bf16)
//   threadIdx, blockIdx, blockDim, gridDim, __syncthreads(), __syncwarp()
//   functions of <cmath> for float, __restrict__, M2LM_UNROLL before a loop, std::uint32_t and so on
//   what is declared below
//
// Every thread of a block takes part in __syncthreads and block_*, every lane of a warp in __syncwarp and whatever is said to be of the
// warp; a thread that has left the kernel does not.

#include <m2lm/backends/cuda/runtime.hpp>
#include <m2lm/core/dtype.hpp>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string_view>
#include <type_traits>

#if defined(__CUDACC__)

#include <m2lm/backends/cuda/runtime.cuh>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <memory>

#define M2LM_KERNEL __global__
#define M2LM_LAUNCH_BOUNDS(...) __launch_bounds__(__VA_ARGS__)
#define M2LM_DEVICE __device__ __forceinline__
#define M2LM_SHARED __shared__

namespace m2lm::inline M2LM_ABI::cuda {

/// Enqueues kernel(arguments…) on the device's stream. throws DeviceError naming the kernel, its shape and what CUDA said.
template <class... Parameter>
void launch(Device& device, const char* name, void (*kernel)(Parameter...), const LaunchShape& shape, std::type_identity_t<Parameter>... arguments) {
  constexpr std::size_t shared_bytes_of_any_kernel = 48 * 1024;  // more has to be asked for (CUDA C++ programming guide, 16.x "Shared memory")
  const void* const entry = reinterpret_cast<const void*>(kernel);
  const detail::Launching launching(device, name, shape);
  if (shape.shared_bytes > shared_bytes_of_any_kernel)
    launching.require(cudaFuncSetAttribute(entry, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shape.shared_bytes)));
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(shape.grid_x, shape.grid_y, shape.grid_z);
  config.blockDim = dim3(shape.block_x, shape.block_y);
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = launching.stream();
  void* values[] = {const_cast<void*>(static_cast<const void*>(std::addressof(arguments)))..., nullptr};
  launching.require(cudaLaunchKernelExC(&config, entry, values));
}

// ---- values -----------------------------------------------------------------------------------------------------------------

M2LM_DEVICE float float_of_bits(std::uint32_t bits) { return __uint_as_float(bits); }
M2LM_DEVICE std::uint32_t bits_of_float(float x) { return __float_as_uint(x); }

M2LM_DEVICE float load(float x) { return x; }
M2LM_DEVICE float load(Half x) { return __half2float(__ushort_as_half(x.bits)); }
M2LM_DEVICE float load(Bf16 x) { return __uint_as_float(static_cast<std::uint32_t>(x.bits) << 16); }

/// To the nearest, ties to even.
template <class E>
M2LM_DEVICE E store(float x) {
  if constexpr (std::is_same_v<E, float>) {
    return x;
  } else if constexpr (std::is_same_v<E, Half>) {
    return Half{__half_as_ushort(__float2half_rn(x))};
  } else {
    static_assert(std::is_same_v<E, Bf16>, "m2lm: kernels have elements of float, Half and Bf16");
    return Bf16{__bfloat16_as_ushort(__float2bfloat16_rn(x))};
  }
}

/// Two elements of 16 bits in a register, `low` in the lower half.
template <class E>
M2LM_DEVICE std::uint32_t pack(float low, float high) {
  std::uint32_t packed;
  if constexpr (std::is_same_v<E, Half>) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  } else {
    static_assert(std::is_same_v<E, Bf16>, "m2lm: pack is for Half and Bf16");
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  }
  return packed;
}

/// (x & mask) | bits and (x & mask) ^ bits as one instruction: written as C++ they become two where mask and bits are constants.
M2LM_DEVICE std::uint32_t and_or(std::uint32_t x, std::uint32_t mask, std::uint32_t bits) {
  std::uint32_t y;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(y) : "r"(x), "r"(mask), "r"(bits));
  return y;
}
M2LM_DEVICE std::uint32_t and_xor(std::uint32_t x, std::uint32_t mask, std::uint32_t bits) {
  std::uint32_t y;
  asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(y) : "r"(x), "r"(mask), "r"(bits));
  return y;
}
/// Four of the eight bytes of low and high, low's first; digit i of `selector` (hexadecimal) says which is byte i.
M2LM_DEVICE std::uint32_t permute_bytes(std::uint32_t low, std::uint32_t high, std::uint32_t selector) { return __byte_perm(low, high, selector); }

/// a - b of both elements of a register, each rounded once.
template <class E>
M2LM_DEVICE std::uint32_t subtract_pairs(std::uint32_t a, std::uint32_t b) {
  std::uint32_t difference;
  if constexpr (std::is_same_v<E, Half>) {
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(difference) : "r"(a), "r"(b));
  } else {
    static_assert(std::is_same_v<E, Bf16>, "m2lm: subtract_pairs is for Half and Bf16");
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(difference) : "r"(b), "r"(0xbf80bf80U), "r"(a));  // b·(-1) + a: sm_80 has no sub
  }
  return difference;
}

M2LM_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
M2LM_DEVICE float rsqrt_approx(float x) { return rsqrtf(x); }
M2LM_DEVICE float fast_divide(float x, float y) { return __fdividef(x, y); }

/// sum + Σ a[i]·b[i] over the four signed bytes of a and b.
M2LM_DEVICE std::int32_t dot4(std::uint32_t a, std::uint32_t b, std::int32_t sum) { return __dp4a(static_cast<int>(a), static_cast<int>(b), sum); }

// ---- memory -----------------------------------------------------------------------------------------------------------------

template <class T>
M2LM_DEVICE T* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char m2lm_dynamic_shared[];
  return reinterpret_cast<T*>(m2lm_dynamic_shared);
}

struct alignas(16) Bytes16 {
  std::uint32_t words[4];
};

/// requires an address that is a multiple of 4·Words.
template <int Words>
M2LM_DEVICE void load_words(const void* p, std::uint32_t (&out)[Words]) {
  static_assert(Words == 1 || Words == 2 || Words == 4);
  if constexpr (Words == 1) {
    out[0] = *static_cast<const std::uint32_t*>(p);
  } else if constexpr (Words == 2) {
    const uint2 value = *static_cast<const uint2*>(p);
    out[0] = value.x, out[1] = value.y;
  } else {
    const uint4 value = *static_cast<const uint4*>(p);
    out[0] = value.x, out[1] = value.y, out[2] = value.z, out[3] = value.w;
  }
}
template <int Words>
M2LM_DEVICE void store_words(void* p, const std::uint32_t (&in)[Words]) {
  static_assert(Words == 1 || Words == 2 || Words == 4);
  if constexpr (Words == 1) *static_cast<std::uint32_t*>(p) = in[0];
  if constexpr (Words == 2) *static_cast<uint2*>(p) = make_uint2(in[0], in[1]);
  if constexpr (Words == 4) *static_cast<uint4*>(p) = make_uint4(in[0], in[1], in[2], in[3]);
}

/// For global memory that nothing writes during the kernel and that is read once: it leaves the L1 cache to others.
M2LM_DEVICE Bytes16 load16_streaming(const void* p) {
  Bytes16 value;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(value.words[0]), "=r"(value.words[1]), "=r"(value.words[2]), "=r"(value.words[3])
      : "l"(__cvta_generic_to_global(p)));
  return value;
}

/// Returns the value before. The order of additions by several threads is not fixed: nothing whose rounding shows may use it.
template <class T>
M2LM_DEVICE T atomic_add(T* p, T value) {
  return atomicAdd(p, value);
}

/// 16 bytes from global to shared memory (zeros unless valid). They are there after copy_async_wait, for other threads after a barrier
/// behind it. requires addresses that are multiples of 16.
M2LM_DEVICE void copy_async16(void* shared, const void* global, bool valid = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<std::uint32_t>(__cvta_generic_to_shared(shared))),
               "l"(__cvta_generic_to_global(global)), "r"(valid ? 16 : 0)
               : "memory");
}
/// The copies of this thread since the last commit become a group.
M2LM_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/// Until all groups of this thread but the newest N have arrived.
template <int N>
M2LM_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// ---- the warp ---------------------------------------------------------------------------------------------------------------

/// `value` of another lane: `lane` (mod 32), own lane ^ mask, own lane + distance (the own value where there is none).
template <class T>
M2LM_DEVICE T shuffle(T value, int lane) {
  return __shfl_sync(0xffffffffU, value, lane);
}
template <class T>
M2LM_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffU, value, mask);
}
template <class T>
M2LM_DEVICE T shuffle_down(T value, unsigned distance) {
  return __shfl_down_sync(0xffffffffU, value, distance);
}
/// Bit i: the predicate of lane i.
M2LM_DEVICE std::uint32_t ballot(bool predicate) { return __ballot_sync(0xffffffffU, predicate); }

/// d += a·b: a [16, 16] in rows, b [16, 8] in columns, d [16, 8]; E = Half or Bf16. Of the warp. Which lane holds which element: PTX ISA,
/// "Matrix fragments for mma.m16n8k16 with floating point type".
template <class E>
M2LM_DEVICE void mma_16x8x16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<E, Half>) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    static_assert(std::is_same_v<E, Bf16>, "m2lm: mma_16x8x16 is for Half and Bf16");
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

/// d += a·b on signed bytes: a [16, 32] in rows, b [32, 8] in columns. Of the warp. PTX ISA, "Matrix fragments for mma.m16n8k32".
M2LM_DEVICE void mma_16x8x32_s8(std::int32_t (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/// Four 8×8 matrices of 16-bit elements from shared memory: lane 8·i + j gives the address of row j of matrix i (a multiple of 16); r[i] of
/// lane l is elements 2·(l mod 4) and the next of row l / 4 of matrix i. Of the warp. PTX ISA, "ldmatrix".
M2LM_DEVICE void load_matrix_x4(std::uint32_t (&r)[4], const void* row_address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(static_cast<std::uint32_t>(__cvta_generic_to_shared(row_address)))
               : "memory");
}
/// The same of the transposed matrices: r[i] of lane l is rows 2·(l mod 4) and the next, in column l / 4.
M2LM_DEVICE void load_matrix_x4_transposed(std::uint32_t (&r)[4], const void* row_address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(static_cast<std::uint32_t>(__cvta_generic_to_shared(row_address)))
               : "memory");
}

}  // namespace m2lm::cuda

#elif !defined(M2LM_CUDA_EMULATION)
#error "m2lm/backends/cuda/device.cuh needs nvcc; to run kernels on the host include m2lm/testing/cuda_emulation_runtime.hpp before it"
#endif

// ---- on both sides, over what is above ---------------------------------------------------------------------------------------

namespace m2lm::inline M2LM_ABI::cuda {

inline constexpr unsigned warp_size = 32;

/// Threads of a block are counted along x, then y; 32 in a row are a warp.
M2LM_DEVICE unsigned thread_index() { return threadIdx.y * blockDim.x + threadIdx.x; }
M2LM_DEVICE unsigned lane_index() { return thread_index() % warp_size; }
M2LM_DEVICE unsigned warp_index() { return thread_index() / warp_size; }

/// The two elements that pack made.
template <class E>
M2LM_DEVICE void unpack(std::uint32_t packed, float& low, float& high) {
  low = load(E{static_cast<std::uint16_t>(packed & 0xffffU)});
  high = load(E{static_cast<std::uint16_t>(packed >> 16)});
}

M2LM_DEVICE Bytes16 load16(const void* p) {
  Bytes16 value;
  load_words(p, value.words);
  return value;
}
M2LM_DEVICE void store16(void* p, const Bytes16& value) { store_words(p, value.words); }

/// N elements in one access. requires N·sizeof(E) = 4, 8 or 16, and an address that is a multiple of it.
template <int N, class E>
M2LM_DEVICE void load_vector(const E* p, float (&out)[N]) {
  constexpr int words = N * static_cast<int>(sizeof(E)) / 4;
  std::uint32_t raw[words];
  load_words(p, raw);
  M2LM_UNROLL
  for (int i = 0; i < words; ++i) {
    if constexpr (std::is_same_v<E, float>)
      out[i] = float_of_bits(raw[i]);
    else
      unpack<E>(raw[i], out[2 * i], out[2 * i + 1]);
  }
}
template <int N, class E>
M2LM_DEVICE void store_vector(E* p, const float (&in)[N]) {
  constexpr int words = N * static_cast<int>(sizeof(E)) / 4;
  std::uint32_t raw[words];
  M2LM_UNROLL
  for (int i = 0; i < words; ++i) {
    if constexpr (std::is_same_v<E, float>)
      raw[i] = bits_of_float(in[i]);
    else
      raw[i] = pack<E>(in[2 * i], in[2 * i + 1]);
  }
  store_words(p, raw);
}

/// Over the lanes of the warp; every lane gets the same bits, whatever the values. A NaN makes a sum NaN and is passed over by a maximum.
M2LM_DEVICE float warp_sum(float x) {
  M2LM_UNROLL
  for (int mask = 16; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}
M2LM_DEVICE float warp_max(float x) {
  M2LM_UNROLL
  for (int mask = 16; mask > 0; mask /= 2) x = fmaxf(x, shuffle_xor(x, mask));
  return x;
}

namespace detail {

/// Each warp's value, then the values of all warps, both by `combine`: a fixed order. `nothing` is its neutral element.
template <class Combine>
M2LM_DEVICE float block_combine(float x, float nothing, Combine combine) {
  M2LM_SHARED float of_warp[32];
  const unsigned warps = (blockDim.x * blockDim.y) / warp_size;
  x = combine(x);
  if (lane_index() == 0) of_warp[warp_index()] = x;
  __syncthreads();
  x = combine(lane_index() < warps ? of_warp[lane_index()] : nothing);
  __syncthreads();  // of_warp may be written again
  return x;
}

struct WarpSum {
  M2LM_DEVICE float operator()(float x) const { return warp_sum(x); }
};
struct WarpMax {
  M2LM_DEVICE float operator()(float x) const { return warp_max(x); }
};

}  // namespace detail

/// Over the threads of the block, which are a multiple of 32; every thread gets the same bits. They hold two barriers.
M2LM_DEVICE float block_sum(float x) { return detail::block_combine(x, 0.0F, detail::WarpSum{}); }
M2LM_DEVICE float block_max(float x) { return detail::block_combine(x, -INFINITY, detail::WarpMax{}); }

}  // namespace m2lm::cuda
