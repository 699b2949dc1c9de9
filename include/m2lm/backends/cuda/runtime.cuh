// cuda::Device over the CUDA runtime and cuBLASLt.
// Floor: backends. May include: core, ops.
#pragma once

#include <m2lm/backends/cuda/runtime.hpp>
#include <m2lm/backends/cuda/runtime_common.hpp>

#include <cublasLt.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <new>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

// A program whose other files are not compiled by nvcc finds these functions in the object of any .cu that includes them, called there
// or not.
#define M2LM_CUDA_DEFINITION [[gnu::used]] inline

namespace m2lm::inline M2LM_ABI::cuda {

namespace detail {

/// Sizes of a device's own buffers.
struct RuntimePolicy {
  std::size_t staging_bytes = std::size_t{16} << 20;    ///< of each of two pinned buffers: a copy of that size runs at the rate of the bus
  std::size_t workspace_bytes = std::size_t{32} << 20;  ///< of cuBLASLt: what its Hopper kernels ask for
  std::size_t kept_algorithms = 4096;                   ///< shapes of products whose kernel is remembered
  int least_capability = 80;                            ///< bf16, cp.async and mma.m16n8k16
};
inline constexpr RuntimePolicy runtime_policy{};
static_assert(runtime_policy.staging_bytes >= Device::staging_unit);

/// Deletes with a function of CUDA. What it returns is of no use where it is called: a device that is lost has lost its memory too.
template <auto Destroy>
struct Destroyer {
  template <class T>
  void operator()(T* p) const noexcept {
    static_cast<void>(Destroy(p));
  }
};
template <class T, auto Destroy>
using Owned = std::unique_ptr<T, Destroyer<Destroy>>;

using Stream = Owned<CUstream_st, cudaStreamDestroy>;
using Event = Owned<CUevent_st, cudaEventDestroy>;
using Graph = Owned<CUgraph_st, cudaGraphDestroy>;
using ExecutableGraph = Owned<CUgraphExec_st, cudaGraphExecDestroy>;
using DeviceBytes = Owned<void, cudaFree>;
using PinnedBytes = Owned<void, cudaFreeHost>;
using BlasHandle = Owned<cublasLtContext, cublasLtDestroy>;

/// "invalid argument (cudaErrorInvalidValue)".
inline std::string error_string(cudaError_t status) { return concat(cudaGetErrorString(status), " (", cudaGetErrorName(status), ')'); }

/// Errors after which the process cannot use the device (CUDA Runtime API, "Error handling": "leaves the process in an inconsistent state").
inline bool loses_device(cudaError_t status) {
  switch (status) {
    case cudaErrorIllegalAddress:
    case cudaErrorIllegalInstruction:
    case cudaErrorMisalignedAddress:
    case cudaErrorInvalidAddressSpace:
    case cudaErrorInvalidPc:
    case cudaErrorHardwareStackError:
    case cudaErrorAssert:
    case cudaErrorLaunchFailure:
    case cudaErrorLaunchTimeout:
    case cudaErrorECCUncorrectable:
    case cudaErrorUnknown: return true;
    default: return false;
  }
}

/// Makes a device current in this thread for a scope. The caller's own choice is put back.
class CurrentDevice {
  int previous_ = -1;

 public:
  explicit CurrentDevice(int ordinal) {
    int current = -1;
    cudaError_t status = cudaGetDevice(&current);
    if (status == cudaSuccess && current != ordinal) {
      status = cudaSetDevice(ordinal);
      if (status == cudaSuccess) previous_ = current;
    }
    if (status != cudaSuccess) {
      cudaGetLastError();
      throw DeviceError(concat("m2lm::cuda::Device: device ", ordinal, " cannot be used: ", error_string(status)));
    }
  }
  ~CurrentDevice() {
    if (previous_ >= 0) cudaSetDevice(previous_);
  }
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;
};

}  // namespace detail

struct Device::Implementation {
  /// What cuBLASLt chooses a kernel by.
  using ProductKey = std::array<std::int64_t, 16>;

