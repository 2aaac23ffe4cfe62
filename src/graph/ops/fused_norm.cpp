// fused_norm: what stands before a norm over the last dimension, the norm, and what stands behind it, in one pass over
// memory. fuse() makes it on a device's graph.
#include "base/error.h"
#include "graph/graph.h"
#include "graph/ops/row_norm.h"
#include "graph/ops/steps.h"

namespace comfytp::graph {
namespace {

// Inputs: x [.., c], the operands of pre, weight [c], bias [c], the operands of post.
// Attributes: pre and post, chains of steps (a bias is along the last dimension); norm ("layer_norm" or "rms_norm"); epsilon;
// affine: which parameters there are ("", "weight" or "weight,bias"); dtype of z and y_dtype of y, x's unless given; alone: 1 where
// nobody wants y.
// Outputs: y = pre(x), rounded to its dtype, and z = post(norm(y)); where pre is empty or nobody wants y, which then is not rounded, z alone.
class FusedNorm final : public Op {
 public:
  std::string_view name() const override { return "fused_norm"; }
  std::vector<Type> infer(const Attrs& a, std::span<const Type> in) const override {
    expect_inputs(name(), in, 1, 3 + 4 * kMostSteps);
    const Type& x = in[0];
    require(!x.shape.empty() && is_float(x.dtype), "[fused_norm] expected a float x [..,c] but got {}", to_string(x));
    const auto &norm = a.text("norm"), &affine = a.text("affine");
    require(norm == "layer_norm" || norm == "rms_norm", "[fused_norm] expected norm 'layer_norm' or 'rms_norm' but got '{}'", norm);
    require(affine.empty() || affine == "weight" || affine == "weight,bias",
            "[fused_norm] expected affine '', 'weight' or 'weight,bias' but got '{}'", affine);
    (void)a.real("epsilon");
    const auto last = x.shape.size() - 1;
    auto next = check_steps(name(), a.text("pre"), in, 1, x, last);
    for (const auto& parameter : steps_of(affine)) {
      const Type expected{x.dtype, {x.shape.back()}};
      require(next < in.size() && in[next].shape == expected.shape, "[fused_norm] expected {} as {} but got {}", to_string(expected), parameter,
              next < in.size() ? to_string(in[next]) : "nothing");
      ++next;
    }
    next = check_steps(name(), a.text("post"), in, next, x, last);
    require(next == in.size(), "[fused_norm] expected {} inputs but got {}", next, in.size());
    std::vector<Type> out, types(in.begin(), in.end());
    if (!a.text("pre").empty() && a.integer_or("alone", 0) == 0) out.push_back({dtype_or(a, "y_dtype", x.dtype), x.shape});
    out.push_back({dtype_or(a, "dtype", x.dtype), x.shape});
    types.insert(types.end(), out.begin(), out.end());
    check_dtypes(name(), types);
    return out;
  }
  Layout layout(const OpContext& op, std::span<const Order> produced) const override {
    Layout layout{{produced.begin(), produced.end()}, std::vector<Order>(op.out.size(), rows_order(produced[0]))};
    const Order order = layout.out[0];
    layout.in[0] = order;
    const auto parameters = lay_operands(op.attrs.text("pre"), op, 1, order, layout);
    lay_operands(op.attrs.text("post"), op, parameters + steps_of(op.attrs.text("affine")).size(), order, layout);
    return layout;
  }
  // y may lie where x or an operand of pre lay, but not where one of post does, which is read after y is written; z alone
  // may lie over either.
  bool in_place(const OpContext& op, std::size_t i) const override {
    const auto pre = operand_count(op.attrs.text("pre")), parameters = steps_of(op.attrs.text("affine")).size();
    if (i > pre && (i <= pre + parameters || op.out.size() == 2)) return false;
    return op.in[i] == op.out[0];
  }
  double flops(const OpContext& op) const override {
    return (6 + steps_flops(op.attrs.text("pre")) + steps_flops(op.attrs.text("post"))) * static_cast<double>(numel(op.in[0].shape));
  }
  void reference(const OpContext& op, std::span<const RefTensor> in, std::span<RefTensor> out) const override {
    const auto &a = op.attrs;
    const auto last = in[0].shape.size() - 1;
    RefTensor y = in[0];
    steps_reference(a.text("pre"), in.subspan(1), last, y);
    auto next = 1 + operand_count(a.text("pre"));
    std::vector<RefTensor> normed = {y, RefTensor({y.shape.back()}, 1), RefTensor({y.shape.back()}, 0)}, z = {RefTensor(y.shape)};
    for (std::size_t p = 0; p < steps_of(a.text("affine")).size(); ++p) normed[1 + p] = in[next++];
    const bool plain = a.text("norm") == "rms_norm";
    const std::span<const RefTensor> operands(normed);
    find_op(a.text("norm")).reference({a, {}, {}}, operands.first(plain ? 2 : 3), z);
    if (plain) steps_reference("bias", operands.subspan(2), last, z[0]);
    steps_reference(a.text("post"), in.subspan(next), last, z[0]);
    if (out.size() == 2) out[0] = std::move(y);
    out.back() = std::move(z[0]);
  }
};
COMFYTP_OP(FusedNorm)

}  // namespace
}  // namespace comfytp::graph
