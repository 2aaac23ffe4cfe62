#include "backend/cuda/cuda_device.h"

#include <algorithm>
#include <utility>

#include "backend/alignment.h"
#include "backend/cuda/copy_plan.h"
#include "backend/cuda/kernel_table.h"
#include "backend/cuda/tuning.h"
#include "backend/cuda/weight_writer.h"

namespace comfytp::backend::cuda {
namespace {

constexpr std::int64_t kStagingBytes = std::int64_t{4} << 20;

class GraphRecording final : public Recording {
 public:
  GraphRecording(cudaStream_t stream, cudaGraph_t graph) : stream_(stream) {
    check(cudaGraphInstantiate(&executable_, graph, 0), "instantiating a graph");
    check(cudaGraphUpload(executable_, stream_), "uploading a graph");
  }
  ~GraphRecording() override { cudaGraphExecDestroy(executable_); }
  void replay() override { check(cudaGraphLaunch(executable_, stream_), "launching a graph"); }

 private:
  cudaStream_t stream_;
  cudaGraphExec_t executable_ = nullptr;
};

}  // namespace

void CudaDevice::attach() {
  context_.ordinal = spec_.index;
  context_.name = spec_.name();
  check(cudaSetDevice(spec_.index), "choosing the device");
  check(cudaGetDeviceProperties(&context_.properties, spec_.index), "asking for the device's properties");
  check(cudaStreamCreateWithFlags(&context_.stream, cudaStreamNonBlocking), "making a stream");
  int least = 0, most = 0;
  check(cudaDeviceGetStreamPriorityRange(&least, &most), "asking for priorities");
  check(cudaStreamCreateWithPriority(&side_, cudaStreamNonBlocking, most), "making a stream");  // what it copies is waited for soon
  check(cublasLtCreate(&context_.cublas), "starting cuBLASLt");
  check(cudnnCreate(&context_.cudnn), "starting cuDNN");
  check(cudnnSetStream(context_.cudnn, context_.stream), "giving cuDNN a stream");
  calls_.emplace(context_);
}

CudaDevice::~CudaDevice() {
  for (auto event : events_) cudaEventDestroy(event);
  if (side_) cudaStreamDestroy(side_);
  calls_.reset();
  if (context_.cudnn) cudnnDestroy(context_.cudnn);
  if (context_.cublas) cublasLtDestroy(context_.cublas);
  if (context_.stream) cudaStreamDestroy(context_.stream);
}

std::unique_ptr<Kernel> CudaDevice::compile(const graph::Node& node, std::span<const Operand> in, std::span<const Operand> out) {
  const auto* entry = find_kernel(node);
  require(entry, "[{}] {} has no kernel for this op", node.op->name(), spec_.name());
  try {
    return entry->make({node, in, out, context_});
  } catch (const DeviceFailure&) {
    throw;
  } catch (const Error&) {  // of a device that has failed before, a library may say that it has nothing for it
    if (const auto status = cudaStreamQuery(context_.stream); status != cudaErrorNotReady) check(status, "an earlier failure");
    throw;
  }
}

bool CudaDevice::decodes(const graph::Node& node, std::size_t i) const {
  const auto* entry = find_kernel(node);
  if (!entry) return false;
  return std::find(entry->decodes.begin(), entry->decodes.end(), i) != entry->decodes.end() || (entry->also_decodes && entry->also_decodes(node, i));
}

void CudaDevice::expect_compute(DType dtype) const {
  require(dtype == DType::f32 || dtype == DType::f16 || dtype == DType::bf16, "[devices] {} computes in f32, f16 or bf16 but not in {}",
          spec_.name(), name_of(dtype));
  require(dtype != DType::bf16 || context_.properties.major >= 8, "[devices] {} ({}) cannot compute in bf16; use f16 or f32", spec_.name(),
          context_.properties.name);
}

void* CudaDevice::allocate(std::int64_t bytes) {
  spec_.expect_room(allocated_, bytes);
  void* memory = nullptr;
  if (cudaMalloc(&memory, static_cast<std::size_t>(std::max<std::int64_t>(bytes, 1))) != cudaSuccess) {
    cudaGetLastError();
    std::size_t free = 0, total = 0;
    cudaMemGetInfo(&free, &total);
    throw OutOfMemory(fmt::format("[memory] {} needs {} more, has {} in use here and {} free of {}", spec_.name(), bytes_text(bytes),
                                  bytes_text(allocated_), bytes_text(static_cast<std::int64_t>(free)), bytes_text(static_cast<std::int64_t>(total))));
  }
  allocated_ += bytes;
  return memory;
}

void CudaDevice::release(void* memory, std::int64_t bytes) {
  if (!memory) return;
  cudaFree(memory);  // waits for what still uses it
  allocated_ -= bytes;
}

std::unique_ptr<WeightWriter> CudaDevice::weight_writer() { return make_weight_writer(context_); }

std::unique_ptr<Recording> CudaDevice::record(const std::function<void()>& launches) {
  tuning_of(context_).save();  // all kernels are made when their launches are recorded
  cudaGraph_t graph = nullptr;
  used_ = 0;
  check(cudaStreamBeginCapture(context_.stream, cudaStreamCaptureModeThreadLocal), "recording launches");
  try {
    launches();
  } catch (...) {
    cudaStreamEndCapture(context_.stream, &graph);
    if (graph) cudaGraphDestroy(graph);
    cudaGetLastError();
    throw;
  }
  check(cudaStreamEndCapture(context_.stream, &graph), "recording launches");
  try {
    auto recording = std::make_unique<GraphRecording>(context_.stream, graph);
    cudaGraphDestroy(graph);
    return recording;
  } catch (...) {
    cudaGraphDestroy(graph);
    throw;
  }
}

cudaEvent_t CudaDevice::next_event() {
  if (used_ == events_.size()) {
    cudaEvent_t event = nullptr;
    check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "making an event");
    events_.push_back(event);
  }
  return events_[used_++];
}

