// A virtual device: some cores of this machine, with kernels on oneDNN and of the project's own.
#pragma once

#include <vector>

#include "backend/host_device.h"

namespace comfytp::backend::cpu {

class CpuDevice final : public HostDevice {
 public:
  /// Share `position` of `count` of the cores that the process may use; at least one core.
  CpuDevice(DeviceSpec spec, int position, int count);

  const DeviceSpec& spec() const override { return spec_; }
  void attach() override;
  std::unique_ptr<Kernel> compile(const graph::Node& node, std::span<const Operand> in, std::span<const Operand> out) override;
  bool decodes(const graph::Node& node, std::size_t i) const override;
  void expect_compute(DType dtype) const override;
  void* allocate(std::int64_t bytes) override;
  void release(void* memory, std::int64_t bytes) override;
  void read(const TensorView& outside, void* data, const graph::Type& type, const graph::Order& order) override;
  void write(const void* data, const graph::Type& type, const graph::Order& order, const TensorView& outside) override;

 private:
  DeviceSpec spec_;
  std::vector<int> cores_;
  int threads_ = 1;
  std::int64_t allocated_ = 0;
};

}  // namespace comfytp::backend::cpu
