// linears made of a backend's kernels for linear, for where nothing is to be shared.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "backend/backend.h"
#include "graph/ops/linears.h"

namespace comfytp::backend {

class ComposedLinears final : public Kernel {
 public:
  /// `compile(node, in, out)` makes the backend's kernel of a node.
  template <typename Compile>
  ComposedLinears(const graph::Node& node, std::span<const Operand> in, std::span<const Operand> out, const Compile& compile)
      : all_(graph::linears_of(node.attrs)) {
    for (std::size_t k = 0; k < all_.size(); ++k) {
      const graph::Node linear{&graph::find_op("linear"), all_[k].attrs, {}, {}, node.name};
      kernels_.push_back(compile(linear, all_[k].operands(in), out.subspan(k, 1)));
      workspace_ = std::max(workspace_, kernels_.back()->workspace_bytes());
    }
  }
  std::int64_t workspace_bytes() const override { return workspace_; }
  void run(std::span<const void* const> in, std::span<void* const> out, void* workspace) override {
    for (std::size_t k = 0; k < all_.size(); ++k) kernels_[k]->run(all_[k].operands(in), out.subspan(k, 1), workspace);
  }

 private:
  std::vector<graph::LinearOfSeveral> all_;
  std::vector<std::unique_ptr<Kernel>> kernels_;
  std::int64_t workspace_ = 0;
};

}  // namespace comfytp::backend
