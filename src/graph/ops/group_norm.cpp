// group_norm (Wu & He 2018) with an optional activation behind it, and group_moments, its first half.
#include <cmath>

#include "base/error.h"
#include "graph/graph.h"
#include "graph/ops/moments.h"

namespace comfytp::graph {
namespace {

Type check_input(std::string_view op, const Attrs& a, const Type& x) {
  require(x.shape.size() >= 2, "[{}] expected x [n,c,..] but got {}", op, to_string(x));
  const auto groups = a.integer("groups");
  require(groups >= 0 && (groups == 0 ? x.shape[1] == 0 : x.shape[1] % groups == 0),
          "[{}] expected groups that divide the channels of {} but got {}", op, to_string(x), groups);
  return x;
}

// Moments of every group of every sample, from x [n, c, ..].
std::vector<Moments<double>> moments_of(const RefTensor& x, std::int64_t groups) {
  const auto n = x.shape[0], inner = x.shape[1] ? numel(x.shape) / std::max<std::int64_t>(1, n * x.shape[1]) : 0;
  std::vector<Moments<double>> result(static_cast<std::size_t>(n * groups));
  for (std::size_t i = 0; i < x.data.size(); ++i)
    result[i / static_cast<std::size_t>(inner * (x.shape[1] / groups))].add(x.data[i]);
  return result;
}

// Inputs: x [n, c, ..]. Attribute: groups. Output: f32 [1, n, groups, 3], count, mean and squared deviations.
class GroupMoments final : public Op {
 public:
  std::string_view name() const override { return "group_moments"; }
  std::vector<Type> infer(const Attrs& a, std::span<const Type> in) const override {
    expect_inputs(name(), in, 1, 1);
    check_input(name(), a, in[0]);
    return {{DType::f32, {1, in[0].shape[0], a.integer("groups"), 3}}};
  }
  Layout layout(const OpContext& op, std::span<const Order>) const override {
    return {{channels_last(op.in[0].shape.size())}, {row_major(4)}};
  }
  double flops(const OpContext& op) const override { return 3.0 * static_cast<double>(numel(op.in[0].shape)); }
  void reference(const OpContext& op, std::span<const RefTensor> in, std::span<RefTensor> out) const override {
    std::size_t at = 0;
    for (const auto& m : moments_of(in[0], op.attrs.integer("groups")))
      for (double v : {m.count, m.mean, m.squares}) out[0].data[at++] = v;
  }
};

// Inputs: x [n, c, ..], weight [c], bias [c], and where x is a part of a normalised set: the moments of all parts,
// f32 [parts, n, groups, 3]. Attributes: groups, epsilon, activation ("" or "silu").
class GroupNorm final : public Op {
 public:
  std::string_view name() const override { return "group_norm"; }
  std::vector<Type> infer(const Attrs& a, std::span<const Type> in) const override {
    expect_inputs(name(), in, 3, 4);
    check_input(name(), a, in[0]);
    const auto& x = in[0].shape;
    for (int i : {1, 2})
      require(in[i].shape == Shape{x[1]}, "[group_norm] expected weight and bias of shape [{}] but got {}", x[1], to_string(in[i]));
    if (in.size() == 4)
      require(in[3].dtype == DType::f32 && in[3].shape.size() == 4 && in[3].shape[1] == x[0] && in[3].shape[2] == a.integer("groups") &&
                  in[3].shape[3] == 3,
              "[group_norm] expected moments f32[parts,{},{},3] but got {}", x[0], a.integer("groups"), to_string(in[3]));
    const auto activation = a.text_or("activation", "");
    require(activation.empty() || activation == "silu", "[group_norm] expected activation '' or 'silu' but got '{}'", activation);
    (void)a.real("epsilon");
    return {in[0]};
  }
  Rule rule(const OpContext& op) const override {
    Rule rule;
    const auto& x = op.in[0].shape;
    const auto groups = op.attrs.integer("groups");
    const int n = rule.add("n", x[0]), g = rule.add("groups", groups);
    const int c = rule.add("c", groups ? x[1] / groups : 0, FactorKind::whole);
    std::vector<DimRule> dims = {n, DimRule({g, c})};
    for (std::size_t d = 2; d < x.size(); ++d) dims.push_back(rule.add("spatial", x[d], FactorKind::statistics));
    rule.inputs = {dims, {DimRule({g, c})}, {DimRule({g, c})}};
    if (op.in.size() == 4)
      rule.inputs.push_back({rule.add("parts", op.in[3].shape[0], FactorKind::whole), n, g, rule.add("moment", 3, FactorKind::whole)});
    rule.outputs = {dims};
    return rule;
  }
  Attrs localize(const OpContext& op, std::span<const Interval> ranges, std::span<const Type>) const override {
    Attrs local = op.attrs;
    local.set("groups", ranges[1].size());
    return local;
  }
  ValueId emit_moments(Graph& g, const Attrs& local, std::span<const ValueId> inputs) const override {
    return g.add("group_moments", {inputs[0]}, {{"groups", local.integer("groups")}});
  }
  Layout layout(const OpContext& op, std::span<const Order>) const override {
    const auto rank = op.in[0].shape.size();
    Layout layout{{channels_last(rank), row_major(1), row_major(1)}, {channels_last(rank)}};
    if (op.in.size() == 4) layout.in.push_back(row_major(4));
    return layout;
  }
  bool in_place(const OpContext&, std::size_t i) const override { return i == 0; }
  double flops(const OpContext& op) const override {
    return (op.attrs.text_or("activation", "").empty() ? 6.0 : 10.0) * static_cast<double>(numel(op.in[0].shape));
  }
  void reference(const OpContext& op, std::span<const RefTensor> in, std::span<RefTensor> out) const override {
    const auto groups = op.attrs.integer("groups");
    const auto& x = in[0];
    if (x.data.empty()) return;
    auto moments = moments_of(x, groups);
    if (in.size() == 4) {
      std::fill(moments.begin(), moments.end(), Moments<double>{});
      for (std::size_t i = 0; i < in[3].data.size(); i += 3)
        moments[i / 3 % moments.size()].merge({in[3].data[i], in[3].data[i + 1], in[3].data[i + 2]});
    }
    const auto channels = x.shape[1], inner = numel(x.shape) / (x.shape[0] * channels);
    for (std::size_t i = 0; i < x.data.size(); ++i) {
      const auto row = static_cast<std::int64_t>(i) / inner, c = row % channels;
      const auto& m = moments[(row / channels) * groups + c / (channels / groups)];
      double y = (x.data[i] - m.mean) / std::sqrt(m.squares / m.count + op.attrs.real("epsilon")) * in[1].data[c] + in[2].data[c];
      if (op.attrs.text_or("activation", "") == "silu") y /= 1 + std::exp(-y);
      out[0].data[i] = y;
    }
  }
};

COMFYTP_OP(GroupMoments)
COMFYTP_OP(GroupNorm)

}  // namespace
}  // namespace comfytp::graph
