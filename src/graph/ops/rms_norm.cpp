// rms_norm over the last dimension (Zhang & Sennrich 2019): x / sqrt(mean(x²) + epsilon) * weight.
#include <cmath>

#include "base/error.h"
#include "graph/graph.h"
#include "graph/ops/row_norm.h"

namespace comfytp::graph {
namespace {

// Inputs: x [.., c], weight [c], and where x is a part of the row: row_moments of all parts, f32 [parts, .., 3].
// Attribute: epsilon.
class RmsNorm final : public Op {
 public:
  std::string_view name() const override { return "rms_norm"; }
  std::vector<Type> infer(const Attrs& a, std::span<const Type> in) const override {
    expect_inputs(name(), in, 2, 3);
    require(!in[0].shape.empty(), "[rms_norm] expected x [..,c] but got {}", to_string(in[0]));
    const auto c = in[0].shape.back();
    require(in[1].shape == Shape{c}, "[rms_norm] expected weight of shape [{}] but got {}", c, to_string(in[1]));
    if (in.size() == 3) check_row_moments(name(), in[0], in[2]);
    (void)a.real("epsilon");
    return {in[0]};
  }
  Rule rule(const OpContext& op) const override { return row_norm_rule(op, 1); }
  ValueId emit_moments(Graph& g, const Attrs&, std::span<const ValueId> inputs) const override { return g.add("row_moments", {inputs[0]}); }
  Layout layout(const OpContext& op, std::span<const Order> produced) const override { return row_norm_layout(op, produced, 1); }
  double flops(const OpContext& op) const override { return 4.0 * static_cast<double>(numel(op.in[0].shape)); }
  void reference(const OpContext& op, std::span<const RefTensor> in, std::span<RefTensor> out) const override {
    const auto c = in[0].shape.back(), rows = c ? numel(in[0].shape) / c : 0;
    for (std::int64_t r = 0; r < rows; ++r) {
      const double* x = in[0].data.data() + r * c;
      const auto m = in.size() == 3 ? merged_row(in[2], r, rows) : moments_of_row(x, c);
      const double scale = 1 / std::sqrt(m.squares / m.count + m.mean * m.mean + op.attrs.real("epsilon"));
      for (std::int64_t i = 0; i < c; ++i) out[0].data[r * c + i] = x[i] * scale * in[1].data[i];
    }
  }
};
COMFYTP_OP(RmsNorm)

}  // namespace
}  // namespace comfytp::graph
