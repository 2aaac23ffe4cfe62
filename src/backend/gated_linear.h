// gated_linear made of a backend's kernels for linear and glu, for where it has nothing better.
#pragma once

#include <algorithm>
#include <array>
#include <memory>
#include <vector>

#include "backend/backend.h"
#include "graph/ops/glu.h"

namespace comfytp::backend {

/// The value's projection goes to the output, the gate's to the workspace, and the product over the value's. The linears add the biases,
/// so that they are rounded once.
class ComposedGatedLinear final : public Kernel {
 public:
  /// `compile(node, in, out)` makes the backend's kernel of a node.
  template <typename Compile>
  ComposedGatedLinear(const graph::Node& node, std::span<const Operand> in, std::span<const Operand> out, const Compile& compile)
      : gate_bytes_((out[0].type.bytes() + kPlaces - 1) / kPlaces * kPlaces) {
    const auto [value_bias, gate_bias] = graph::glu_biases(node.attrs, 3);
    biases_ = {value_bias, gate_bias};
    for (std::size_t i : {0, 1}) {
      const graph::Node linear{&graph::find_op("linear"), {{"epilogue", biases_[i] ? "bias" : ""}}, {}, {}, node.name};
      std::vector<Operand> operands = {in[0], in[1 + i]};
      if (biases_[i]) operands.push_back(in[biases_[i]]);
      linears_[i] = compile(linear, operands, out);
    }
    const graph::Node glu{&graph::find_op("glu"), {{"activation", node.attrs.text("activation")}, {"biases", ""}}, {}, {}, node.name};
    glu_ = compile(glu, std::array{out[0], out[0]}, out);
  }
  std::int64_t workspace_bytes() const override {
    return gate_bytes_ + std::max({linears_[0]->workspace_bytes(), linears_[1]->workspace_bytes(), glu_->workspace_bytes()});
  }
  void run(std::span<const void* const> in, std::span<void* const> out, void* workspace) override {
    void *gate = workspace, *work = static_cast<char*>(workspace) + gate_bytes_;
    for (std::size_t i : {0, 1}) {
      const std::array operands = {in[0], in[1 + i], biases_[i] ? in[biases_[i]] : nullptr};
      linears_[i]->run(std::span(operands).first(biases_[i] ? 3 : 2), std::array{i == 0 ? out[0] : gate}, work);
    }
    glu_->run(std::array<const void*, 2>{out[0], gate}, out, work);
  }

 private:
  static constexpr std::int64_t kPlaces = 256;  // what begins in a workspace, begins at a multiple
  std::int64_t gate_bytes_;
  std::array<std::size_t, 2> biases_{};  ///< numbers of the inputs; 0: none
  std::array<std::unique_ptr<Kernel>, 2> linears_;
  std::unique_ptr<Kernel> glu_;
};

}  // namespace comfytp::backend
