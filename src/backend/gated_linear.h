// gated_linear made of a backend's kernels for linear and glu, for where it has nothing better.
#pragma once

#include <algorithm>
#include <array>
#include <memory>
#include <vector>

#include "backend/backend.h"

namespace comfytp::backend {

/// The value's projection goes to the output, the gate's to the workspace, and the product over the value's.
class ComposedGatedLinear final : public Kernel {
 public:
  /// `compile(node, in, out)` makes the backend's kernel of a node.
  template <typename Compile>
  ComposedGatedLinear(const graph::Node& node, std::span<const Operand> in, std::span<const Operand> out, const Compile& compile)
      : gate_bytes_((out[0].type.bytes() + kPlaces - 1) / kPlaces * kPlaces) {
    const graph::Node linear{&graph::find_op("linear"), {}, {}, {}, node.name}, glu{&graph::find_op("glu"), node.attrs, {}, {}, node.name};
    kernels_[0] = compile(linear, std::array{in[0], in[1]}, out);
    kernels_[1] = compile(linear, std::array{in[0], in[2]}, out);
    std::vector<Operand> operands = {out[0], out[0]};
    operands.insert(operands.end(), in.begin() + 3, in.end());
    kernels_[2] = compile(glu, operands, out);
  }
  std::int64_t workspace_bytes() const override {
    std::int64_t most = 0;
    for (const auto& kernel : kernels_) most = std::max(most, kernel->workspace_bytes());
    return gate_bytes_ + most;
  }
  void run(std::span<const void* const> in, std::span<void* const> out, void* workspace) override {
    void *gate = workspace, *work = static_cast<char*>(workspace) + gate_bytes_;
    kernels_[0]->run(std::array{in[0], in[1]}, out, work);
    kernels_[1]->run(std::array{in[0], in[2]}, std::array{gate}, work);
    std::vector<const void*> operands = {out[0], gate};
    operands.insert(operands.end(), in.begin() + 3, in.end());
    kernels_[2]->run(operands, out, work);
  }

 private:
  static constexpr std::int64_t kPlaces = 256;  // what begins in a workspace, begins at a multiple
  std::int64_t gate_bytes_;
  std::array<std::unique_ptr<Kernel>, 3> kernels_;
};

}  // namespace comfytp::backend