  /// A pinned buffer: copies from its first `used` bytes are enqueued; `copied` is reached when they are done.
  struct Staging {
    detail::PinnedBytes bytes;
    detail::Event copied;
    std::size_t used = 0;
  };

  DeviceProperties properties;
  std::string fault;                 ///< what made this device unusable
  const char* last_kernel = "none";  ///< what was enqueued last, for the message of a fault
  LaunchShape last_shape;
  std::uint64_t waits = 0;
  bool recording = false;
  std::vector<void*> released;  ///< while recording: released when that is over

  // Destroyed from the last to the first: the stream outlives what is enqueued on it.
  detail::Stream stream;
  detail::BlasHandle blas;
  detail::DeviceBytes workspace;
  std::array<Staging, 2> staging;
  std::size_t filling = 0;  ///< the staging buffer that is being filled
  std::array<detail::Event, 8> marks;
  std::map<ProductKey, cublasLtMatmulAlgo_t> algorithms;
  detail::ReplayCache<detail::ExecutableGraph> replays;

  explicit Implementation(int ordinal) {
    const detail::CurrentDevice current(ordinal);
    cudaDeviceProp found{};
    require(cudaGetDeviceProperties(&found, ordinal), "cudaGetDeviceProperties");
    properties = {.name = found.name,
                  .ordinal = ordinal,
                  .compute_capability = found.major * 10 + found.minor,
                  .multiprocessors = found.multiProcessorCount,
                  .memory_bytes = found.totalGlobalMem,
                  .shared_bytes_per_block = found.sharedMemPerBlockOptin};
    m2lm::require<DeviceError>(properties.compute_capability >= detail::runtime_policy.least_capability, "m2lm::cuda::Device: ", properties.name,
                               " has compute capability ", found.major, '.', found.minor, "; the kernels need ",
                               detail::runtime_policy.least_capability / 10, ".0 or newer (Ampere)");
    cudaStream_t made = nullptr;
    require(cudaStreamCreateWithFlags(&made, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
    stream.reset(made);
    cublasLtHandle_t handle = nullptr;
    require(cublasLtCreate(&handle), "cublasLtCreate");
    blas.reset(handle);
    workspace.reset(allocate(detail::runtime_policy.workspace_bytes));
    for (detail::Event& mark : marks) mark = make_event();
  }
  ~Implementation() {
    // What is enqueued uses the memory below. A lost device waits for nothing, and there is no one to tell.
    int current = -1;
    const bool elsewhere = cudaGetDevice(&current) == cudaSuccess && current != properties.ordinal;
    if (elsewhere) cudaSetDevice(properties.ordinal);
    if (stream) cudaStreamSynchronize(stream.get());
    replays.clear();
    marks = {};
    staging = {};
    workspace.reset();
    blas.reset();
    stream.reset();
    if (elsewhere) cudaSetDevice(current);
    cudaGetLastError();
  }
  Implementation(const Implementation&) = delete;
  Implementation& operator=(const Implementation&) = delete;

  // ---- errors

  void check(std::string_view call) const {
    if (!fault.empty()) throw DeviceError(detail::lost_device(call, fault));
  }
  void check_host_call(std::string_view call) const {
    check(call);
    detail::refuse_while_recording(recording, call);
  }
  /// throws DeviceError naming the call. A fault of a kernel comes out of a later call: then what was enqueued last is named too, and the
  /// device is marked as lost.
  template <class... Piece>
  void require(cudaError_t status, const Piece&... call) {
    if (status == cudaSuccess) [[likely]]
      return;
    cudaGetLastError();  // what can be forgotten is: later calls are not to report it again
    std::string text = concat(call..., ": ", detail::error_string(status));
    if (detail::loses_device(status)) {
      text += concat("; the fault is in ", detail::kernel_string(last_kernel, last_shape),
                     " or before it: with CUDA_LAUNCH_BLOCKING=1 in the environment the kernel is named");
      fault = text;
    }
    throw DeviceError("m2lm::cuda: " + text);
  }
  template <class... Piece>
  void require(cublasStatus_t status, const Piece&... call) {
    if (status == CUBLAS_STATUS_SUCCESS) [[likely]]
      return;
    require(cudaGetLastError(), call...);  // a fault of an earlier kernel comes out here too
    throw DeviceError(concat("m2lm::cuda: ", call..., ": ", cublasLtGetStatusString(status)));
  }

  // ---- memory

  detail::Event make_event() {
    cudaEvent_t event = nullptr;
    require(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreateWithFlags");
    return detail::Event(event);
  }
  /// cudaMalloc and not a pool: sizes settle before the first replay, and what is released goes back to the device, for other programs.
  void* allocate(std::size_t bytes) {
    void* p = nullptr;
    const cudaError_t status = cudaMalloc(&p, std::max<std::size_t>(bytes, 1));
    if (status == cudaErrorMemoryAllocation) {
      cudaGetLastError();
      std::size_t free = 0, total = 0;
      require(cudaMemGetInfo(&free, &total), "cudaMemGetInfo");
      detail::throw_out_of_memory(bytes, free, total);
    }
    require(status, "cudaMalloc");
    return p;
  }
  detail::PinnedBytes allocate_pinned(std::size_t bytes) {
    void* p = nullptr;
    const cudaError_t status = cudaMallocHost(&p, std::max<std::size_t>(bytes, 1));
    if (status == cudaErrorMemoryAllocation) {
      cudaGetLastError();
      throw CapacityError(concat("m2lm::cuda: ", bytes, " bytes of pinned host memory could not be had; free some memory of the host"));
    }
    require(status, "cudaMallocHost");
    return detail::PinnedBytes(p);
  }

  /// The staging buffer with room for at least `unit` bytes.
  Staging& staging_for(std::size_t unit) {
    Staging& now = staging[filling];
    if (now.bytes && detail::runtime_policy.staging_bytes - now.used >= unit) return now;
    if (now.bytes) {
      require(cudaEventRecord(now.copied.get(), stream.get()), "cudaEventRecord");
      filling = 1 - filling;
    }
    Staging& next = staging[filling];
    if (!next.bytes) {
      detail::Event event = make_event();
      next.bytes = allocate_pinned(detail::runtime_policy.staging_bytes);
      next.copied = std::move(event);
      return next;
    }
    const cudaError_t reached = cudaEventQuery(next.copied.get());
    if (reached == cudaErrorNotReady) {
      cudaGetLastError();
      ++waits;
      require(cudaEventSynchronize(next.copied.get()), "cudaEventSynchronize");
    } else {
      require(reached, "cudaEventQuery");
    }
    next.used = 0;
    return next;
  }

  // ---- products

  /// The kernel that cuBLASLt thinks best, remembered: asking costs tens of microseconds.
  const cublasLtMatmulAlgo_t& algorithm(const ProductKey& key, const Product& p, cublasLtMatmulDesc_t operation,
                                        const std::array<cublasLtMatrixLayout_t, 4>& layouts, const std::array<std::uint32_t, 4>& alignments) {
    if (const auto it = algorithms.find(key); it != algorithms.end()) return it->second;
    cublasLtMatmulPreferenceOpaque_t preference{};
    require(cublasLtMatmulPreferenceInit(&preference), "cublasLtMatmulPreferenceInit");
    const auto prefer = [&](cublasLtMatmulPreferenceAttributes_t attribute, const auto& value) {
      require(cublasLtMatmulPreferenceSetAttribute(&preference, attribute, &value, sizeof value), "cublasLtMatmulPreferenceSetAttribute");
    };
    prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, detail::runtime_policy.workspace_bytes);
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, alignments[0]);
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, alignments[1]);
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, alignments[2]);
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, alignments[3]);
    cublasLtMatmulHeuristicResult_t best{};
    int found = 0;
    const cublasStatus_t status =
        cublasLtMatmulAlgoGetHeuristic(blas.get(), operation, layouts[0], layouts[1], layouts[2], layouts[3], &preference, 1, &best, &found);
    if (status != CUBLAS_STATUS_SUCCESS || found == 0)
      throw DeviceError(
          concat("m2lm::cuda: cublasLtMatmulAlgoGetHeuristic has no kernel for ", detail::ProductText{p}, ": ", cublasLtGetStatusString(status)));
    if (algorithms.size() >= detail::runtime_policy.kept_algorithms) algorithms.clear();
    return algorithms.emplace(key, best.algo).first->second;
  }

  void multiply(const Product& p) {
    // Row-major [m, n] is column-major [n, m] to cuBLASLt: yᵀ = w·xᵀ, where w [n, k] is a column-major [k, n] to be transposed, and x
    // [m, k] a column-major [k, m] as it is. What is stored as its transpose is transposed once more. The bias of cuBLASLt runs along the
    // rows of yᵀ, which are the columns of y.
    const cudaDataType_t type = p.dtype == DType::f32 ? CUDA_R_32F : p.dtype == DType::f16 ? CUDA_R_16F : CUDA_R_16BF;
    const cudaDataType_t out = p.wide_output ? CUDA_R_32F : type;
    const void* c = p.residual != nullptr ? p.residual : p.y;
    const std::int64_t ldc = p.residual != nullptr ? p.ld_residual : p.ldy;

    // CUBLAS_COMPUTE_32F: f32 sums, and products of f32 in full, not in TF32.
    cublasLtMatmulDescOpaque_t operation{};
    require(cublasLtMatmulDescInit(&operation, CUBLAS_COMPUTE_32F, CUDA_R_32F), "cublasLtMatmulDescInit");
    const auto describe = [&](cublasLtMatmulDescAttributes_t attribute, const auto& value) {
      require(cublasLtMatmulDescSetAttribute(&operation, attribute, &value, sizeof value), "cublasLtMatmulDescSetAttribute");
    };
    const cublasOperation_t of_w = p.transpose_w ? CUBLAS_OP_N : CUBLAS_OP_T, of_x = p.transpose_x ? CUBLAS_OP_T : CUBLAS_OP_N;
    describe(CUBLASLT_MATMUL_DESC_TRANSA, of_w);
    describe(CUBLASLT_MATMUL_DESC_TRANSB, of_x);
    const cublasLtEpilogue_t epilogue = epilogue_of(p);
    describe(CUBLASLT_MATMUL_DESC_EPILOGUE, epilogue);
    if (p.bias != nullptr) describe(CUBLASLT_MATMUL_DESC_BIAS_POINTER, p.bias);

    cublasLtMatrixLayoutOpaque_t a{}, b{}, residual{}, d{};
    const auto unsigned_size = [](std::int64_t n) { return static_cast<std::uint64_t>(n); };
    const std::int64_t ldw = detail::ldw_of(p);
    const auto stored = [&](cublasLtMatrixLayoutOpaque_t& layout, std::int64_t rows, bool transpose, std::int64_t ld) {
      const std::int64_t width = transpose ? rows : p.k, height = transpose ? p.k : rows;
      require(cublasLtMatrixLayoutInit(&layout, type, unsigned_size(width), unsigned_size(height), ld), "cublasLtMatrixLayoutInit");
    };
    stored(a, p.n, p.transpose_w, ldw);
    stored(b, p.m, p.transpose_x, p.ldx);
    require(cublasLtMatrixLayoutInit(&residual, out, unsigned_size(p.n), unsigned_size(p.m), ldc), "cublasLtMatrixLayoutInit");
    require(cublasLtMatrixLayoutInit(&d, out, unsigned_size(p.n), unsigned_size(p.m), p.ldy), "cublasLtMatrixLayoutInit");

    // Largest power of two, at most 256, that divides an address: kernels that load wider are not considered.
    const auto alignment = [](const void* q) {
      const auto address = reinterpret_cast<std::uintptr_t>(q);
      return static_cast<std::uint32_t>(std::min<std::uintptr_t>(address & (~address + 1), 256));
    };
    const std::array<std::uint32_t, 4> alignments{alignment(p.w), alignment(p.x), alignment(c), alignment(p.y)};
    const ProductKey key{static_cast<std::int64_t>(p.dtype) * 2 + p.wide_output,
                         static_cast<std::int64_t>(epilogue),
                         p.residual != nullptr ? (p.residual == p.y ? 2 : 1) : 0,
                         p.m,
                         p.n,
                         p.k,
                         (p.transpose_x ? 2 : 0) + (p.transpose_w ? 1 : 0),
                         p.ldx,
                         ldw,
                         ldc,
                         p.ldy,
                         alignments[0],
                         alignments[1],
                         alignments[2],
                         alignments[3],
                         alignment(p.bias)};  // its address is part of what a kernel is chosen by
    const cublasLtMatmulAlgo_t& chosen = algorithm(key, p, &operation, {&a, &b, &residual, &d}, alignments);
    const float alpha = 1, beta = p.residual != nullptr ? 1.0F : 0.0F;
    last_kernel = "cublasLtMatmul";
    last_shape = {};
    require(cublasLtMatmul(blas.get(), &operation, &alpha, p.w, &a, p.x, &b, &beta, c, &residual, p.y, &d, &chosen, workspace.get(),
                           detail::runtime_policy.workspace_bytes, stream.get()),
            "cublasLtMatmul of ", detail::ProductText{p});
  }
  static cublasLtEpilogue_t epilogue_of(const Product& p) {
    const bool bias = p.bias != nullptr;
    switch (p.activation) {
      case Activation::relu: return bias ? CUBLASLT_EPILOGUE_RELU_BIAS : CUBLASLT_EPILOGUE_RELU;
      case Activation::gelu_tanh: return bias ? CUBLASLT_EPILOGUE_GELU_BIAS : CUBLASLT_EPILOGUE_GELU;
      default: return bias ? CUBLASLT_EPILOGUE_BIAS : CUBLASLT_EPILOGUE_DEFAULT;
    }
  }

  // ---- recorded steps

  /// What `body` enqueues, as a graph.
  detail::ExecutableGraph record(FunctionRef<void()> body) {
    released.reserve(64);
    // Of this thread alone: other threads may go on allocating.
    require(cudaStreamBeginCapture(stream.get(), cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
    recording = true;
    const auto end = [this] {
      recording = false;
      cudaGraph_t ended = nullptr;
      const cudaError_t status = cudaStreamEndCapture(stream.get(), &ended);
      detail::Graph graph(ended);
      if (!released.empty()) cudaStreamSynchronize(stream.get());
      for (void* p : std::exchange(released, {})) cudaFree(p);
      return std::pair(status, std::move(graph));
    };
    try {
      body();
    } catch (...) {
      end();
      cudaGetLastError();
      throw;
    }
    const auto [status, graph] = end();
    require(status, "cudaStreamEndCapture");
    cudaGraphExec_t executable = nullptr;
    require(cudaGraphInstantiate(&executable, graph.get(), 0), "cudaGraphInstantiate");
    return detail::ExecutableGraph(executable);
  }
  void launch(const detail::ExecutableGraph& graph) {
    last_kernel = "recorded step";
    last_shape = {};
    require(cudaGraphLaunch(graph.get(), stream.get()), "cudaGraphLaunch of a recorded step");
  }
};

M2LM_CUDA_DEFINITION int device_count(std::string* reason) {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status == cudaSuccess && count > 0) return count;
  cudaGetLastError();
  if (reason != nullptr) {
    int driver = 0, runtime = CUDART_VERSION;  // the driver's version is 0 where there is none
    cudaDriverGetVersion(&driver);
    cudaRuntimeGetVersion(&runtime);
    cudaGetLastError();
    const auto why = driver == 0                                            ? detail::NoDevice::no_driver
                     : status == cudaErrorInsufficientDriver                ? detail::NoDevice::old_driver
                     : status == cudaErrorNoDevice || status == cudaSuccess ? detail::NoDevice::none_visible
                                                                            : detail::NoDevice::other;
    *reason = detail::no_device_reason(why, driver, runtime, detail::error_string(status));
  }
  return 0;
}

