// runtime.cuh over a CUDA that is made up here: what it asks of the runtime and of cuBLASLt, in which order, and what it gives back when
// any call fails. Work of the stream is done only when somebody waits for it, as late as CUDA allows.
#include <m2lm/backends/cuda/runtime.cuh>

#include <doctest/doctest.h>

#include <support.hpp>

#include <array>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <random>
#include <string>
#include <utility>
#include <vector>

namespace {

using Work = std::function<void()>;

struct FakeEvent {
  std::uint64_t after = 0;  ///< so many pieces of work come before it
};

struct FakeCuda {
  cudaError_t count_status = cudaSuccess;
  int devices = 1, driver = 13000, capability = 9, current = 0;
  std::size_t total = std::size_t{1} << 30, used = 0;

  std::map<std::string, int> alive;  ///< by kind
  std::map<void*, std::size_t> memory;
  int calls = 0, fail_at = -1;  ///< counted among the calls that can fail
  cudaError_t failure = cudaErrorLaunchFailure;
  std::string failed;

  std::deque<Work> pending;
  std::uint64_t enqueued = 0, done = 0;
  bool capturing = false;
  std::vector<Work> captured;
  int heuristics = 0;

  cudaError_t call(const char* name) {
    if (calls++ != fail_at) return cudaSuccess;
    failed = name;
    return failure;
  }
  void enqueue(Work work) {
    if (capturing) {
      captured.push_back(std::move(work));
    } else {
      pending.push_back(std::move(work));
      ++enqueued;
    }
  }
  void run_until(std::uint64_t count) {
    while (done < count) {
      pending.front()();
      pending.pop_front();
      ++done;
    }
  }
  int living() const {
    int sum = 0;
    for (const auto& [kind, count] : alive) sum += count;
    return sum;
  }
};
FakeCuda fake;

template <class T>
T* make(const char* kind) {
  ++fake.alive[kind];
  return reinterpret_cast<T*>(new std::vector<Work>());
}
void unmake(const char* kind, void* p) {
  --fake.alive[kind];
  delete static_cast<std::vector<Work>*>(p);
}

struct FakeLayout {
  std::uint64_t type, rows, cols;
  std::int64_t ld;
};
struct FakeOperation {
  cublasOperation_t of_a, of_b;
  cublasLtEpilogue_t epilogue;
  cublasComputeType_t compute;
  const void* bias;
};

}  // namespace

