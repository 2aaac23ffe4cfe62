// linear: y[.., o] = sum over i of x[.., i] w[o, i], then the epilogue.
#include "base/error.h"
#include "graph/graph.h"
#include "graph/ops/epilogue.h"

namespace comfytp::graph {
namespace {

// Inputs: x [.., i], w [o, i], the epilogue's operands. Attributes: epilogue (optional), product (optional): "fp8" lets a device round x to
// fp8 e4m3, by one scale that brings its largest value to the largest of that type, where w is stored in fp8 and the device multiplies in it.
class Linear final : public Op {
 public:
  std::string_view name() const override { return "linear"; }
  std::vector<Type> infer(const Attrs& a, std::span<const Type> in) const override {
    expect_inputs(name(), in, 2, 8);
    expect_rank(name(), "w", in[1], 2);
    require(!in[0].shape.empty() && in[0].shape.back() == in[1].shape[1] && in[0].dtype == in[1].dtype,
            "[linear] expected x [..,i] and w [o,i] of one dtype but got {} and {}", to_string(in[0]), to_string(in[1]));
    const auto product = a.text_or("product", "fp8");
    require(product == "fp8", "[linear] expected product fp8 or none but got '{}'", product);
    Type out = in[0];
    out.shape.back() = in[1].shape[0];
    check_epilogue(name(), a, in, 2, out, out.shape.size() - 1);
    return {out};
  }
  Rule rule(const OpContext& op) const override {
    Rule rule;
    Shape rows = op.in[0].shape;
    rows.pop_back();
    auto x = free_dims(rule, rows, "row");
    auto y = x;
    const int i = rule.add("i", op.in[1].shape[1], FactorKind::contracted);
    const int o = rule.add("o", op.in[1].shape[0]);
    x.push_back(i);
    y.push_back(o);
    rule.inputs = {x, {o, i}};
    rule.outputs = {y};
    epilogue_rule(rule, op, y.size() - 1);
    return rule;
  }
  double flops(const OpContext& op) const override {
    return 2.0 * static_cast<double>(numel(op.out[0].shape)) * static_cast<double>(op.in[1].shape[1]) + epilogue_flops(op);
  }
  void reference(const OpContext& op, std::span<const RefTensor> in, std::span<RefTensor> out) const override {
    const auto o_size = in[1].shape[0], i_size = in[1].shape[1];
    for (std::int64_t r = 0; o_size && r < numel(out[0].shape) / o_size; ++r)
      for (std::int64_t o = 0; o < o_size; ++o)
        for (std::int64_t i = 0; i < i_size; ++i)
          out[0].data[r * o_size + o] += in[0].data[r * i_size + i] * in[1].data[o * i_size + i];
    epilogue_reference(op, in, 2, out[0].shape.size() - 1, out[0]);
  }
};
COMFYTP_OP(Linear)

}  // namespace
}  // namespace comfytp::graph
