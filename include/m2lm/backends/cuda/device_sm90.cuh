// What device.cuh has not, because only sm_90 has it: barriers that count bytes, copies of whole tiles by the device itself (TMA), and
// products of a warpgroup (wgmma). Over PTX here, over testing/cuda_emulation_sm90.hpp without nvcc.
// Floor: backends. May include: core, ops.
#pragma once

// wgmma exists in code for sm_90a alone, which runs on devices of compute capability 9.0 and on no other. A kernel that uses it has its body
// between `#if defined(M2LM_HAS_WARPGROUPS)` and `#endif`; other images of it are empty, and `has_body` tells the host which one it has.
//
// From the PTX ISA: "mbarrier", "Asynchronous copy: tensor", "Asynchronous proxy", "wgmma", "Matrix-descriptor".

#include <m2lm/backends/cuda/device.cuh>

#if defined(__CUDACC__)

#include <cuda.h>

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define M2LM_HAS_WARPGROUPS 1
#endif
#define M2LM_GRID_CONSTANT const __grid_constant__

namespace m2lm::inline M2LM_ABI::cuda {

// ---- the host's side ---------------------------------------------------------------------------------------------------------

/// A tensor as the copying unit knows it: a parameter of a kernel, declared M2LM_GRID_CONSTANT.
using TensorMap = CUtensorMap;

/// [planes][rows][columns] of E without gaps, copied in boxes of box_rows × 64 columns, which are 128 bytes wide and swizzled. What lies outside
/// arrives as zeros. requires 16-bit elements, data and rows on 16-byte borders, box_rows at most 256. throws DeviceError.
template <class E>
TensorMap make_tile_map(Device& device, const E* data, std::int64_t columns, std::int64_t rows, std::int64_t planes, int box_rows) {
  static_assert(sizeof(E) == 2);
  const detail::CurrentDevice current(device.properties().ordinal);
  // Asked of the driver that is there, so that no program links libcuda.
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found{};
    const cudaError_t status = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    require<DeviceError>(status == cudaSuccess && found == cudaDriverEntryPointSuccess,
                         "m2lm::cuda::make_tile_map: the driver has no cuTensorMapEncodeTiled: ", detail::error_string(status));
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  const auto size = [](std::int64_t n) { return static_cast<cuuint64_t>(n); };
  const cuuint64_t extents[3] = {size(columns), size(rows), size(planes)};
  const cuuint64_t strides[2] = {size(columns) * sizeof(E), size(rows * columns) * sizeof(E)};  // of the second and the third extent, in bytes
  const cuuint32_t box[3] = {64, static_cast<cuuint32_t>(box_rows), 1}, steps[3] = {1, 1, 1};
  TensorMap map;
  const CUresult status = encode(&map, std::is_same_v<E, Half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3,
                                 const_cast<E*>(data), extents, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  require<DeviceError>(status == CUDA_SUCCESS, "m2lm::cuda::make_tile_map of [", planes, ", ", rows, ", ", columns, "]: error ",
                       static_cast<int>(status), " of cuTensorMapEncodeTiled");
  return map;
}

/// Whether the image of `kernel` that this device runs is that of sm_90a. requires that its body, and nothing else of it, has M2LM_SHARED memory.
template <class... Parameter>
bool has_body(Device& device, void (*kernel)(Parameter...)) {
  const detail::CurrentDevice current(device.properties().ordinal);
  cudaFuncAttributes attributes{};
  if (cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)) == cudaSuccess) return attributes.sharedSizeBytes != 0;
  cudaGetLastError();
  return false;
}

// ---- barriers that count arrivals and bytes ------------------------------------------------------------------------------------

/// In shared memory. Its phases are 0, 1, 0, …: one ends when `count` threads have arrived and all bytes that they expect are there.
using Barrier = std::uint64_t;

namespace detail {
M2LM_DEVICE std::uint32_t shared_address(const void* p) { return static_cast<std::uint32_t>(__cvta_generic_to_shared(p)); }
}  // namespace detail

/// By one thread; fence_barrier_init by the same thread and __syncthreads by all follow.
M2LM_DEVICE void barrier_init(Barrier* barrier, unsigned count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(detail::shared_address(barrier)), "r"(count) : "memory");
}
M2LM_DEVICE void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
M2LM_DEVICE void barrier_arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(detail::shared_address(barrier)) : "memory");
}
/// And expects `bytes` of copies in this phase.
M2LM_DEVICE void barrier_arrive_expect(Barrier* barrier, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(detail::shared_address(barrier)), "r"(bytes) : "memory");
}
/// Until the phase of this parity is over. Of a barrier that has just been made the phase before its first, of parity 1, is over.
M2LM_DEVICE void barrier_wait(Barrier* barrier, unsigned parity) {
  std::uint32_t over;
  do {
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(over)
                 : "r"(detail::shared_address(barrier)), "r"(parity)
                 : "memory");
  } while (over == 0);
}

/// What this thread has stored in shared memory is seen by copies and products of the device itself that are ordered behind it.
M2LM_DEVICE void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

/// Begins to copy the box at (column, row, plane) to `shared`, which is on a 1,024-byte border. Its bytes count for the barrier; they are there when
/// its phase is over. By one thread.
M2LM_DEVICE void copy_box(void* shared, const TensorMap& map, int column, int row, int plane, Barrier* barrier) {
  asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(
                   detail::shared_address(shared)),
               "l"(&map), "r"(detail::shared_address(barrier)), "r"(column), "r"(row), "r"(plane)
               : "memory");
}