extern "C" {

cudaError_t cudaGetDeviceCount(int* count) {
  *count = fake.devices;
  return fake.count_status;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = fake.driver;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "what CUDA says"; }
const char* cudaGetErrorName(cudaError_t) { return "cudaErrorOfTheTest"; }
cudaError_t cudaGetDevice(int* device) {
  *device = fake.current;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  fake.current = device;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  std::strcpy(properties->name, "made up");
  properties->major = fake.capability;
  properties->minor = 0;
  properties->multiProcessorCount = 132;
  properties->totalGlobalMem = fake.total;
  properties->sharedMemPerBlockOptin = 232448;
  return fake.call("cudaGetDeviceProperties");
}
cudaError_t cudaMalloc(void** p, std::size_t bytes) {
  if (const cudaError_t status = fake.call("cudaMalloc"); status != cudaSuccess) return status;
  if (bytes > fake.total - fake.used) return cudaErrorMemoryAllocation;
  *p = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  fake.memory[*p] = bytes;
  fake.used += bytes;
  ++fake.alive["memory"];
  return cudaSuccess;
}
cudaError_t cudaFree(void* p) {
  CHECK(fake.pending.empty());  // nothing that is still to run may use it
  fake.used -= fake.memory.at(p);
  fake.memory.erase(p);
  std::free(p);
  --fake.alive["memory"];
  return cudaSuccess;
}
cudaError_t cudaMallocHost(void** p, std::size_t bytes) {
  if (const cudaError_t status = fake.call("cudaMallocHost"); status != cudaSuccess) return status;
  *p = std::malloc(bytes);
  ++fake.alive["pinned"];
  return cudaSuccess;
}
cudaError_t cudaFreeHost(void* p) {
  std::free(p);
  --fake.alive["pinned"];
  return cudaSuccess;
}
cudaError_t cudaMemGetInfo(std::size_t* free, std::size_t* total) {
  *free = fake.total - fake.used;
  *total = fake.total;
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  CHECK(flags == cudaStreamNonBlocking);
  if (const cudaError_t status = fake.call("cudaStreamCreateWithFlags"); status != cudaSuccess) return status;
  *stream = make<CUstream_st>("stream");
  return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  unmake("stream", stream);
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) {
  CHECK(!fake.capturing);
  fake.run_until(fake.enqueued);
  return fake.call("cudaStreamSynchronize");
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind, cudaStream_t) {
  if (const cudaError_t status = fake.call("cudaMemcpyAsync"); status != cudaSuccess) return status;
  fake.enqueue([=] { std::memcpy(to, from, bytes); });
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* p, int value, std::size_t bytes, cudaStream_t) {
  if (const cudaError_t status = fake.call("cudaMemsetAsync"); status != cudaSuccess) return status;
  fake.enqueue([=] { std::memset(p, value, bytes); });
  return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  if (const cudaError_t status = fake.call("cudaEventCreateWithFlags"); status != cudaSuccess) return status;
  *event = reinterpret_cast<cudaEvent_t>(new FakeEvent());
  ++fake.alive["event"];
  return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete reinterpret_cast<FakeEvent*>(event);
  --fake.alive["event"];
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) {
  CHECK(!fake.capturing);
  reinterpret_cast<FakeEvent*>(event)->after = fake.enqueued;
  return fake.call("cudaEventRecord");
}
cudaError_t cudaEventQuery(cudaEvent_t event) { return reinterpret_cast<FakeEvent*>(event)->after <= fake.done ? cudaSuccess : cudaErrorNotReady; }
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  CHECK(!fake.capturing);
  fake.run_until(reinterpret_cast<FakeEvent*>(event)->after);
  return fake.call("cudaEventSynchronize");
}
cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode mode) {
  CHECK(mode == cudaStreamCaptureModeThreadLocal);
  if (const cudaError_t status = fake.call("cudaStreamBeginCapture"); status != cudaSuccess) return status;
  fake.capturing = true;
  fake.captured.clear();
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t* graph) {
  CHECK(fake.capturing);
  fake.capturing = false;
  if (const cudaError_t status = fake.call("cudaStreamEndCapture"); status != cudaSuccess) return status;
  *graph = make<CUgraph_st>("graph");
  *reinterpret_cast<std::vector<Work>*>(*graph) = fake.captured;
  return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  unmake("graph", graph);
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
  if (const cudaError_t status = fake.call("cudaGraphInstantiate"); status != cudaSuccess) return status;
  *executable = make<CUgraphExec_st>("executable graph");
  *reinterpret_cast<std::vector<Work>*>(*executable) = *reinterpret_cast<std::vector<Work>*>(graph);
  return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  unmake("executable graph", executable);
  return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t) {
  if (const cudaError_t status = fake.call("cudaGraphLaunch"); status != cudaSuccess) return status;
  for (const Work& work : *reinterpret_cast<std::vector<Work>*>(executable)) fake.enqueue(work);
  return cudaSuccess;
}

