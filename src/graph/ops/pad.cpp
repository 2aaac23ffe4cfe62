// pad and expand: a tensor made larger by what is around it or by repeating a dimension of size 1.
#include <algorithm>

#include "base/error.h"
#include "graph/graph.h"

namespace comfytp::graph {
namespace {

// Attributes: before, after (one entry a dimension), mode: "constant" with value, "replicate" or "circular" (as torch's).
class Pad final : public Op {
 public:
  std::string_view name() const override { return "pad"; }
  std::vector<Type> infer(const Attrs& a, std::span<const Type> in) const override {
    expect_inputs(name(), in, 1, 1);
    const auto &before = a.ints("before"), &after = a.ints("after");
    const auto& mode = a.text("mode");
    require(mode == "constant" || mode == "replicate" || mode == "circular", "[pad] expected mode constant, replicate or circular but got '{}'", mode);
    if (mode == "constant") (void)a.real("value");
    require(before.size() == in[0].shape.size() && after.size() == before.size(), "[pad] expected {} paddings on each side of {} but got {} and {}",
            in[0].shape.size(), to_string(in[0]), before.size(), after.size());
    Type out = in[0];
    expect_shape(name(), before);
    expect_shape(name(), after);
    for (std::size_t d = 0; d < before.size(); ++d) {
      const bool fits = mode != "circular" || std::max(before[d], after[d]) <= in[0].shape[d];
      require(fits, "[pad] expected paddings that fit {} but got {} and {}", to_string(in[0]), comfytp::to_string(before), comfytp::to_string(after));
      out.shape[d] += before[d] + after[d];
    }
    return {out};
  }
  // A part of a padded dimension needs the rows it shows; what it shows of the edge (replicate) is the edge's own row.
  Rule rule(const OpContext& op) const override {
    Rule rule;
    rule.outputs = {free_dims(rule, op.out[0].shape)};
    rule.inputs = rule.outputs;
    const bool circular = op.attrs.text("mode") == "circular";
    for (std::size_t d = 0; d < op.in[0].shape.size(); ++d) {
      if (op.in[0].shape[d] == op.out[0].shape[d]) continue;
      if (circular) {
        rule.factors[d].kind = FactorKind::whole;
        rule.inputs[0][d] = rule.add("whole", op.in[0].shape[d], FactorKind::whole);
      } else {
        rule.inputs[0][d] = DimRule(static_cast<int>(d), [attrs = op.attrs, size = op.in[0].shape[d], d](Interval r) { return shown(attrs, size, d, r); });
      }
    }
    return rule;
  }
  Attrs localize(const OpContext& op, std::span<const Interval> ranges, std::span<const Type>) const override {
    Attrs local = op.attrs;
    Ints before = op.attrs.ints("before"), after = op.attrs.ints("after");
    for (std::size_t d = 0; d < before.size(); ++d) {
      if (op.in[0].shape[d] == op.out[0].shape[d] || op.attrs.text("mode") == "circular") continue;
      const Interval r = ranges[d], part = shown(op.attrs, op.in[0].shape[d], d, r);
      const auto left = std::clamp<std::int64_t>(before[d] + part.lo - r.lo, 0, r.size() - part.size());
      after[d] = r.size() - part.size() - left;
      before[d] = left;
    }
    local.set("before", before);
    local.set("after", after);
    return local;
  }
  Layout layout(const OpContext&, std::span<const Order> produced) const override { return {{produced[0]}, {produced[0]}}; }
  void reference(const OpContext& op, std::span<const RefTensor> in, std::span<RefTensor> out) const override {
    const auto& before = op.attrs.ints("before");
    const auto& mode = op.attrs.text("mode");
    const auto to = row_major_strides(out[0].shape), from = row_major_strides(in[0].shape);
    for (std::int64_t i = 0; i < numel(out[0].shape); ++i) {
      std::int64_t at = 0;
      bool inside = true;
      for (std::size_t d = 0; d < to.size(); ++d) {
        const auto size = in[0].shape[d];
        auto row = i / to[d] % out[0].shape[d] - before[d];
        if (mode == "replicate") row = std::clamp<std::int64_t>(row, 0, size - 1);
        if (mode == "circular") row = (row + size) % size;
        inside = inside && row >= 0 && row < size;
        at += row * from[d];
      }
      out[0].data[i] = inside ? in[0].data[at] : op.attrs.real("value");
    }
  }

 private:
  // The input rows that output rows r show.
  static Interval shown(const Attrs& a, std::int64_t size, std::size_t d, Interval r) {
    const auto before = a.ints("before")[d];
    if (r.size() == 0 || size == 0) return {0, 0};
    const bool edge = a.text("mode") == "replicate";
    const auto lo = std::clamp<std::int64_t>(r.lo - before, 0, edge ? size - 1 : size);
    const auto hi = std::clamp<std::int64_t>(r.hi - before, edge ? 1 : 0, size);
    return {lo, std::max(lo, hi)};
  }
};

// Attribute: shape; dimensions of size 1 become as large as it says.
class Expand final : public Op {
 public:
  std::string_view name() const override { return "expand"; }
  std::vector<Type> infer(const Attrs& a, std::span<const Type> in) const override {
    expect_inputs(name(), in, 1, 1);
    const auto& shape = a.ints("shape");
    bool fits = shape.size() == in[0].shape.size();
    for (std::size_t d = 0; fits && d < shape.size(); ++d) fits = in[0].shape[d] == shape[d] || in[0].shape[d] == 1;
    require(fits, "[expand] expected a shape that {} expands to but got {}", to_string(in[0]), comfytp::to_string(shape));
    return {{in[0].dtype, shape}};
  }
  Rule rule(const OpContext& op) const override {
    Rule rule;
    rule.outputs = {free_dims(rule, op.out[0].shape)};
    rule.inputs = rule.outputs;
    for (std::size_t d = 0; d < op.in[0].shape.size(); ++d)
      if (op.in[0].shape[d] != op.out[0].shape[d]) rule.inputs[0][d] = DimRule();
    rule.linear = true;
    return rule;
  }
  Attrs localize(const OpContext& op, std::span<const Interval> ranges, std::span<const Type>) const override {
    Attrs local = op.attrs;
    Ints shape;
    for (auto r : ranges) shape.push_back(r.size());
    local.set("shape", shape);
    return local;
  }
  Layout layout(const OpContext&, std::span<const Order> produced) const override { return {{produced[0]}, {produced[0]}}; }
  void reference(const OpContext&, std::span<const RefTensor> in, std::span<RefTensor> out) const override {
    const auto to = row_major_strides(out[0].shape), from = row_major_strides(in[0].shape);
    for (std::int64_t i = 0; i < numel(out[0].shape); ++i) {
      std::int64_t at = 0;
      for (std::size_t d = 0; d < to.size(); ++d)
        if (in[0].shape[d] != 1) at += i / to[d] % out[0].shape[d] * from[d];
      out[0].data[i] = in[0].data[at];
    }
  }
};

COMFYTP_OP(Pad)
COMFYTP_OP(Expand)

}  // namespace
}  // namespace comfytp::graph
