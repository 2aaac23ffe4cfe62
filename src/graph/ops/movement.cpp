// transpose, split_dim, merge_dims, slice, concat: elements move, none changes.
#include <algorithm>
#include <numeric>

#include "base/error.h"
#include "graph/graph.h"

namespace comfytp::graph {
namespace {

std::size_t dim_of(std::string_view op, const Attrs& a, const Type& t) {
  const auto dim = a.integer("dim");
  require(dim >= 0 && dim < static_cast<std::int64_t>(t.shape.size()), "[{}] expected a dimension of {} but got {}", op, to_string(t), dim);
  return static_cast<std::size_t>(dim);
}

// Attribute: order; output dimension d is input dimension order[d].
class Transpose final : public Op {
 public:
  std::string_view name() const override { return "transpose"; }
  std::vector<Type> infer(const Attrs& a, std::span<const Type> in) const override {
    expect_inputs(name(), in, 1, 1);
    Ints sorted = a.ints("order"), all(in[0].shape.size());
    std::sort(sorted.begin(), sorted.end());
    std::iota(all.begin(), all.end(), 0);
    require(sorted == all, "[transpose] expected a permutation of the dimensions of {} but got {}", to_string(in[0]),
            comfytp::to_string(a.ints("order")));
    Type out{in[0].dtype, {}};
    for (auto d : a.ints("order")) out.shape.push_back(in[0].shape[d]);
    return {out};
  }
  Rule rule(const OpContext& op) const override {
    Rule rule;
    rule.inputs = {free_dims(rule, op.in[0].shape)};
    rule.outputs = {{}};
    for (auto d : op.attrs.ints("order")) rule.outputs[0].push_back(rule.inputs[0][d]);
    rule.linear = true;
    return rule;
  }
  Layout layout(const OpContext& op, std::span<const Order> produced) const override {
    const auto& order = op.attrs.ints("order");
    Order out;
    for (int d : produced[0]) out.push_back(static_cast<int>(std::find(order.begin(), order.end(), d) - order.begin()));
    return {{produced[0]}, {out}, true};
  }
  void reference(const OpContext& op, std::span<const RefTensor> in, std::span<RefTensor> out) const override {
    const auto& order = op.attrs.ints("order");
    const auto from = row_major_strides(in[0].shape), to = row_major_strides(out[0].shape);
    for (std::int64_t i = 0; i < numel(out[0].shape); ++i) {
      std::int64_t j = 0;
      for (std::size_t d = 0; d < order.size(); ++d) j += i / to[d] % out[0].shape[d] * from[order[d]];
      out[0].data[i] = in[0].data[j];
    }
  }
};

// Attributes: dim, sizes; [.., a*b, ..] becomes [.., a, b, ..].
class SplitDim final : public Op {
 public:
  std::string_view name() const override { return "split_dim"; }
  std::vector<Type> infer(const Attrs& a, std::span<const Type> in) const override {
    expect_inputs(name(), in, 1, 1);
    const auto d = dim_of(name(), a, in[0]);
    const auto& sizes = a.ints("sizes");
    expect_shape(name(), sizes);
    require(numel(sizes) == in[0].shape[d], "[split_dim] expected sizes whose product is {} but got {}", in[0].shape[d],
            comfytp::to_string(sizes));
    Shape shape = in[0].shape;
    shape.erase(shape.begin() + d);
    shape.insert(shape.begin() + d, sizes.begin(), sizes.end());
    return {{in[0].dtype, shape}};
  }
  Rule rule(const OpContext& op) const override {
    Rule rule;
    rule.outputs = {free_dims(rule, op.out[0].shape)};
    rule.inputs = {{}};
    const auto dim = static_cast<std::size_t>(op.attrs.integer("dim")), count = op.attrs.ints("sizes").size();
    for (std::size_t d = 0; d < op.in[0].shape.size(); ++d) {
      DimRule merged;
      for (std::size_t k = 0; k < (d == dim ? count : 1); ++k) merged.factors.push_back(static_cast<int>(d > dim ? d + count - 1 : d + k));
      rule.inputs[0].push_back(merged);
    }
    rule.linear = true;
    return rule;
  }
  Attrs localize(const OpContext& op, std::span<const Interval> ranges, std::span<const Type>) const override {
    Attrs local = op.attrs;
    Ints sizes = op.attrs.ints("sizes");
    for (std::size_t k = 0; k < sizes.size(); ++k) sizes[k] = ranges[op.attrs.integer("dim") + k].size();
    local.set("sizes", sizes);
    return local;
  }
  Layout layout(const OpContext& op, std::span<const Order> produced) const override {
    const int dim = static_cast<int>(op.attrs.integer("dim")), count = static_cast<int>(op.attrs.ints("sizes").size());
    Order out;
    for (int d : produced[0]) {
      if (d != dim) out.push_back(d > dim ? d + count - 1 : d);
      for (int k = 0; d == dim && k < count; ++k) out.push_back(dim + k);
    }
    return {{produced[0]}, {out}, true};
  }
  void reference(const OpContext&, std::span<const RefTensor> in, std::span<RefTensor> out) const override {
    out[0].data = in[0].data;
  }
};

// Attributes: dim, count; dimensions dim … dim+count-1 become one.
class MergeDims final : public Op {
 public:
  std::string_view name() const override { return "merge_dims"; }
  std::vector<Type> infer(const Attrs& a, std::span<const Type> in) const override {
    expect_inputs(name(), in, 1, 1);
    const auto d = dim_of(name(), a, in[0]);
    const auto count = a.integer("count");
    require(count >= 1 && d + count <= in[0].shape.size(), "[merge_dims] expected a count inside {} but got {}", to_string(in[0]), count);
    Shape shape = in[0].shape;
    const auto first = shape.begin() + d;
    const auto merged = std::accumulate(first, first + count, std::int64_t{1}, std::multiplies<>());
    shape.erase(first, first + count);
    shape.insert(shape.begin() + d, merged);
    return {{in[0].dtype, shape}};
  }
  Rule rule(const OpContext& op) const override {
    Rule rule;
    rule.inputs = {free_dims(rule, op.in[0].shape)};
    rule.outputs = {{}};
    const auto dim = static_cast<std::size_t>(op.attrs.integer("dim")), count = static_cast<std::size_t>(op.attrs.integer("count"));
    for (std::size_t d = 0; d < op.out[0].shape.size(); ++d) {
      DimRule merged;
      for (std::size_t k = 0; k < (d == dim ? count : 1); ++k) merged.factors.push_back(static_cast<int>(d > dim ? d + count - 1 : d + k));
      rule.outputs[0].push_back(merged);
    }
    rule.linear = true;
    return rule;
  }
  // Nothing moves where the merged dimensions already lie one behind the other; those of size 1 lie anywhere.
  Layout layout(const OpContext& op, std::span<const Order> produced) const override {
    const int dim = static_cast<int>(op.attrs.integer("dim")), count = static_cast<int>(op.attrs.integer("count"));
    Order merged;  // in the order in which they must lie
    for (int d = dim; d < dim + count; ++d)
      if (op.in[0].shape[d] != 1 || (d == dim + count - 1 && merged.empty())) merged.push_back(d);
    const auto inside = [&](int d) { return d >= dim && d < dim + count; };
    const auto merge = [&](Order in) -> Order {
      std::erase_if(in, [&](int d) { return inside(d) && std::find(merged.begin(), merged.end(), d) == merged.end(); });
      Order out;
      for (std::size_t i = 0; i < in.size(); ++i) {
        if (!inside(in[i])) {
          out.push_back(in[i] < dim ? in[i] : in[i] - count + 1);
          continue;
        }
        if (i + merged.size() > in.size() || !std::equal(merged.begin(), merged.end(), in.begin() + i)) return {};
        out.push_back(dim);
        i += merged.size() - 1;
      }
      return out;
    };
    if (Order out = merge(produced[0]); !out.empty()) return {{produced[0]}, {out}, true};
    const Order plain = row_major(op.in[0].shape.size());
    return {{plain}, {merge(plain)}, true};
  }
  void reference(const OpContext&, std::span<const RefTensor> in, std::span<RefTensor> out) const override {
    out[0].data = in[0].data;
  }
};

// Attributes: dim, start, stop, step (1 unless given): every step-th row of [start, stop).
class Slice final : public Op {
 public:
  std::string_view name() const override { return "slice"; }
  std::vector<Type> infer(const Attrs& a, std::span<const Type> in) const override {
    expect_inputs(name(), in, 1, 1);
    const auto d = dim_of(name(), a, in[0]);
    const auto start = a.integer("start"), stop = a.integer("stop"), step = a.integer_or("step", 1);
    require(0 <= start && start <= stop && stop <= in[0].shape[d] && step >= 1,
            "[slice] expected an interval inside dimension {} of {} and a step from 1 but got [{},{}) and {}", d, to_string(in[0]), start, stop, step);
    Type out = in[0];
    out.shape[d] = (stop - start + step - 1) / step;
    return {out};
  }
  Rule rule(const OpContext& op) const override {
    Rule rule;
    rule.outputs = {free_dims(rule, op.out[0].shape)};
    rule.inputs = rule.outputs;
    const auto dim = static_cast<std::size_t>(op.attrs.integer("dim"));
    if (op.attrs.integer_or("step", 1) == 1) {
      rule.inputs[0][dim] = DimRule::shifted(static_cast<int>(dim), op.attrs.integer("start"), op.in[0].shape[dim]);
    } else {
      rule.factors[dim].kind = FactorKind::whole;
      rule.inputs[0][dim] = rule.add("all", op.in[0].shape[dim], FactorKind::whole);
    }
    rule.linear = true;
    return rule;
  }
  // Whoever makes a part of it gets nothing but that; whoever makes all of it may have got all.
  Attrs localize(const OpContext& op, std::span<const Interval> ranges, std::span<const Type> inputs) const override {
    Attrs local = op.attrs;
    const auto dim = static_cast<std::size_t>(op.attrs.integer("dim"));
    if (op.attrs.integer_or("step", 1) != 1 || inputs[0].shape[dim] == op.in[0].shape[dim]) return local;
    local.set("start", std::int64_t{0});
    local.set("stop", ranges[dim].size());
    return local;
  }
  Layout layout(const OpContext&, std::span<const Order> produced) const override { return {{produced[0]}, {produced[0]}}; }
  void reference(const OpContext& op, std::span<const RefTensor> in, std::span<RefTensor> out) const override {
    const auto dim = static_cast<std::size_t>(op.attrs.integer("dim"));
    const auto inner = row_major_strides(in[0].shape)[dim];
    const auto size = in[0].shape[dim], kept = out[0].shape[dim], start = op.attrs.integer("start"), step = op.attrs.integer_or("step", 1);
    for (std::int64_t i = 0; i < numel(out[0].shape); ++i)
      out[0].data[i] = in[0].data[(i / inner / kept * size + start + i / inner % kept * step) * inner + i % inner];
  }
};

// Attribute: dim.
class Concat final : public Op {
 public:
  std::string_view name() const override { return "concat"; }
  std::vector<Type> infer(const Attrs& a, std::span<const Type> in) const override {
    expect_inputs(name(), in, 1, 64);
    const auto d = dim_of(name(), a, in[0]);
    Type out = in[0];
    out.shape[d] = 0;
    for (const auto& t : in) {
      Shape expected = in[0].shape;
      if (t.shape.size() == expected.size()) expected[d] = t.shape[d];
      require(t.dtype == out.dtype && t.shape == expected, "[concat] expected {} but for dimension {} but got {}", to_string(in[0]), d, to_string(t));
      out.shape[d] += t.shape[d];
    }
    return {out};
  }
  Rule rule(const OpContext& op) const override {
    Rule rule;
    const auto dim = static_cast<std::size_t>(op.attrs.integer("dim"));
    rule.outputs = {free_dims(rule, op.out[0].shape)};
    std::int64_t before = 0;
    for (const auto& t : op.in) {
      rule.inputs.push_back(rule.outputs[0]);
      rule.inputs.back()[dim] = DimRule::shifted(static_cast<int>(dim), -before, t.shape[dim]);
      before += t.shape[dim];
    }
    rule.linear = true;
    return rule;
  }
  Layout layout(const OpContext& op, std::span<const Order> produced) const override {
    return {std::vector<Order>(op.in.size(), produced[0]), {produced[0]}};
  }
  void reference(const OpContext& op, std::span<const RefTensor> in, std::span<RefTensor> out) const override {
    const auto dim = static_cast<std::size_t>(op.attrs.integer("dim"));
    const auto inner = row_major_strides(out[0].shape)[dim];
    const auto total = out[0].shape[dim];
    if (numel(out[0].shape) == 0) return;
    for (std::int64_t o = 0; o < numel(out[0].shape) / (total * inner); ++o) {
      auto at = out[0].data.begin() + o * total * inner;
      for (const auto& t : in) at = std::copy_n(t.data.begin() + o * t.shape[dim] * inner, t.shape[dim] * inner, at);
    }
  }
};

COMFYTP_OP(Transpose)
COMFYTP_OP(SplitDim)
COMFYTP_OP(MergeDims)
COMFYTP_OP(Slice)
COMFYTP_OP(Concat)

}  // namespace
}  // namespace comfytp::graph