cublasStatus_t cublasLtCreate(cublasLtHandle_t* handle) {
  if (fake.call("cublasLtCreate") != cudaSuccess) return CUBLAS_STATUS_NOT_INITIALIZED;
  *handle = make<cublasLtContext>("cublasLt");
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle) {
  unmake("cublasLt", handle);
  return CUBLAS_STATUS_SUCCESS;
}
const char* cublasLtGetStatusString(cublasStatus_t) { return "what cuBLASLt says"; }
cublasStatus_t cublasLtMatrixLayoutInit_internal(cublasLtMatrixLayout_t layout, std::size_t, cudaDataType type, std::uint64_t rows,
                                                 std::uint64_t cols, std::int64_t ld) {
  const FakeLayout mine{static_cast<std::uint64_t>(type), rows, cols, ld};
  std::memcpy(layout->data, &mine, sizeof mine);
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescInit_internal(cublasLtMatmulDesc_t operation, std::size_t, cublasComputeType_t compute, cudaDataType_t) {
  const FakeOperation mine{CUBLAS_OP_N, CUBLAS_OP_N, CUBLASLT_EPILOGUE_DEFAULT, compute, nullptr};
  std::memcpy(operation->data, &mine, sizeof mine);
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t operation, cublasLtMatmulDescAttributes_t attribute, const void* from,
                                              std::size_t bytes) {
  FakeOperation mine;
  std::memcpy(&mine, operation->data, sizeof mine);
  const auto set = [&](auto& to) {
    CHECK(bytes == sizeof to);
    std::memcpy(&to, from, sizeof to);
  };
  switch (attribute) {
    case CUBLASLT_MATMUL_DESC_TRANSA: set(mine.of_a); break;
    case CUBLASLT_MATMUL_DESC_TRANSB: set(mine.of_b); break;
    case CUBLASLT_MATMUL_DESC_EPILOGUE: set(mine.epilogue); break;
    case CUBLASLT_MATMUL_DESC_BIAS_POINTER: set(mine.bias); break;
    default: return CUBLAS_STATUS_NOT_SUPPORTED;
  }
  std::memcpy(operation->data, &mine, sizeof mine);
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceInit_internal(cublasLtMatmulPreference_t, std::size_t) { return CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t, cublasLtMatmulPreferenceAttributes_t attribute, const void*,
                                                    std::size_t bytes) {
  CHECK(bytes == (attribute == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES ? 8U : 4U));
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t, cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
                                              cublasLtMatrixLayout_t, cublasLtMatrixLayout_t, cublasLtMatmulPreference_t, int asked,
                                              cublasLtMatmulHeuristicResult_t results[], int* found) {
  CHECK(asked == 1);
  results[0] = {};
  *found = 0;
  if (fake.call("cublasLtMatmulAlgoGetHeuristic") != cudaSuccess) return CUBLAS_STATUS_NOT_SUPPORTED;
  *found = 1;
  ++fake.heuristics;
  return CUBLAS_STATUS_SUCCESS;
}
/// D = epilogue(alpha·op(A)·op(B) + beta·C), column-major, of f32: as the documentation of cuBLASLt defines it.
cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t operation, const void* alpha, const void* a, cublasLtMatrixLayout_t a_layout,
                              const void* b, cublasLtMatrixLayout_t b_layout, const void* beta, const void* c, cublasLtMatrixLayout_t c_layout,
                              void* d, cublasLtMatrixLayout_t d_layout, const cublasLtMatmulAlgo_t* algorithm, void* workspace,
                              std::size_t workspace_bytes, cudaStream_t) {
  CHECK(algorithm != nullptr);
  CHECK(workspace_bytes == fake.memory.at(workspace));
  if (fake.call("cublasLtMatmul") != cudaSuccess) return CUBLAS_STATUS_EXECUTION_FAILED;
  FakeOperation op;
  std::memcpy(&op, operation->data, sizeof op);
  CHECK(op.compute == CUBLAS_COMPUTE_32F);
  const auto layout = [](cublasLtMatrixLayout_t from) {
    FakeLayout out;
    std::memcpy(&out, from->data, sizeof out);
    return out;
  };
  const FakeLayout la = layout(a_layout), lb = layout(b_layout), lc = layout(c_layout), ld = layout(d_layout);
  const bool ta = op.of_a == CUBLAS_OP_T, tb = op.of_b == CUBLAS_OP_T;
  const std::uint64_t rows = ta ? la.cols : la.rows, inner = ta ? la.rows : la.cols, cols = tb ? lb.rows : lb.cols;
  CHECK(inner == (tb ? lb.cols : lb.rows));
  for (const FakeLayout& out : {lc, ld}) {
    CHECK(out.rows == rows);
    CHECK(out.cols == cols);
  }
  for (const FakeLayout& one : {la, lb, lc, ld}) {
    CHECK(one.type == CUDA_R_32F);
    CHECK(one.ld >= static_cast<std::int64_t>(one.rows));
  }
  const float al = *static_cast<const float*>(alpha), be = *static_cast<const float*>(beta);
  fake.enqueue([=] {
    const auto at = [](const void* p, const FakeLayout& l, std::uint64_t i, std::uint64_t j) {
      return static_cast<const float*>(p) + i + j * static_cast<std::uint64_t>(l.ld);
    };
    for (std::uint64_t j = 0; j < cols; ++j)
      for (std::uint64_t i = 0; i < rows; ++i) {
        float sum = 0;
        for (std::uint64_t l = 0; l < inner; ++l) sum += (ta ? *at(a, la, l, i) : *at(a, la, i, l)) * (tb ? *at(b, lb, j, l) : *at(b, lb, l, j));
        sum *= al;
        if (be != 0) sum += be * *at(c, lc, i, j);
        const auto epilogue = static_cast<int>(op.epilogue);
        if (epilogue & CUBLASLT_EPILOGUE_BIAS) sum += static_cast<const float*>(op.bias)[i];
        if (epilogue & CUBLASLT_EPILOGUE_RELU && sum < 0) sum = 0;
        *const_cast<float*>(at(d, ld, i, j)) = sum;
      }
  });
  return CUBLAS_STATUS_SUCCESS;
}

}  // extern "C"

