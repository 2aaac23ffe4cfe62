// Elementwise ops of two operands with broadcasting (numpy's: aligned at the last dimension, sizes equal or 1).
#include <algorithm>

#include "base/error.h"
#include "graph/graph.h"

namespace comfytp::graph {
namespace {

class Binary final : public Op {
 public:
  Binary(std::string_view name, double (*function)(double, double), bool linear) : name_(name), function_(function), linear_(linear) {}
  std::string_view name() const override { return name_; }

  std::vector<Type> infer(const Attrs&, std::span<const Type> in) const override {
    expect_inputs(name_, in, 2, 2);
    const auto &a = in[0].shape, &b = in[1].shape;
    const std::size_t rank = std::max(a.size(), b.size());
    Shape shape(rank);
    bool fits = in[0].dtype == in[1].dtype;
    for (std::size_t d = 0; d < rank; ++d) {
      const auto size = [&](const Shape& s) { return d + s.size() < rank ? 1 : s[d + s.size() - rank]; };
      fits = fits && (size(a) == size(b) || size(a) == 1 || size(b) == 1);
      shape[d] = size(a) == 1 ? size(b) : size(a);
    }
    require(fits, "[{}] expected operands of one dtype that broadcast but got {} and {}", name_, to_string(in[0]), to_string(in[1]));
    return {{in[0].dtype, shape}};
  }

  Rule rule(const OpContext& op) const override {
    Rule rule;
    const auto& shape = op.out[0].shape;
    rule.outputs = {free_dims(rule, shape)};
    for (const auto& t : op.in) {
      std::vector<DimRule> dims;
      const std::size_t skip = shape.size() - t.shape.size();
      for (std::size_t d = 0; d < t.shape.size(); ++d)
        dims.push_back(t.shape[d] == shape[d + skip] ? rule.outputs[0][d + skip] : DimRule());
      rule.inputs.push_back(std::move(dims));
    }
    rule.linear = linear_;
    return rule;
  }

  // Operands of the full shape lie like the first of them; broadcast ones are small and stay as they are.
  Layout layout(const OpContext& op, std::span<const Order> produced) const override {
    const auto& shape = op.out[0].shape;
    Layout layout{{produced[0], produced[1]}, {row_major(shape.size())}};
    const int first = op.in[0].shape == shape ? 0 : op.in[1].shape == shape ? 1 : -1;
    if (first < 0) return layout;
    layout.out[0] = produced[first];
    if (first == 0 && op.in[1].shape == shape) layout.in[1] = produced[0];
    return layout;
  }
  bool in_place(const OpContext& op, std::size_t i) const override { return op.in[i].shape == op.out[0].shape; }
  double flops(const OpContext& op) const override { return static_cast<double>(numel(op.out[0].shape)); }

  void reference(const OpContext& op, std::span<const RefTensor> in, std::span<RefTensor> out) const override {
    const auto& shape = op.out[0].shape;
    const auto steps = [&](const Shape& s) {
      Shape strides(shape.size(), 0);
      const auto dense = row_major_strides(s);
      for (std::size_t d = 0; d < s.size(); ++d) strides[d + shape.size() - s.size()] = s[d] == 1 ? 0 : dense[d];
      return strides;
    };
    const auto a = steps(in[0].shape), b = steps(in[1].shape), o = row_major_strides(shape);
    for (std::int64_t i = 0; i < numel(shape); ++i) {
      std::int64_t ia = 0, ib = 0;
      for (std::size_t d = 0; d < shape.size(); ++d) {
        const auto index = i / o[d] % shape[d];
        ia += index * a[d];
        ib += index * b[d];
      }
      out[0].data[i] = function_(in[0].data[ia], in[1].data[ib]);
    }
  }

 private:
  std::string_view name_;
  double (*function_)(double, double);
  bool linear_;
};

const bool registered = [] {
  const auto add = [](std::string_view name, double (*function)(double, double), bool linear) {
    return detail::register_op(std::make_unique<Binary>(name, function, linear));
  };
  return add("add", [](double a, double b) { return a + b; }, true) && add("sub", [](double a, double b) { return a - b; }, false) &&
         add("mul", [](double a, double b) { return a * b; }, false) && add("div", [](double a, double b) { return a / b; }, false);
}();

}  // namespace
}  // namespace comfytp::graph
