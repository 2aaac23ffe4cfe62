// layer_norm over the last dimension (Ba, Kiros & Hinton 2016), and row_moments, its first half.
#include <cmath>

#include "base/error.h"
#include "graph/graph.h"
#include "graph/ops/moments.h"

namespace comfytp::graph {
namespace {

Moments<double> moments_of(const double* row, std::int64_t size) {
  Moments<double> m;
  for (std::int64_t i = 0; i < size; ++i) m.add(row[i]);
  return m;
}

// Inputs: x [.., c]. Output: f32 [1, .., 3], count, mean and squared deviations of each row.
class RowMoments final : public Op {
 public:
  std::string_view name() const override { return "row_moments"; }
  std::vector<Type> infer(const Attrs&, std::span<const Type> in) const override {
    expect_inputs(name(), in, 1, 1);
    require(!in[0].shape.empty(), "[row_moments] expected x [..,c] but got {}", to_string(in[0]));
    Type out{DType::f32, in[0].shape};
    out.shape.back() = 3;
    out.shape.insert(out.shape.begin(), 1);
    return {out};
  }
  double flops(const OpContext& op) const override { return 3.0 * static_cast<double>(numel(op.in[0].shape)); }
  void reference(const OpContext&, std::span<const RefTensor> in, std::span<RefTensor> out) const override {
    const auto c = in[0].shape.back();
    for (std::size_t r = 0; r * 3 < out[0].data.size(); ++r) {
      const auto m = moments_of(in[0].data.data() + static_cast<std::int64_t>(r) * c, c);
      out[0].data[3 * r] = m.count;
      out[0].data[3 * r + 1] = m.mean;
      out[0].data[3 * r + 2] = m.squares;
    }
  }
};

// Inputs: x [.., c], weight [c], bias [c], and where x is a part of the row: the moments of all parts, f32 [parts, .., 3].
// Attribute: epsilon.
class LayerNorm final : public Op {
 public:
  std::string_view name() const override { return "layer_norm"; }
  std::vector<Type> infer(const Attrs& a, std::span<const Type> in) const override {
    expect_inputs(name(), in, 3, 4);
    require(!in[0].shape.empty(), "[layer_norm] expected x [..,c] but got {}", to_string(in[0]));
    const auto c = in[0].shape.back();
    for (int i : {1, 2})
      require(in[i].shape == Shape{c}, "[layer_norm] expected weight and bias of shape [{}] but got {}", c, to_string(in[i]));
    if (in.size() == 4) {
      Shape expected = in[0].shape;
      expected.back() = 3;
      expected.insert(expected.begin(), in[3].shape.empty() ? 1 : in[3].shape[0]);
      require(in[3] == Type{DType::f32, expected}, "[layer_norm] expected moments f32{} but got {}", comfytp::to_string(expected), to_string(in[3]));
    }
    (void)a.real("epsilon");
    return {in[0]};
  }
  Rule rule(const OpContext& op) const override {
    Rule rule;
    Shape rows = op.in[0].shape;
    rows.pop_back();
    auto x = free_dims(rule, rows, "row");
    std::vector<DimRule> moments = {DimRule()};
    moments.insert(moments.end(), x.begin(), x.end());
    const int c = rule.add("c", op.in[0].shape.back(), FactorKind::statistics);
    x.push_back(c);
    rule.inputs = {x, {c}, {c}};
    rule.outputs = {x};
    if (op.in.size() == 4) {
      rule.factors[c].kind = FactorKind::whole;
      moments[0] = rule.add("parts", op.in[3].shape[0], FactorKind::whole);
      moments.push_back(rule.add("moment", 3, FactorKind::whole));
      rule.inputs.push_back(moments);
    }
    return rule;
  }
  ValueId emit_moments(Graph& g, const Attrs&, std::span<const ValueId> inputs) const override {
    return g.add("row_moments", {inputs[0]});
  }
  double flops(const OpContext& op) const override { return 6.0 * static_cast<double>(numel(op.in[0].shape)); }
  void reference(const OpContext& op, std::span<const RefTensor> in, std::span<RefTensor> out) const override {
    const auto c = in[0].shape.back(), rows = c ? numel(in[0].shape) / c : 0;
    for (std::int64_t r = 0; r < rows; ++r) {
      auto m = moments_of(in[0].data.data() + r * c, c);
      if (in.size() == 4) {
        m = {};
        for (std::int64_t p = 0; p < in[3].shape[0]; ++p) {
          const double* part = in[3].data.data() + (p * rows + r) * 3;
          m.merge({part[0], part[1], part[2]});
        }
      }
      const double scale = 1 / std::sqrt(m.squares / m.count + op.attrs.real("epsilon"));
      for (std::int64_t i = 0; i < c; ++i) out[0].data[r * c + i] = (in[0].data[r * c + i] - m.mean) * scale * in[1].data[i] + in[2].data[i];
    }
  }
};

COMFYTP_OP(RowMoments)
COMFYTP_OP(LayerNorm)

}  // namespace
}  // namespace comfytp::graph