/// From here on a thread of this warpgroup has N registers: fewer than before, or more, when others have released as many. Of the warpgroup.
/// requires N a multiple of 8, at least 24, at most 256.
template <int N>
M2LM_DEVICE void release_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
M2LM_DEVICE void claim_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

// ---- products of a warpgroup ---------------------------------------------------------------------------------------------------

/// Registers of products in flight may be read and written on this side of it. Before the first product, and before one that reads what has
/// been written since.
M2LM_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
/// The products since the last commit become a group.
M2LM_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
/// Until all groups but the newest N are done. `hold` what they were about, so that nothing of it moves to before this.
template <int N>
M2LM_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
template <int N>
M2LM_DEVICE void hold(float (&x)[N]) {
  M2LM_UNROLL
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(x[i])::"memory");
}
template <int N>
M2LM_DEVICE void hold(std::uint32_t (&x)[N][4]) {
  M2LM_UNROLL
  for (int i = 0; i < 4 * N; ++i) asm volatile("" : "+r"(x[i / 4][i % 4])::"memory");
}

#define M2LM_WGMMA_4(i) "+f"(d[i]), "+f"(d[(i) + 1]), "+f"(d[(i) + 2]), "+f"(d[(i) + 3])
#define M2LM_WGMMA_32(i)                                                                                                                 \
  M2LM_WGMMA_4(i), M2LM_WGMMA_4((i) + 4), M2LM_WGMMA_4((i) + 8), M2LM_WGMMA_4((i) + 12), M2LM_WGMMA_4((i) + 16), M2LM_WGMMA_4((i) + 20), \
      M2LM_WGMMA_4((i) + 24), M2LM_WGMMA_4((i) + 28)
#define M2LM_WGMMA_N64(types)                                                                                                      \
  asm volatile(                                                                                                                    \
      "{ .reg .pred p; setp.ne.b32 p, %37, 0;\n"                                                                                   \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." types                                                                          \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, " \
      "%26, %27, %28, %29, %30, %31}, {%32, %33, %34, %35}, %36, p, 1, 1, %38; }\n"                                                \
      : M2LM_WGMMA_32(0)                                                                                                           \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate ? 1 : 0), "n"(Transposed ? 1 : 0))
#define M2LM_WGMMA_N128(types)                                                                                                     \
  asm volatile(                                                                                                                    \
      "{ .reg .pred p; setp.ne.b32 p, %69, 0;\n"                                                                                   \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." types                                                                         \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, " \
      "%26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, "   \
      "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, {%64, %65, %66, %67}, %68, p, 1, 1, %70; }\n"        \
      : M2LM_WGMMA_32(0), M2LM_WGMMA_32(32)                                                                                        \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate ? 1 : 0), "n"(Transposed ? 1 : 0))

/// d [64, N] = a [64, 16]·b [16, N], added to d if `accumulate`; E = Half or Bf16. Of the warpgroup; begins, and is done after wgmma_commit and
/// wgmma_wait: until then nobody may touch d and a, or write b. Warp w of the warpgroup has rows 16w … 16w + 15 of d and a, its lanes as
/// mma_16x8x16 has them: d[4n + i] is element i of columns 8n … 8n + 7. b lies in shared memory as tile_descriptor says: [N][16], or [16][N]
/// if Transposed.
template <class E, int N, bool Transposed>
M2LM_DEVICE void wgmma(float (&d)[N / 2], const std::uint32_t (&a)[4], std::uint64_t b, bool accumulate) {
  static_assert(N == 64 || N == 128);
  static_assert(std::is_same_v<E, Half> || std::is_same_v<E, Bf16>, "m2lm: wgmma is for Half and Bf16");
  if constexpr (N == 64 && std::is_same_v<E, Half>) M2LM_WGMMA_N64("f16.f16");
  if constexpr (N == 64 && std::is_same_v<E, Bf16>) M2LM_WGMMA_N64("bf16.bf16");
  if constexpr (N == 128 && std::is_same_v<E, Half>) M2LM_WGMMA_N128("f16.f16");
  if constexpr (N == 128 && std::is_same_v<E, Bf16>) M2LM_WGMMA_N128("bf16.bf16");
}

#undef M2LM_WGMMA_4
#undef M2LM_WGMMA_32
#undef M2LM_WGMMA_N64
#undef M2LM_WGMMA_N128

}  // namespace m2lm::cuda

#elif !defined(M2LM_HAS_WARPGROUPS)
#error "m2lm/backends/cuda/device_sm90.cuh needs nvcc; to run kernels on the host include m2lm/testing/cuda_emulation_runtime.hpp before it"
#endif

namespace m2lm::inline M2LM_ABI::cuda {

/// Of rows of 128 bytes that copy_box has laid out, eight in 1,024 bytes. `first` is the first of 16 columns (b is [N][16]: 32 bytes of N rows), or
/// the first of 16 rows (b is [16][N]: N / 64 boxes that are box_bytes apart). PTX ISA, "Matrix-descriptor": the address, the distance of 64 columns
/// to the next 64, that of eight rows to the next eight, and 1 for swizzling of 128 bytes.
M2LM_DEVICE std::uint64_t tile_descriptor(const void* first, int box_bytes) {
  const std::uint64_t address = detail::shared_address(first) & 0x3FFFFU;
  return address >> 4 | static_cast<std::uint64_t>(box_bytes >> 4) << 16 | std::uint64_t{1024 >> 4} << 32 | std::uint64_t{1} << 62;
}

}  // namespace m2lm::cuda