using m2lm::cuda::Device;
using m2lm_test::has;
using m2lm_test::message_of;

namespace {

/// A CUDA that is new, and has been given back all at the end of the scope.
struct Fresh {
  Fresh() { fake = FakeCuda(); }
  ~Fresh() { CHECK(fake.living() == 0); }
};

std::vector<float> random_floats(std::size_t count) {
  static std::mt19937 random(5);
  std::uniform_int_distribution<int> small(-4, 4);  // sums are exact
  std::vector<float> out(count);
  for (float& x : out) x = static_cast<float>(small(random));
  return out;
}

}  // namespace

TEST_CASE("Why there is no device follows from what CUDA answers") {
  const auto reason = [](cudaError_t status, int driver) {
    fake = FakeCuda();
    fake.count_status = status;
    fake.devices = 0;
    fake.driver = driver;
    std::string why;
    CHECK(m2lm::cuda::device_count(&why) == 0);
    CHECK(has(message_of<m2lm::DeviceError>([] { Device device(0); }), why));
    return why;
  };
  CHECK(has(reason(cudaErrorInsufficientDriver, 0), "no NVIDIA driver"));
  CHECK(has(reason(cudaErrorInsufficientDriver, 12020), "the NVIDIA driver is of CUDA 12.2, this program was built with CUDA 13.0"));
  CHECK(has(reason(cudaErrorNoDevice, 13000), "CUDA_VISIBLE_DEVICES"));
  CHECK(has(reason(cudaErrorSystemNotReady, 13000), "what CUDA says"));
}

TEST_CASE("A constructor that fails at any call throws and gives back what it had; too old a device is refused") {
  int failing = 0;
  for (;; ++failing) {
    CAPTURE(failing);
    const Fresh fresh;
    fake.fail_at = failing;
    bool made = false;
    const std::string message = message_of<m2lm::Error>([&] {
      const Device device(0);
      made = true;
    });
    if (made && fake.failed.empty()) break;
    if (made) continue;  // it was a call of the destructor
    CHECK(has(message, fake.failed));
    CHECK(has(message, fake.failed.starts_with("cublas") ? "what cuBLASLt says" : "what CUDA says"));
  }
  CHECK(failing > 10);

  const Fresh fresh;
  fake.capability = 7;
  CHECK(has(message_of<m2lm::DeviceError>([] { Device device(0); }), "compute capability 7.0; the kernels need 8.0"));
}

TEST_CASE("The device is made current for a call, and the caller's is put back") {
  const Fresh fresh;
  fake.devices = 3;
  fake.current = 1;
  Device device(2);
  CHECK(fake.current == 1);
  device.release(device.allocate_zeroed(10));
  device.synchronize();
  CHECK(fake.current == 1);
}

