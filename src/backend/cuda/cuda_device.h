// One GPU: kernels on cuBLASLt, cuDNN and of the project's own, queued on one stream and replayed as CUDA graphs.
#pragma once

#include <optional>
#include <vector>

#include "backend/backend.h"
#include "backend/cuda/cuda_call_queue.h"
#include "backend/cuda/context.h"
#include "backend/cuda/staging.h"

namespace comfytp::backend::cuda {

class CudaDevice final : public Device {
 public:
  explicit CudaDevice(DeviceSpec spec) : spec_(std::move(spec)) {}
  ~CudaDevice() override;

  const DeviceSpec& spec() const override { return spec_; }
  void* queue() const override { return context_.stream; }
  void* side_queue() const override { return side_; }
  CallQueue* call_queue() override { return calls_ ? &*calls_ : nullptr; }
  void fork() override;
  std::size_t mark() override;
  void join(std::size_t ticket) override;
  graph::Fusion fusion() const override { return graph::Fusion::passes; }
  bool formats_agree() const override { return true; }
  bool multiplies_in_fp8() const override { return context_.multiplies_in_fp8(); }
  void attach() override;
  std::unique_ptr<Kernel> compile(const graph::Node& node, std::span<const Operand> in, std::span<const Operand> out) override;
  bool decodes(const graph::Node& node, std::size_t i) const override;
  void expect_compute(DType dtype) const override;
  void* allocate(std::int64_t bytes) override;
  void release(void* memory, std::int64_t bytes) override;
  std::unique_ptr<WeightWriter> weight_writer() override;
  std::unique_ptr<Recording> record(const std::function<void()>& launches) override;
  double time(const std::function<void()>& launches) override;
  void synchronize() override;
  void read(const TensorView& outside, void* data, const graph::Type& type, const graph::Order& order) override;
  void write(const void* data, const graph::Type& type, const graph::Order& order, const TensorView& outside) override;

 private:
  DeviceSpec spec_;
  Context context_;
  std::int64_t allocated_ = 0;
  PinnedBuffer staging_;
  std::int64_t staged_ = 0;  ///< bytes of staging_ in use since the last synchronize()
  struct HostWrite {
    std::int64_t offset;  ///< in staging_, dense and row-major, of the outside tensor's dtype
    TensorView outside;
  };
  std::vector<HostWrite> host_writes_;  ///< what synchronize() finishes
  /// A place for so many bytes in staging_; may synchronise.
  char* stage(std::int64_t bytes);
  std::optional<CudaCallQueue> calls_;
  cudaStream_t side_ = nullptr;
  std::vector<cudaEvent_t> events_;  ///< of fork() and mark() since record() began
  std::size_t used_ = 0;
  cudaEvent_t next_event();
};

}  // namespace comfytp::backend::cuda
