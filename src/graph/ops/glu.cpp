// glu: the product of a gated feed-forward (Shazeer 2020), with the biases of the two projections before it:
// (value + bias) * activation(gate + bias), in one pass over memory. fuse() makes it on a device's graph.
#include "graph/ops/glu.h"

#include "base/error.h"
#include "graph/graph.h"
#include "graph/ops/row_norm.h"
#include "graph/ops/steps.h"

namespace comfytp::graph {
namespace {

// Inputs: value [.., c], gate [.., c], value's bias [c], gate's bias [c]. Attributes: activation (gelu, gelu_tanh, silu or
// sigmoid); biases: which there are ("", "value", "gate" or "value,gate").
class Glu final : public Op {
 public:
  std::string_view name() const override { return "glu"; }
  std::vector<Type> infer(const Attrs& a, std::span<const Type> in) const override {
    expect_inputs(name(), in, 2, 4);
    require(is_float(in[0].dtype) && !in[0].shape.empty() && in[1] == in[0],
            "[glu] expected a float value [..,c] and a gate alike but got {} and {}", to_string(in[0]), to_string(in[1]));
    const auto &activation = a.text("activation"), &biases = a.text("biases");
    require(activation == "gelu" || activation == "gelu_tanh" || activation == "silu" || activation == "sigmoid",
            "[glu] expected activation gelu, gelu_tanh, silu or sigmoid but got '{}'", activation);
    require(biases.empty() || biases == "value" || biases == "gate" || biases == "value,gate",
            "[glu] expected biases '', 'value', 'gate' or 'value,gate' but got '{}'", biases);
    const auto count = 2 + steps_of(biases).size();
    require(in.size() == count, "[glu] expected {} inputs for biases '{}' but got {}", count, biases, in.size());
    const Type bias{in[0].dtype, {in[0].shape.back()}};
    for (std::size_t i = 2; i < count; ++i)
      require(in[i] == bias, "[glu] expected biases {} but got {}", to_string(bias), to_string(in[i]));
    return {in[0]};
  }
  Layout layout(const OpContext& op, std::span<const Order> produced) const override {
    const Order rows = rows_order(produced[0]);
    Layout layout{{rows, rows}, {rows}};
    for (std::size_t i = 2; i < op.in.size(); ++i) layout.in.push_back(row_major(1));
    return layout;
  }
  bool in_place(const OpContext&, std::size_t i) const override { return i < 2; }
  double flops(const OpContext& op) const override { return 10.0 * static_cast<double>(numel(op.out[0].shape)); }
  void reference(const OpContext& op, std::span<const RefTensor> in, std::span<RefTensor> out) const override {
    const auto [value_bias, gate_bias] = glu_biases(op.attrs, 2);
    const auto last = in[0].shape.size() - 1;
    RefTensor gate = in[1];
    if (gate_bias) steps_reference("bias", in.subspan(gate_bias), last, gate);
    steps_reference(op.attrs.text("activation"), {}, last, gate);
    out[0] = in[0];
    if (value_bias) steps_reference("bias", in.subspan(value_bias), last, out[0]);
    steps_reference("mul", {&gate, 1}, last, out[0]);
  }
};
COMFYTP_OP(Glu)

}  // namespace
}  // namespace comfytp::graph
