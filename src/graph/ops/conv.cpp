// conv1d, conv2d, conv3d: y[n, o, h, ..] = sum over i, p, .. of x[n, i, h*s+p-before, ..] k[o, i, p, ..] within each group of
// channels, then the epilogue.
#include <algorithm>

#include "base/error.h"
#include "graph/graph.h"
#include "graph/ops/epilogue.h"

namespace comfytp::graph {
namespace {

// Inputs: x [n, groups*i, spatial..], k [groups*o, i, window..], the epilogue's operands.
// Attributes: stride [spatial], padding [before.., after..] with zeros, groups (1 unless given), epilogue (optional).
class Conv final : public Op {
 public:
  Conv(std::string_view name, std::size_t spatial) : name_(name), spatial_(spatial) {}
  std::string_view name() const override { return name_; }

  std::vector<Type> infer(const Attrs& a, std::span<const Type> in) const override {
    expect_inputs(name(), in, 2, 8);
    expect_rank(name(), "x", in[0], spatial_ + 2);
    expect_rank(name(), "k", in[1], spatial_ + 2);
    const auto &x = in[0].shape, &k = in[1].shape;
    const auto &stride = a.ints("stride"), &padding = a.ints("padding");
    const auto groups = groups_of(a);
    require(groups >= 0 && (groups ? x[1] % groups == 0 && x[1] / groups == k[1] && k[0] % groups == 0 : x[1] == 0 && k[0] == 0) && in[0].dtype == in[1].dtype,
            "[{}] expected x [n,i,..] and k [o,i/groups,..] of one dtype, groups dividing o, but got {} and {} with groups {}", name(), to_string(in[0]),
            to_string(in[1]), groups);
    const auto within = [](const Ints& values, std::int64_t least) {
      return std::all_of(values.begin(), values.end(), [&](std::int64_t v) { return v >= least && v < (std::int64_t{1} << 31); });
    };
    require(stride.size() == spatial_ && padding.size() == 2 * spatial_ && within(stride, 1) && within(padding, 0),
            "[{}] expected {} strides from 1 and {} paddings from 0 but got {} and {}", name(), spatial_, 2 * spatial_, comfytp::to_string(stride),
            comfytp::to_string(padding));
    Type out{in[0].dtype, {x[0], k[0]}};
    for (std::size_t d = 0; d < spatial_; ++d) {
      const auto padded = x[2 + d] + padding[d] + padding[spatial_ + d];
      out.shape.push_back(x[2 + d] == 0 || padded < k[2 + d] ? 0 : (padded - k[2 + d]) / stride[d] + 1);
    }
    check_epilogue(name(), a, in, 2, out, 1);
    return {out};
  }

  Rule rule(const OpContext& op) const override {
    Rule rule;
    const auto &x = op.in[0].shape, &k = op.in[1].shape, &y = op.out[0].shape;
    const auto groups = groups_of(op.attrs);
    const int n = rule.add("n", x[0]), g = rule.add("groups", groups), o = rule.add("o", groups ? k[0] / groups : 0);
    const int i = rule.add("i", k[1], FactorKind::contracted);
    rule.inputs = {{n, DimRule({g, i})}, {DimRule({g, o}), i}};
    rule.outputs = {{n, DimRule({g, o})}};
    for (std::size_t d = 0; d < spatial_; ++d) {
      const int f = rule.add(fmt::format("y{}", d), y[2 + d]);
      rule.inputs[0].push_back(input_dim(op, d, f));
      rule.outputs[0].push_back(f);
      rule.inputs[1].push_back(rule.add(fmt::format("window{}", d), k[2 + d], FactorKind::whole));
    }
    epilogue_rule(rule, op, 1);
    return rule;
  }