TEST_CASE("Copies go through two buffers, which are not written again before their bytes have been fetched") {
  const Fresh fresh;
  Device device(0);
  constexpr std::size_t size = std::size_t{100} << 20;  // several buffers
  auto* const there = static_cast<std::uint8_t*>(device.allocate(size));
  std::vector<std::uint8_t> expected(size), got(size);
  std::mt19937 random(3);
  for (auto& byte : expected) byte = static_cast<std::uint8_t>(random());
  // Pieces of all sizes, none of them waited for.
  for (std::size_t first = 0; first < size;) {
    const std::size_t count = std::min(size - first, std::size_t{1} << (random() % 25));
    device.copy_to_device(there + first, expected.data() + first, count);
    first += count;
  }
  CHECK(fake.alive["pinned"] == 2);
  device.copy_to_host(got.data(), there, size);
  CHECK((got == expected));

  // Small copies wait for nothing.
  const auto waits = device.waits();
  for (std::size_t i = 0; i < 10000; ++i) device.copy_to_device(there + i, expected.data() + i + 1, 1);
  CHECK(device.waits() == waits);
  device.copy_to_host(got.data(), there, 10000);
  CHECK((std::equal(got.begin(), got.begin() + 10000, expected.begin() + 1)));
  device.release(there);
}

TEST_CASE("Products as cuBLASLt is asked for them are x·wᵀ with bias, activation and residual, and a kernel is chosen once per shape") {
  const Fresh fresh;
  Device device(0);
  const auto upload = [&](const std::vector<float>& values) {
    auto* const p = static_cast<float*>(device.allocate(values.size() * sizeof(float)));
    device.copy_to_device(p, values.data(), values.size() * sizeof(float));
    return p;
  };
  constexpr std::int64_t m = 3, n = 5, k = 7;
  for (int variant = 0; variant < 64; ++variant) {
    CAPTURE(variant);
    const bool tx = variant & 1, tw = variant & 2, with_bias = variant & 4, relu = variant & 8, gaps = variant & 32;
    const bool with_residual = (variant & 16) && !relu;
    const std::int64_t gap = gaps ? 2 : 0, ldx = (tx ? m : k) + gap, ldw = (tw ? n : k) + gap, ldy = n + gap, ldr = n + 2 * gap;
    const auto x = random_floats(static_cast<std::size_t>((tx ? k : m) * ldx)), w = random_floats(static_cast<std::size_t>((tw ? k : n) * ldw)),
               bias = random_floats(n), residual = random_floats(m * ldr);
    const std::vector<float> before(static_cast<std::size_t>(m * ldy), -99.0F);
    float* const memory[] = {upload(x), upload(w), upload(bias), upload(residual), upload(before)};
    const m2lm::cuda::Product product{.dtype = m2lm::DType::f32,
                                      .x = memory[0],
                                      .ldx = ldx,
                                      .transpose_x = tx,
                                      .w = memory[1],
                                      .ldw = gaps ? ldw : 0,
                                      .transpose_w = tw,
                                      .m = m,
                                      .n = n,
                                      .k = k,
                                      .bias = with_bias ? memory[2] : nullptr,
                                      .activation = relu ? m2lm::Activation::relu : m2lm::Activation::none,
                                      .residual = with_residual ? memory[3] : nullptr,
                                      .ld_residual = with_residual ? ldr : 0,
                                      .y = memory[4],
                                      .ldy = ldy};
    device.multiply(product);
    const int asked = fake.heuristics;
    device.multiply(product);
    CHECK(fake.heuristics == asked);
    std::vector<float> y(before.size()), expected = before;
    device.copy_to_host(y.data(), memory[4], y.size() * sizeof(float));
    for (std::int64_t i = 0; i < m; ++i)
      for (std::int64_t j = 0; j < n; ++j) {
        float sum = 0;
        for (std::int64_t l = 0; l < k; ++l)
          sum += x[static_cast<std::size_t>(tx ? l * ldx + i : i * ldx + l)] * w[static_cast<std::size_t>(tw ? l * ldw + j : j * ldw + l)];
        if (with_bias) sum += bias[static_cast<std::size_t>(j)];
        if (relu && sum < 0) sum = 0;
        if (with_residual) sum += residual[static_cast<std::size_t>(i * ldr + j)];
        expected[static_cast<std::size_t>(i * ldy + j)] = sum;
      }
    CHECK((y == expected));
    for (float* p : memory) device.release(p);
  }
}

