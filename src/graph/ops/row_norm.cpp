// row_moments: the first half of layer_norm and rms_norm, and what else the two share.
#include "graph/ops/row_norm.h"

#include "base/error.h"
#include "graph/graph.h"

namespace comfytp::graph {

Rule row_norm_rule(const OpContext& op, std::size_t parameters) {
  Rule rule;
  Shape rows = op.in[0].shape;
  rows.pop_back();
  auto x = free_dims(rule, rows, "row");
  std::vector<DimRule> moments = {DimRule()};
  moments.insert(moments.end(), x.begin(), x.end());
  const int c = rule.add("c", op.in[0].shape.back(), FactorKind::statistics);
  x.push_back(c);
  rule.inputs.assign(1 + parameters, {c});
  rule.inputs[0] = x;
  rule.outputs = {x};
  if (op.in.size() > 1 + parameters) {
    rule.factors[c].kind = FactorKind::whole;
    moments[0] = rule.add("parts", op.in.back().shape[0], FactorKind::whole);
    moments.push_back(rule.add("moment", 3, FactorKind::whole));
    rule.inputs.push_back(moments);
  }
  return rule;
}

Order rows_order(const Order& produced) {
  return !produced.empty() && produced.back() + 1 == static_cast<int>(produced.size()) ? produced : row_major(produced.size());
}

Layout row_norm_layout(const OpContext& op, std::span<const Order> produced, std::size_t parameters) {
  const bool moments = op.in.size() > 1 + parameters;
  const Order x = moments ? row_major(op.in[0].shape.size()) : rows_order(produced[0]);
  Layout layout{{x}, {x}};
  for (std::size_t i = 1; i < op.in.size(); ++i) layout.in.push_back(row_major(op.in[i].shape.size()));
  return layout;
}

void check_row_moments(std::string_view op, const Type& x, const Type& moments) {
  Shape expected = x.shape;
  expected.back() = 3;
  expected.insert(expected.begin(), moments.shape.empty() ? 1 : moments.shape[0]);
  require(moments == Type{DType::f32, expected}, "[{}] expected moments f32{} but got {}", op, comfytp::to_string(expected), to_string(moments));
}

Moments<double> moments_of_row(const double* row, std::int64_t size) {
  Moments<double> m;
  for (std::int64_t i = 0; i < size; ++i) m.add(row[i]);
  return m;
}

Moments<double> merged_row(const RefTensor& moments, std::int64_t r, std::int64_t rows) {
  Moments<double> m;
  for (std::int64_t p = 0; p < moments.shape[0]; ++p) {
    const double* part = moments.data.data() + (p * rows + r) * 3;
    m.merge({part[0], part[1], part[2]});
  }
  return m;
}

namespace {

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
      const auto m = moments_of_row(in[0].data.data() + static_cast<std::int64_t>(r) * c, c);
      out[0].data[3 * r] = m.count;
      out[0].data[3 * r + 1] = m.mean;
      out[0].data[3 * r + 2] = m.squares;
    }
  }
};
COMFYTP_OP(RowMoments)

}  // namespace
}  // namespace comfytp::graph
