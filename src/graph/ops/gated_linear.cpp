// gated_linear: a gated feed-forward's two projections and their product (Shazeer 2020), (x v^T + value's bias) * activation(x g^T + gate's bias), so
// that a backend need not write the projections to memory. fuse() makes it on a device's graph, of two linears and a glu.
#include "base/error.h"
#include "graph/graph.h"
#include "graph/ops/row_norm.h"

namespace comfytp::graph {
namespace {

// Inputs: x [.., i], value's weight [o, i], gate's weight [o, i], the biases [o]. Attributes: glu's.
class GatedLinear final : public Op {
 public:
  std::string_view name() const override { return "gated_linear"; }
  std::vector<Type> infer(const Attrs& a, std::span<const Type> in) const override {
    expect_inputs(name(), in, 3, 5);
    require(in[1] == in[2], "[gated_linear] expected weights alike but got {} and {}", to_string(in[1]), to_string(in[2]));
    const auto projected = find_op("linear").infer({}, in.first(2))[0];
    return find_op("glu").infer(a, projections(in, projected));
  }
  Layout layout(const OpContext& op, std::span<const Order>) const override {
    Layout layout;
    for (const auto& type : op.in) layout.in.push_back(row_major(type.shape.size()));
    layout.out = {row_major(op.out[0].shape.size())};
    return layout;
  }
  double flops(const OpContext& op) const override {
    return (4.0 * static_cast<double>(op.in[0].shape.back()) + 10.0) * static_cast<double>(numel(op.out[0].shape));
  }
  void reference(const OpContext& op, std::span<const RefTensor> in, std::span<RefTensor> out) const override {
    const auto& linear = find_op("linear");
    const Attrs plain;
    std::vector<RefTensor> parts;
    for (std::size_t i : {1, 2}) {
      const std::vector<RefTensor> operands = {in[0], in[i]};
      RefTensor part = out[0];
      linear.reference({plain, {op.in[0], op.in[i]}, {op.out[0]}}, operands, {&part, 1});
      parts.push_back(std::move(part));
    }
    parts.insert(parts.end(), in.begin() + 3, in.end());
    find_op("glu").reference({op.attrs, projections(op.in, op.out[0]), {op.out[0]}}, parts, out);
  }

 private:
  // What the glu of the projections reads.
  static std::vector<Type> projections(std::span<const Type> in, const Type& projected) {
    std::vector<Type> types = {projected, projected};
    types.insert(types.end(), in.begin() + 3, in.end());
    return types;
  }
};
COMFYTP_OP(GatedLinear)

}  // namespace
}  // namespace comfytp::graph