  Attrs localize(const OpContext& op, std::span<const Interval> ranges, std::span<const Type>) const override {
    Attrs local = op.attrs;
    Ints padding = op.attrs.ints("padding");
    for (std::size_t d = 0; d < spatial_; ++d) {
      const auto r = ranges[4 + 2 * d];
      if (r == Interval{0, op.out[0].shape[2 + d]}) continue;
      const auto need = unclipped(op, d, r);
      padding[d] = r.size() ? std::max<std::int64_t>(0, -need.lo) : 0;
      padding[spatial_ + d] = r.size() ? std::max<std::int64_t>(0, need.hi - op.in[0].shape[2 + d]) : 0;
    }
    local.set("padding", padding);
    if (groups_of(op.attrs) != 1) local.set("groups", ranges[1].size());
    return local;
  }

  Layout layout(const OpContext& op, std::span<const Order>) const override {
    Layout layout{{channels_last(spatial_ + 2), row_major(spatial_ + 2)}, {channels_last(spatial_ + 2)}};
    for (std::size_t i = 2; i < op.in.size(); ++i) layout.in.push_back(channels_last(op.in[i].shape.size()));
    return layout;
  }

  double flops(const OpContext& op) const override {
    const auto& k = op.in[1].shape;
    return 2.0 * static_cast<double>(numel(op.out[0].shape)) * static_cast<double>(k[0] ? numel(k) / k[0] : 0) + epilogue_flops(op);
  }

  void reference(const OpContext& op, std::span<const RefTensor> in, std::span<RefTensor> out) const override {
    const auto &x = in[0].shape, &k = in[1].shape, &y = out[0].shape;
    const auto &stride = op.attrs.ints("stride"), &padding = op.attrs.ints("padding");
    const auto groups = groups_of(op.attrs);
    const Shape y_steps = row_major_strides(y), x_steps = row_major_strides(x), k_steps = row_major_strides(k);
    const auto window = k[0] && k[1] ? numel(k) / (k[0] * k[1]) : 0;
    for (std::int64_t at = 0; at < numel(y); ++at) {
      const auto n = at / y_steps[0], o = at / y_steps[1] % y[1];
      for (std::int64_t p = 0; p < window; ++p) {
        std::int64_t x_at = n * x_steps[0] + o / (k[0] / groups) * k[1] * x_steps[1];
        bool inside = true;
        for (std::size_t d = 0; d < spatial_; ++d) {
          const auto row = at / y_steps[2 + d] % y[2 + d] * stride[d] + p / k_steps[2 + d] % k[2 + d] - padding[d];
          inside = inside && row >= 0 && row < x[2 + d];
          x_at += row * x_steps[2 + d];
        }
        if (!inside) continue;
        for (std::int64_t i = 0; i < k[1]; ++i) out[0].data[at] += in[0].data[x_at + i * x_steps[1]] * in[1].data[o * k_steps[0] + i * k_steps[1] + p];
      }
    }
    epilogue_reference(op, in, 2, 1, out[0]);
  }

 private:
  static std::int64_t groups_of(const Attrs& a) { return a.integer_or("groups", 1); }
  Interval unclipped(const OpContext& op, std::size_t d, Interval out) const {
    const auto stride = op.attrs.ints("stride")[d], pad = op.attrs.ints("padding")[d];
    return {out.lo * stride - pad, (out.hi - 1) * stride - pad + op.in[1].shape[2 + d]};
  }
  DimRule input_dim(const OpContext& op, std::size_t d, int factor) const {
    const auto stride = op.attrs.ints("stride")[d], pad = op.attrs.ints("padding")[d];
    const auto extent = op.in[1].shape[2 + d], size = op.in[0].shape[2 + d];
    if (stride == 1 && extent == 1 && size == op.out[0].shape[2 + d]) return factor;
    return {factor, [=](Interval out) -> Interval {
              if (out.size() == 0) return {0, 0};
              return intersect({out.lo * stride - pad, (out.hi - 1) * stride - pad + extent}, {0, size});
            }};
  }

  std::string_view name_;
  std::size_t spatial_;
};

const bool registered = detail::register_op(std::make_unique<Conv>("conv1d", 1)) && detail::register_op(std::make_unique<Conv>("conv2d", 2)) &&
                        detail::register_op(std::make_unique<Conv>("conv3d", 3));

}  // namespace
}  // namespace comfytp::graph
