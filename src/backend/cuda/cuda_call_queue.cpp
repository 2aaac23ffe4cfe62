#include "backend/cuda/cuda_call_queue.h"

#include "backend/cuda/call_end.h"
#include "backend/cuda/copy_plan.h"
#include "backend/cuda/status.h"

namespace comfytp::backend::cuda {

CudaCallQueue::CudaCallQueue(const Context& context) : context_(context) {
  check(cudaEventCreateWithFlags(&theirs_, cudaEventDisableTiming), "making an event");
  check(cudaEventCreateWithFlags(&moment_, cudaEventDisableTiming), "making an event");
}

CudaCallQueue::~CudaCallQueue() {
  cudaEventDestroy(theirs_);
  cudaEventDestroy(moment_);
}

bool CudaCallQueue::here() const {
  int current = -1;
  return cudaGetDevice(&current) == cudaSuccess && current == context_.ordinal;
}

// A wait is for what the event stood for when it was queued: one event serves all waits.
void CudaCallQueue::follow(void* theirs) {
  check(cudaEventRecord(theirs_, static_cast<cudaStream_t>(theirs)), "waiting for the caller's stream");
  check(cudaStreamWaitEvent(context_.stream, theirs_), "waiting for the caller's stream");
}

void CudaCallQueue::lead(void* theirs) {
  check(cudaEventRecord(theirs_, context_.stream), "letting the caller's stream wait");
  check(cudaStreamWaitEvent(static_cast<cudaStream_t>(theirs), theirs_), "letting the caller's stream wait");
}

void* CudaCallQueue::moment() {
  check(cudaEventRecord(moment_, context_.stream), "telling another device");
  return moment_;
}

void CudaCallQueue::await(void* moment) {
  check(cudaStreamWaitEvent(context_.stream, static_cast<cudaEvent_t>(moment)), "waiting for another device");
}

void* CudaCallQueue::allocate_shared(std::int64_t bytes) {
  void* memory = nullptr;
  check(cudaHostAlloc(&memory, static_cast<std::size_t>(bytes), cudaHostAllocPortable | cudaHostAllocMapped), "page-locked host memory");
  return memory;
}

void CudaCallQueue::release_shared(void* memory) { cudaFreeHost(memory); }

std::vector<Digest> CudaCallQueue::digest(const std::vector<TensorView>& tensors) {
  const auto each = std::int64_t{kDigestBlocks} * static_cast<std::int64_t>(sizeof(Digest));
  auto* partial = digests_.reserve(each * static_cast<std::int64_t>(tensors.size()));
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const auto& t = tensors[i];
    const auto elements = plan_copy(t.shape, t.dtype, t.strides, t.dtype, row_major_strides(t.shape));
    check(launch_digest(elements, t.data, partial + static_cast<std::int64_t>(i) * each, context_.stream), "comparing a prompt");
  }
  check(cudaStreamSynchronize(context_.stream), "running");
  std::vector<Digest> digests(tensors.size());
  const auto* sums = reinterpret_cast<const Digest*>(partial);
  for (auto& digest : digests)
    for (int b = 0; b < kDigestBlocks; ++b, ++sums)
      for (std::size_t k = 0; k < digest.size(); ++k) digest[k] += (*sums)[k];
  return digests;
}

void CudaCallQueue::end(CallState* state, std::uint32_t number, const std::vector<const std::uint32_t*>& faults,
                        const std::vector<TensorView>& outputs) {
  Faults all;
  require(faults.size() <= kMostFaults, "[run] expected at most {} ends of groups but got {}", kMostFaults, faults.size());
  for (const auto* word : faults) all.words[all.count++] = word;
  for (const auto& t : outputs)
    check(launch_end(plan_copy(t.shape, t.dtype, t.strides, t.dtype, t.strides), t.data, all, state, context_.stream), "ending a call");
  check(launch_done(state, number, context_.stream), "ending a call");
}

}  // namespace comfytp::backend::cuda