M2LM_CUDA_DEFINITION Device::Device(int ordinal) {
  detail::require_device(ordinal);
  implementation_ = std::make_unique<Implementation>(ordinal);
}
M2LM_CUDA_DEFINITION Device::~Device() = default;

M2LM_CUDA_DEFINITION const DeviceProperties& Device::properties() const { return implementation_->properties; }

M2LM_CUDA_DEFINITION void* Device::allocate(std::size_t bytes) {
  implementation_->check_host_call("allocate");
  const detail::CurrentDevice current(properties().ordinal);
  return implementation_->allocate(bytes);
}
M2LM_CUDA_DEFINITION void* Device::allocate_zeroed(std::size_t bytes) {
  void* const p = allocate(bytes);
  try {
    zero(p, bytes);
  } catch (...) {
    release(p);
    throw;
  }
  return p;
}
M2LM_CUDA_DEFINITION void Device::release(void* p) noexcept {
  if (p == nullptr) return;
  const auto turn = exclusive();  // no other thread is recording
  Implementation& self = *implementation_;
  if (!self.recording) {
    cudaStreamSynchronize(self.stream.get());  // what is enqueued may use it; a fault of it is reported by the next call
    cudaFree(p);
    return;
  }
  try {
    self.released.push_back(p);      // cudaFree would end the recording
  } catch (const std::bad_alloc&) {  // the device keeps it until the process ends
  }
}
M2LM_CUDA_DEFINITION void Device::zero(void* p, std::size_t bytes) {
  implementation_->check("zero");
  if (bytes == 0) return;
  const detail::CurrentDevice current(properties().ordinal);
  implementation_->require(cudaMemsetAsync(p, 0, bytes, implementation_->stream.get()), "cudaMemsetAsync of ", bytes, " bytes");
}
M2LM_CUDA_DEFINITION std::size_t Device::available() const {
  const detail::CurrentDevice current(properties().ordinal);
  std::size_t free = 0, total = 0;
  implementation_->require(cudaMemGetInfo(&free, &total), "cudaMemGetInfo");
  return free;
}

