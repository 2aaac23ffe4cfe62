// A device that does what another does, but for what a test changes.
#pragma once

#include "backend/backend.h"

namespace comfytp::test {

class WrappedDevice : public backend::Device {
 public:
  explicit WrappedDevice(std::unique_ptr<backend::Device> device) : device_(std::move(device)) {}

  const backend::DeviceSpec& spec() const override { return device_->spec(); }
  void* queue() const override { return device_->queue(); }
  void* side_queue() const override { return device_->side_queue(); }
  void fork() override { device_->fork(); }
  std::size_t mark() override { return device_->mark(); }
  void join(std::size_t ticket) override { device_->join(ticket); }
  backend::CallQueue* call_queue() override { return device_->call_queue(); }
  graph::Fusion fusion() const override { return device_->fusion(); }
  bool multiplies_in_fp8() const override { return device_->multiplies_in_fp8(); }
  void attach() override { device_->attach(); }
  std::unique_ptr<backend::Kernel> compile(const graph::Node& node, std::span<const backend::Operand> in,
                                           std::span<const backend::Operand> out) override {
    return device_->compile(node, in, out);
  }
  bool decodes(const graph::Node& node, std::size_t i) const override { return device_->decodes(node, i); }
  void expect_compute(DType dtype) const override { device_->expect_compute(dtype); }
  void* allocate(std::int64_t bytes) override { return device_->allocate(bytes); }
  void release(void* memory, std::int64_t bytes) override { device_->release(memory, bytes); }
  std::unique_ptr<backend::WeightWriter> weight_writer() override { return device_->weight_writer(); }
  std::unique_ptr<backend::Recording> record(const std::function<void()>& launches) override { return device_->record(launches); }
  double time(const std::function<void()>& launches) override { return device_->time(launches); }
  void synchronize() override { device_->synchronize(); }
  void read(const TensorView& outside, void* data, const graph::Type& type, const graph::Order& order) override {
    device_->read(outside, data, type, order);
  }
  void write(const void* data, const graph::Type& type, const graph::Order& order, const TensorView& outside) override {
    device_->write(data, type, order, outside);
  }

 private:
  std::unique_ptr<backend::Device> device_;
};

}  // namespace comfytp::test
