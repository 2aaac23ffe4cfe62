// What devices share that compute in the host's memory and have run a kernel when it returns.
#pragma once

#include "backend/backend.h"

namespace comfytp::backend {

class HostDevice : public Device {
 public:
  graph::Fusion fusion() const override { return graph::Fusion::epilogues; }
  std::unique_ptr<WeightWriter> weight_writer() override;
  std::unique_ptr<Recording> record(const std::function<void()>&) override { return nullptr; }
  double time(const std::function<void()>& launches) override;
  void synchronize() override {}
};

}  // namespace comfytp::backend
