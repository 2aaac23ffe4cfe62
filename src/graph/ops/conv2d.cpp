// conv2d: y[n, o, h, w] = sum over i, p, q of x[n, i, h*s+p-top, w*s+q-left] k[o, i, p, q], then the epilogue.
#include <algorithm>

#include "base/error.h"
#include "graph/graph.h"
#include "graph/ops/epilogue.h"

namespace comfytp::graph {
namespace {

// Inputs: x [n, i, h, w], k [o, i, p, q], the epilogue's operands.
// Attributes: stride [h, w], padding [top, left, bottom, right] with zeros, epilogue (optional).
class Conv2d final : public Op {
 public:
  std::string_view name() const override { return "conv2d"; }

  std::vector<Type> infer(const Attrs& a, std::span<const Type> in) const override {
    expect_inputs(name(), in, 2, 8);
    expect_rank(name(), "x", in[0], 4);
    expect_rank(name(), "k", in[1], 4);
    const auto &x = in[0].shape, &k = in[1].shape;
    const auto &stride = a.ints("stride"), &padding = a.ints("padding");
    require(x[1] == k[1] && in[0].dtype == in[1].dtype, "[conv2d] expected x [n,i,h,w] and k [o,i,p,q] of one dtype but got {} and {}",
            to_string(in[0]), to_string(in[1]));
    require(stride.size() == 2 && padding.size() == 4 && std::min(stride[0], stride[1]) >= 1,
            "[conv2d] expected 2 strides and 4 paddings but got {} and {}", comfytp::to_string(stride), comfytp::to_string(padding));
    Type out{in[0].dtype, {x[0], k[0], 0, 0}};
    for (int d = 0; d < 2; ++d) {
      const auto padded = x[2 + d] + padding[d] + padding[2 + d];
      out.shape[2 + d] = x[2 + d] == 0 || padded < k[2 + d] ? 0 : (padded - k[2 + d]) / stride[d] + 1;
    }
    check_epilogue(name(), a, in, 2, out, 1);
    return {out};
  }

  Rule rule(const OpContext& op) const override {
    Rule rule;
    const auto &x = op.in[0].shape, &k = op.in[1].shape, &y = op.out[0].shape;
    const int n = rule.add("n", x[0]), o = rule.add("o", k[0]), i = rule.add("i", k[1], FactorKind::contracted);
    const int h = rule.add("h", y[2]), w = rule.add("w", y[3]);
    const int p = rule.add("p", k[2], FactorKind::whole), q = rule.add("q", k[3], FactorKind::whole);
    rule.inputs = {{n, i, input_dim(op, 0, h), input_dim(op, 1, w)}, {o, i, p, q}};
    rule.outputs = {{n, o, h, w}};
    epilogue_rule(rule, op, 1);
    return rule;
  }

  Attrs localize(const OpContext& op, std::span<const Interval> ranges) const override {
    Attrs local = op.attrs;
    Ints padding = op.attrs.ints("padding");
    for (int d = 0; d < 2; ++d) {
      const auto r = ranges[3 + d];
      if (r == Interval{0, op.out[0].shape[2 + d]}) continue;
      const auto need = unclipped(op, d, r);
      padding[d] = r.size() ? std::max<std::int64_t>(0, -need.lo) : 0;
      padding[2 + d] = r.size() ? std::max<std::int64_t>(0, need.hi - op.in[0].shape[2 + d]) : 0;
    }
    local.set("padding", padding);
    return local;
  }

  Layout layout(const OpContext& op, std::span<const Order>) const override {
    Layout layout{{channels_last(4), row_major(4)}, {channels_last(4)}};
    for (std::size_t i = 2; i < op.in.size(); ++i) layout.in.push_back(channels_last(op.in[i].shape.size()));
    return layout;
  }

  double flops(const OpContext& op) const override {
    const auto& k = op.in[1].shape;
    return 2.0 * static_cast<double>(numel(op.out[0].shape)) * static_cast<double>(k[1] * k[2] * k[3]) + epilogue_flops(op);
  }

  void reference(const OpContext& op, std::span<const RefTensor> in, std::span<RefTensor> out) const override {
    const auto &x = in[0].shape, &k = in[1].shape, &y = out[0].shape;
    const auto &stride = op.attrs.ints("stride"), &padding = op.attrs.ints("padding");
    double* result = out[0].data.data();
    for (std::int64_t n = 0; n < y[0]; ++n)
      for (std::int64_t o = 0; o < y[1]; ++o)
        for (std::int64_t h = 0; h < y[2]; ++h)
          for (std::int64_t w = 0; w < y[3]; ++w, ++result)
            for (std::int64_t i = 0; i < k[1]; ++i)
              for (std::int64_t p = 0; p < k[2]; ++p)
                for (std::int64_t q = 0; q < k[3]; ++q) {
                  const auto r = h * stride[0] + p - padding[0], c = w * stride[1] + q - padding[1];
                  if (r < 0 || r >= x[2] || c < 0 || c >= x[3]) continue;
                  *result += in[0].data[((n * x[1] + i) * x[2] + r) * x[3] + c] * in[1].data[((o * k[1] + i) * k[2] + p) * k[3] + q];
                }
    epilogue_reference(op, in, 2, 1, out[0]);
  }

 private:
  static Interval unclipped(const OpContext& op, int d, Interval out) {
    const auto stride = op.attrs.ints("stride")[d], pad = op.attrs.ints("padding")[d];
    return {out.lo * stride - pad, (out.hi - 1) * stride - pad + op.in[1].shape[2 + d]};
  }
  static DimRule input_dim(const OpContext& op, int d, int factor) {
    const auto stride = op.attrs.ints("stride")[d], pad = op.attrs.ints("padding")[d];
    const auto extent = op.in[1].shape[2 + d], size = op.in[0].shape[2 + d];
    if (stride == 1 && extent == 1 && size == op.out[0].shape[2 + d]) return factor;
    return {factor, [=](Interval out) -> Interval {
              if (out.size() == 0) return {0, 0};
              return intersect({out.lo * stride - pad, (out.hi - 1) * stride - pad + extent}, {0, size});
            }};
  }
};
COMFYTP_OP(Conv2d)

}  // namespace
}  // namespace comfytp::graph
