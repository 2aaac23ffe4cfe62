// gather: rows of a tensor by their numbers; an embedding is a gather along dimension 0.
#include <cmath>

#include "base/error.h"
#include "graph/graph.h"

namespace comfytp::graph {
namespace {

// Inputs: x [.., k, ..], index (i64 or i32) of any shape. Attribute: dim. Output: x's shape with `dim` replaced by index's shape.
// A negative index counts from the end, as in torch; one outside gives NaN (a kernel cannot throw).
class Gather final : public Op {
 public:
  std::string_view name() const override { return "gather"; }
  std::vector<Type> infer(const Attrs& a, std::span<const Type> in) const override {
    expect_inputs(name(), in, 2, 2);
    const auto d = a.integer("dim");
    require(d >= 0 && d < static_cast<std::int64_t>(in[0].shape.size()) && (in[1].dtype == DType::i64 || in[1].dtype == DType::i32),
            "[gather] expected a dimension of {} and an integer index but got {} and {}", to_string(in[0]), d, to_string(in[1]));
    Type out = in[0];
    const auto at = out.shape.erase(out.shape.begin() + d);
    out.shape.insert(at, in[1].shape.begin(), in[1].shape.end());
    return {out};
  }
  Rule rule(const OpContext& op) const override {
    Rule rule;
    const auto dim = static_cast<std::size_t>(op.attrs.integer("dim"));
    auto x = free_dims(rule, op.in[0].shape);
    rule.factors[dim].kind = FactorKind::whole;
    const auto index = free_dims(rule, op.in[1].shape, "index");
    auto y = x;
    y.insert(y.erase(y.begin() + static_cast<std::ptrdiff_t>(dim)), index.begin(), index.end());
    rule.inputs = {x, index};
    rule.outputs = {y};
    return rule;
  }
  void reference(const OpContext& op, std::span<const RefTensor> in, std::span<RefTensor> out) const override {
    const auto dim = static_cast<std::size_t>(op.attrs.integer("dim"));
    const auto inner = row_major_strides(in[0].shape)[dim], size = in[0].shape[dim], count = numel(in[1].shape);
    for (std::int64_t i = 0; i < numel(out[0].shape); ++i) {
      auto row = static_cast<std::int64_t>(in[1].data[i / inner % count]);
      row += row < 0 ? size : 0;
      out[0].data[i] = row < 0 || row >= size ? NAN : in[0].data[(i / inner / count * size + row) * inner + i % inner];
    }
  }
};
COMFYTP_OP(Gather)

}  // namespace
}  // namespace comfytp::graph