M2LM_CUDA_DEFINITION void Device::copy_to_device(void* to, const void* from, std::size_t bytes) {
  copy_to_device(to, bytes, 1, [from](std::byte* chunk, std::size_t first, std::size_t count) {
    std::memcpy(chunk, static_cast<const std::byte*>(from) + first, count);
  });
}
M2LM_CUDA_DEFINITION void Device::copy_to_device(void* to, std::size_t bytes, std::size_t unit,
                                                 FunctionRef<void(std::byte*, std::size_t, std::size_t)> fill) {
  Implementation& self = *implementation_;
  self.check_host_call("copy_to_device");
  detail::require_unit(bytes, unit);
  const detail::CurrentDevice current(properties().ordinal);
  // Small copies share a buffer; the host waits only when both are full of copies that are not done.
  for (std::size_t first = 0; first < bytes;) {
    Implementation::Staging& staging = self.staging_for(unit);
    const std::size_t room = (detail::runtime_policy.staging_bytes - staging.used) / unit * unit;
    const std::size_t count = std::min(room, bytes - first);
    std::byte* chunk = static_cast<std::byte*>(staging.bytes.get()) + staging.used;
    fill(chunk, first, count);
    self.require(cudaMemcpyAsync(static_cast<std::byte*>(to) + first, chunk, count, cudaMemcpyHostToDevice, self.stream.get()), "cudaMemcpyAsync of ",
                 count, " bytes to the device");
    constexpr std::size_t border = 64;  // the next copy begins on a cache line of its own
    staging.used = std::min((staging.used + count + border - 1) / border * border, detail::runtime_policy.staging_bytes);
    first += count;
  }
}
M2LM_CUDA_DEFINITION void Device::copy_to_host(void* to, const void* from, std::size_t bytes) {
  Implementation& self = *implementation_;
  self.check_host_call("copy_to_host");
  const detail::CurrentDevice current(properties().ordinal);
  ++self.waits;
  self.require(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, self.stream.get()), "cudaMemcpyAsync of ", bytes, " bytes to the host");
  self.require(cudaStreamSynchronize(self.stream.get()), "cudaStreamSynchronize");
}
M2LM_CUDA_DEFINITION void Device::synchronize() {
  implementation_->check_host_call("synchronize");
  ++implementation_->waits;
  implementation_->require(cudaStreamSynchronize(implementation_->stream.get()), "cudaStreamSynchronize");
}
M2LM_CUDA_DEFINITION std::uint64_t Device::waits() const { return implementation_->waits; }

