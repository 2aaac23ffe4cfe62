// The order between this device's stream, the caller's and those of other GPUs, and how calls end.
#pragma once

#include "backend/call_queue.h"
#include "backend/cuda/context.h"
#include "backend/cuda/staging.h"

namespace comfytp::backend::cuda {

class CudaCallQueue final : public CallQueue {
 public:
  explicit CudaCallQueue(const Context& context);
  ~CudaCallQueue() override;
  CudaCallQueue(const CudaCallQueue&) = delete;
  CudaCallQueue& operator=(const CudaCallQueue&) = delete;

  bool here() const override;
  void follow(void* theirs) override;
  void lead(void* theirs) override;
  void* moment() override;
  void await(void* moment) override;
  void* allocate_shared(std::int64_t bytes) override;
  void release_shared(void* memory) override;
  std::vector<Digest> digest(const std::vector<TensorView>& tensors) override;
  void end(CallState* state, std::uint32_t number, const std::vector<const std::uint32_t*>& faults, const std::vector<TensorView>& outputs) override;

 private:
  const Context& context_;
  cudaEvent_t theirs_ = nullptr, moment_ = nullptr;
  PinnedBuffer digests_;
};

}  // namespace comfytp::backend::cuda