TEST_CASE("A step is captured the second time and launched from then on; graphs are given back") {
  const Fresh fresh;
  Device device(0);
  auto* const p = static_cast<std::uint8_t*>(device.allocate(8));
  const auto pinned = device.pinned(8);
  int bodies = 0;
  for (int i = 0; i < 5; ++i) {
    void* const early = device.allocate_zeroed(100);
    const std::uint64_t value = 0x0101010101010101U * (10U + static_cast<unsigned>(i));
    device.copy_to_device(p, &value, 8);
    CHECK(device.replay({{1}}, [&] {
      ++bodies;
      device.release(early);
      device.zero(p, 3);
      device.zero(p + 5, 1);
    }) == (i < 2));
    if (i >= 2) device.release(early);
    CHECK(fake.alive["memory"] == 2);  // the workspace and p
    device.copy_to_pinned(pinned.get(), p, 8, 3);
    device.wait_for(3);
    std::uint64_t got = 0;
    std::memcpy(&got, pinned.get(), 8);
    CHECK(got == (value & 0xffff00ffff000000U));
  }
  CHECK(bodies == 2);
  CHECK(fake.alive["executable graph"] == 1);
  CHECK(fake.alive["graph"] == 0);
  device.forget_replays();
  CHECK(fake.alive["executable graph"] == 0);
  device.release(p);
}

TEST_CASE("Whatever call fails, it is named, a capture is ended, and nothing is left behind") {
  int failing = 0;
  for (bool through = false; !through; ++failing) {
    CAPTURE(failing);
    const Fresh fresh;
    const std::string message = message_of<m2lm::Error>([&] {
      Device device(0);
      fake.calls = 0;
      fake.fail_at = failing;
      std::shared_ptr<void> pinned;
      std::vector<void*> mine;
      struct Release {
        Device& device;
        std::vector<void*>& mine;
        ~Release() {
          for (void* p : mine) device.release(p);
        }
      } release{device, mine};
      for (int i = 0; i < 2; ++i) mine.push_back(device.allocate_zeroed(256));
      auto* const x = static_cast<float*>(mine[0]);
      const float one = 1;
      device.copy_to_device(x, &one, sizeof one);
      pinned = device.pinned(64);
      for (int i = 0; i < 3; ++i)
        device.replay({{1}}, [&] {
          device.multiply({.dtype = m2lm::DType::f32, .x = x, .ldx = 4, .w = x, .m = 2, .n = 2, .k = 4, .y = mine[1], .ldy = 2});
          device.zero(x, 4);
        });
      device.copy_to_pinned(pinned.get(), x, 4, 0);
      device.wait_for(0);
      device.synchronize();
      through = fake.failed.empty();
    });
    CHECK(!fake.capturing);
    if (through || fake.failed.empty()) continue;
    if (message.empty()) {
      CHECK(fake.failed == "cudaStreamSynchronize");  // while memory is released, which throws nothing
      continue;
    }
    CHECK(has(message, fake.failed));
    if (!fake.failed.starts_with("cublas")) CHECK(has(message, "with CUDA_LAUNCH_BLOCKING=1"));
  }
  CHECK(failing > 15);
}

TEST_CASE("After a fault every call says so; memory that runs out is no fault, and names the sizes") {
  const Fresh fresh;
  Device device(0);
  auto* const p = device.allocate_zeroed(256);
  const std::string full = message_of<m2lm::CapacityError>([&] { static_cast<void>(device.allocate(std::size_t{2} << 30)); });
  CHECK(has(full, "2147483648 bytes of device memory were asked for"));
  CHECK(has(full, std::to_string(fake.total - fake.used) + " of " + std::to_string(fake.total) + " are free"));
  device.synchronize();

  fake.fail_at = fake.calls;
  fake.failure = cudaErrorIllegalAddress;
  device.multiply({.dtype = m2lm::DType::f32, .x = p, .ldx = 4, .w = p, .m = 0, .n = 2, .k = 4, .y = p, .ldy = 2});  // nothing to do
  const std::string first = message_of<m2lm::DeviceError>([&] { device.synchronize(); });
  CHECK(has(first, "cudaStreamSynchronize: what CUDA says (cudaErrorOfTheTest)"));
  const std::string later = message_of<m2lm::DeviceError>([&] { static_cast<void>(device.allocate(1)); });
  CHECK(has(later, "cannot be used any more after an earlier fault (cudaStreamSynchronize"));
  CHECK(has(later, "the CPU backend still works"));
  device.release(p);
}