M2LM_CUDA_DEFINITION void Device::multiply(const Product& product) {
  detail::check_product(product);
  implementation_->check("multiply");
  if (product.m == 0 || product.n == 0) return;
  const detail::CurrentDevice current(properties().ordinal);
  implementation_->multiply(product);
}

M2LM_CUDA_DEFINITION bool Device::replay(const ReplayKey& key, FunctionRef<void()> body) {
  Implementation& self = *implementation_;
  self.check_host_call("replay");
  const detail::CurrentDevice current(properties().ordinal);
  auto& entry = self.replays.at(key);
  if (entry.recorded) {
    self.launch(*entry.recorded);
    return false;
  }
  if (!entry.seen) {
    body();
    self.replays.at(key).seen = true;
    return true;
  }
  entry.recorded = self.record(body);
  self.launch(*entry.recorded);
  return true;
}
M2LM_CUDA_DEFINITION void Device::forget_replays() {
  detail::refuse_while_recording(implementation_->recording, "forget_replays");
  implementation_->replays.clear();  // a graph that is running is destroyed when it is done
}

M2LM_CUDA_DEFINITION std::shared_ptr<void> Device::pinned(std::size_t bytes) {
  implementation_->check_host_call("pinned");
  const detail::CurrentDevice current(properties().ordinal);
  return implementation_->allocate_pinned(bytes);
}
M2LM_CUDA_DEFINITION void Device::copy_to_pinned(void* to, const void* from, std::size_t bytes, int mark) {
  Implementation& self = *implementation_;
  detail::require_mark(mark);
  self.check_host_call("copy_to_pinned");
  const detail::CurrentDevice current(properties().ordinal);
  self.require(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, self.stream.get()), "cudaMemcpyAsync of ", bytes, " bytes to pinned memory");
  self.require(cudaEventRecord(self.marks[static_cast<std::size_t>(mark)].get(), self.stream.get()), "cudaEventRecord");
}
M2LM_CUDA_DEFINITION void Device::wait_for(int mark) {
  detail::require_mark(mark);
  implementation_->check_host_call("wait_for");
  implementation_->require(cudaEventSynchronize(implementation_->marks[static_cast<std::size_t>(mark)].get()), "cudaEventSynchronize");
}

namespace detail {

/// What surrounds the launch of a kernel: its device is current, and its name and shape are known to errors.
class Launching {
  Device::Implementation& device_;
  CurrentDevice current_;

 public:
  Launching(Device& device, const char* kernel, const LaunchShape& shape) : device_(device.implementation()), current_(device_.properties.ordinal) {
    device_.check(kernel);
    device_.last_kernel = kernel;
    device_.last_shape = shape;
  }
  cudaStream_t stream() const { return device_.stream.get(); }
  /// throws DeviceError naming the kernel, its shape and what CUDA said.
  void require(cudaError_t status) const {
    if (status != cudaSuccess) device_.require(status, kernel_string(device_.last_kernel, device_.last_shape));
  }
};

}  // namespace detail
}  // namespace m2lm::cuda
