#include "backend/cpu/decoding.h"

#include <array>

#include "backend/cpu/copy_plan.h"
#include "backend/cpu/onednn.h"
#include "backend/cpu/workspace.h"
#include "base/error.h"

namespace comfytp::backend::cpu {
namespace {

struct Decode {
  std::size_t input;
  const WeightBuffer* weight;
  std::int64_t plain = -1;    ///< workspace for the unpacked weight, where it has a format
  std::int64_t decoded = -1;  ///< workspace for the converted weight, where it is stored in another dtype
  DType dtype;
};

class DecodingKernel final : public Kernel {
 public:
  DecodingKernel(std::unique_ptr<Kernel> kernel, std::vector<Decode> decodes, std::size_t inputs)
      : kernel_(std::move(kernel)), decodes_(std::move(decodes)), inputs_(inputs) {
    own_ = workspace_.take(kernel_->workspace_bytes());
    for (auto& d : decodes_) {
      const auto count = numel(d.weight->shape);
      if (d.weight->format) d.plain = workspace_.take(d.weight->bytes());
      if (d.weight->stored != d.dtype) {
        d.decoded = workspace_.take(count * size_of(d.dtype));
        const Shape step = {1};
        plans_.emplace_back(Shape{count}, d.weight->stored, step, d.dtype, step);
      }
    }
  }
  std::int64_t workspace_bytes() const override { return workspace_.bytes(); }
  void run(std::span<const void* const> in, std::span<void* const> out, void* workspace) override {
    std::array<const void*, 64> inputs;
    std::copy(in.begin(), in.end(), inputs.begin());
    auto plan = plans_.begin();
    for (const auto& d : decodes_) {
      const void*& data = inputs[d.input];
      if (d.plain >= 0) {
        reorder(*packed_desc(*d.weight), data, dense(d.weight->shape, d.weight->stored), at(workspace, d.plain));
        data = at(workspace, d.plain);
      }
      if (d.decoded >= 0) {
        (plan++)->run(data, at(workspace, d.decoded));
        data = at(workspace, d.decoded);
      }
    }
    kernel_->run({inputs.data(), inputs_}, out, at(workspace, own_));
  }

 private:
  std::unique_ptr<Kernel> kernel_;
  std::vector<Decode> decodes_;
  std::vector<CopyPlan> plans_;
  std::size_t inputs_;
  Workspace workspace_;
  std::int64_t own_ = 0;
};

}  // namespace

std::unique_ptr<Kernel> compile_decoding(const KernelEntry& entry, const Site& site) {
  require(site.in.size() <= 64, "[{}] expected at most 64 inputs but got {}", site.node.op->name(), site.in.size());
  std::vector<Operand> plain(site.in.begin(), site.in.end());
  std::vector<Decode> decodes;
  for (std::size_t i = 0; i < plain.size(); ++i) {
    auto* weight = std::exchange(plain[i].weight, static_cast<int>(i) == entry.weight_input ? plain[i].weight : nullptr);
    if (!weight || plain[i].weight) continue;
    if (!weight->format) weight->packable = false;  // this kernel counts on row-major from now on
    if (weight->format || weight->stored != plain[i].type.dtype) decodes.push_back({i, weight, -1, -1, plain[i].type.dtype});
  }
  auto kernel = entry.make({site.node, plain, site.out, site.threads});
  if (decodes.empty()) return kernel;
  return std::make_unique<DecodingKernel>(std::move(kernel), std::move(decodes), plain.size());
}

}  // namespace comfytp::backend::cpu