void CudaDevice::fork() {
  const auto event = next_event();
  check(cudaEventRecord(event, context_.stream), "forking a stream");
  check(cudaStreamWaitEvent(side_, event), "forking a stream");
}

std::size_t CudaDevice::mark() {
  check(cudaEventRecord(next_event(), side_), "joining streams");
  return used_ - 1;
}

void CudaDevice::join(std::size_t ticket) { check(cudaStreamWaitEvent(context_.stream, events_.at(ticket)), "joining streams"); }

// In a graph, so that what launching costs the host does not count.
double CudaDevice::time(const std::function<void()>& launches) {
  constexpr int kCalls = 10, kRounds = 3;
  const auto recording = record([&] {
    for (int i = 0; i < kCalls; ++i) launches();
  });
  cudaEvent_t start = nullptr, stop = nullptr;
  check(cudaEventCreate(&start), "making an event");
  check(cudaEventCreate(&stop), "making an event");
  float best = 0;
  for (int round = 0; round <= kRounds; ++round) {  // the first only warms up
    cudaEventRecord(start, context_.stream);
    recording->replay();
    cudaEventRecord(stop, context_.stream);
    check(cudaEventSynchronize(stop), "running");
    float ms = 0;
    cudaEventElapsedTime(&ms, start, stop);
    if (round == 1 || (round > 1 && ms < best)) best = ms;
  }
  cudaEventDestroy(start);
  cudaEventDestroy(stop);
  return best / 1e3 / kCalls;
}

void CudaDevice::synchronize() {
  const auto writes = std::exchange(host_writes_, {});  // of a failed call nothing is written later, when its memory may be gone
  check(cudaStreamSynchronize(context_.stream), "running");
  staged_ = 0;
  for (const auto& w : writes)
    copy(TensorView::dense(staging_.data() + w.offset, w.outside.dtype, w.outside.shape), w.outside);
}

char* CudaDevice::stage(std::int64_t bytes) {
  if (staged_ + bytes > staging_.bytes()) {
    synchronize();
    staging_.reserve(std::max(bytes, kStagingBytes));
  }
  char* place = staging_.data() + staged_;
  staged_ += aligned(bytes);
  return place;
}

// The GPU converts and reorders: from page-locked memory it reads through the bus itself.
void CudaDevice::read(const TensorView& outside, void* data, const graph::Type& type, const graph::Order& order) {
  require(outside.shape == type.shape, "[copy] expected shape {} but got {}", to_string(type.shape), to_string(outside.shape));
  const auto strides = graph::strides_of(type.shape, order);
  if (!outside.host) {
    const auto plan = plan_copy(type.shape, outside.dtype, outside.strides, type.dtype, strides);
    return check(launch_copy(plan, outside.data, data, context_.stream), "copying");
  }
  char* staged = stage(outside.bytes());
  const auto dense = TensorView::dense(staged, outside.dtype, outside.shape);
  copy(outside, dense);
  if (outside.dtype == type.dtype && graph::same_memory(type.shape, order, graph::row_major(type.shape.size())))
    return check(cudaMemcpyAsync(data, staged, static_cast<std::size_t>(type.bytes()), cudaMemcpyHostToDevice, context_.stream), "copying to the device");
  check(launch_copy(plan_copy(type.shape, outside.dtype, dense.strides, type.dtype, strides), staged, data, context_.stream), "copying to the device");
}

void CudaDevice::write(const void* data, const graph::Type& type, const graph::Order& order, const TensorView& outside) {
  require(outside.shape == type.shape, "[copy] expected shape {} but got {}", to_string(type.shape), to_string(outside.shape));
  const auto strides = graph::strides_of(type.shape, order);
  if (!outside.host) {
    const auto plan = plan_copy(type.shape, type.dtype, strides, outside.dtype, outside.strides);
    return check(launch_copy(plan, data, outside.data, context_.stream), "copying");
  }
  char* staged = stage(outside.bytes());
  check(launch_copy(plan_copy(type.shape, type.dtype, strides, outside.dtype, row_major_strides(type.shape)), data, staged, context_.stream),
        "copying from the device");
  host_writes_.push_back({staged - staging_.data(), outside});
}

}  // namespace comfytp::backend::cuda
