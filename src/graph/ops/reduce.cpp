// sum and amax over dimensions, which stay with size 1; softmax over one dimension.
#include <algorithm>
#include <cmath>
#include <limits>

#include "base/error.h"
#include "graph/graph.h"

namespace comfytp::graph {
namespace {

bool reduced(const Attrs& a, std::size_t d) {
  const auto& dims = a.ints("dims");
  return std::find(dims.begin(), dims.end(), static_cast<std::int64_t>(d)) != dims.end();
}

// Attribute: dims.
class Reduce final : public Op {
 public:
  Reduce(std::string_view name, double start, double (*join)(double, double), bool linear)
      : name_(name), start_(start), join_(join), linear_(linear) {}
  std::string_view name() const override { return name_; }
  std::vector<Type> infer(const Attrs& a, std::span<const Type> in) const override {
    expect_inputs(name_, in, 1, 1);
    Type out = in[0];
    for (auto d : a.ints("dims")) {
      require(d >= 0 && d < static_cast<std::int64_t>(out.shape.size()), "[{}] expected dimensions of {} but got {}", name_, to_string(in[0]), d);
      out.shape[static_cast<std::size_t>(d)] = 1;
    }
    return {out};
  }
  Rule rule(const OpContext& op) const override {
    Rule rule;
    rule.inputs = {free_dims(rule, op.in[0].shape)};
    rule.outputs = rule.inputs;
    for (std::size_t d = 0; d < op.in[0].shape.size(); ++d) {
      if (!reduced(op.attrs, d)) continue;
      // Parts are summed by collectives, which sum real numbers.
      rule.factors[d].kind = linear_ && is_float(op.in[0].dtype) ? FactorKind::contracted : FactorKind::whole;
      rule.outputs[0][d] = DimRule();
    }
    rule.linear = linear_;
    return rule;
  }
  Layout layout(const OpContext&, std::span<const Order> produced) const override { return {{produced[0]}, {produced[0]}}; }
  double flops(const OpContext& op) const override { return static_cast<double>(numel(op.in[0].shape)); }
  void reference(const OpContext&, std::span<const RefTensor> in, std::span<RefTensor> out) const override {
    std::fill(out[0].data.begin(), out[0].data.end(), start_);
    const auto steps = row_major_strides(in[0].shape), kept = row_major_strides(out[0].shape);
    for (std::int64_t i = 0; i < numel(in[0].shape); ++i) {
      std::int64_t at = 0;
      for (std::size_t d = 0; d < steps.size(); ++d)
        if (out[0].shape[d] != 1) at += i / steps[d] % in[0].shape[d] * kept[d];
      out[0].data[at] = join_(out[0].data[at], in[0].data[i]);
    }
  }

 private:
  std::string_view name_;
  double start_;
  double (*join_)(double, double);
  bool linear_;
};

const bool registered =
    detail::register_op(std::make_unique<Reduce>("sum", 0.0, [](double a, double b) { return a + b; }, true)) &&
    detail::register_op(std::make_unique<Reduce>("amax", -std::numeric_limits<double>::infinity(), [](double a, double b) { return std::max(a, b); }, false));

// Attribute: dim.
class Softmax final : public Op {
 public:
  std::string_view name() const override { return "softmax"; }
  std::vector<Type> infer(const Attrs& a, std::span<const Type> in) const override {
    expect_inputs(name(), in, 1, 1);
    const auto d = a.integer("dim");
    require(d >= 0 && d < static_cast<std::int64_t>(in[0].shape.size()), "[softmax] expected a dimension of {} but got {}", to_string(in[0]), d);
    return {in[0]};
  }
  Rule rule(const OpContext& op) const override {
    Rule rule;
    rule.inputs = {free_dims(rule, op.in[0].shape)};
    rule.factors[static_cast<std::size_t>(op.attrs.integer("dim"))].kind = FactorKind::whole;
    rule.outputs = rule.inputs;
    return rule;
  }
  Layout layout(const OpContext&, std::span<const Order> produced) const override { return {{produced[0]}, {produced[0]}}; }
  double flops(const OpContext& op) const override { return 5.0 * static_cast<double>(numel(op.in[0].shape)); }
  void reference(const OpContext& op, std::span<const RefTensor> in, std::span<RefTensor> out) const override {
    const auto d = static_cast<std::size_t>(op.attrs.integer("dim"));
    const auto size = in[0].shape[d], inner = row_major_strides(in[0].shape)[d];
    for (std::int64_t row = 0; row < numel(in[0].shape) / size; ++row) {
      const auto first = row / inner * inner * size + row % inner;
      double top = -std::numeric_limits<double>::infinity(), sum = 0;
      for (std::int64_t i = 0; i < size; ++i) top = std::max(top, in[0].data[first + i * inner]);
      for (std::int64_t i = 0; i < size; ++i) sum += std::exp(in[0].data[first + i * inner] - top);
      for (std::int64_t i = 0; i < size; ++i) out[0].data[first + i * inner] = std::exp(in[0].data[first + i * inner] - top) / sum;
    }
  }
};
COMFYTP_OP(Softmax)

}  // namespace
}  // namespace comfytp::graph
