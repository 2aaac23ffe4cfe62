// pointwise: a chain of elementwise steps in one pass over memory. fuse() makes it on a device's graph.
#include "base/error.h"
#include "graph/graph.h"
#include "graph/ops/steps.h"

namespace comfytp::graph {
namespace {

// Inputs: x, the operands of the steps. Attributes: steps, and where one of them is bias: channel, its dimension of x; dtype of the result,
// x's unless given.
class Pointwise final : public Op {
 public:
  std::string_view name() const override { return "pointwise"; }
  std::vector<Type> infer(const Attrs& a, std::span<const Type> in) const override {
    expect_inputs(name(), in, 1, 1 + 2 * kMostSteps);
    require(is_float(in[0].dtype), "[pointwise] expected a float x but got {}", to_string(in[0]));
    const auto next = check_steps(name(), a.text("steps"), in, 1, in[0], channel_of(a));
    require(next == in.size(), "[pointwise] expected {} inputs but got {}", next, in.size());
    const Type y{dtype_or(a, "dtype", in[0].dtype), in[0].shape};
    std::vector<Type> types(in.begin(), in.end());
    types.push_back(y);
    check_dtypes(name(), types);
    return {y};
  }
  // Operands of the full shape lie as x does; broadcast ones are small and stay as they are.
  Layout layout(const OpContext& op, std::span<const Order> produced) const override {
    const auto &steps = op.attrs.text("steps");
    const bool moves = takes_pairs(steps) && produced[0].back() + 1 != static_cast<int>(produced[0].size());
    const Order order = moves ? row_major(produced[0].size()) : produced[0];
    Layout layout{{produced.begin(), produced.end()}, {order}};
    layout.in[0] = order;
    lay_operands(steps, op, 1, order, layout);
    return layout;
  }
  bool in_place(const OpContext& op, std::size_t i) const override { return op.in[i] == op.out[0]; }
  double flops(const OpContext& op) const override {
    return steps_flops(op.attrs.text("steps")) * static_cast<double>(numel(op.out[0].shape));
  }
  void reference(const OpContext& op, std::span<const RefTensor> in, std::span<RefTensor> out) const override {
    out[0] = in[0];
    steps_reference(op.attrs.text("steps"), in.subspan(1), channel_of(op.attrs), out[0]);
  }

 private:
  static std::size_t channel_of(const Attrs& a) { return static_cast<std::size_t>(a.integer_or("channel", -1)); }
};
COMFYTP_OP(Pointwise)

}  // namespace
}  // namespace comfytp::graph
