// Elementwise ops of two or three operands with broadcasting (numpy's: aligned at the last dimension, sizes equal or 1).
#include <algorithm>
#include <cmath>

#include "base/error.h"
#include "graph/graph.h"

namespace comfytp::graph {
namespace {

// Size of dimension d of a `rank`-dimensional result, as an operand sees it.
std::int64_t size_at(const Shape& s, std::size_t d, std::size_t rank) { return d + s.size() < rank ? 1 : s[d + s.size() - rank]; }

class Broadcasting : public Op {
 public:
  explicit Broadcasting(std::string_view name) : name_(name) {}
  std::string_view name() const override { return name_; }

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
    return rule;
  }

  // Operands of the full shape lie like the first of them; broadcast ones are small and stay as they are.
  Layout layout(const OpContext& op, std::span<const Order> produced) const override {
    const auto& shape = op.out[0].shape;
    Layout layout{{produced.begin(), produced.end()}, {}};
    for (std::size_t i = 0; i < op.in.size(); ++i) {
      if (op.in[i].shape != shape) continue;
      if (layout.out.empty()) layout.out = {produced[i]};
      layout.in[i] = layout.out[0];
    }
    if (layout.out.empty()) layout.out = {row_major(shape.size())};
    return layout;
  }
  bool in_place(const OpContext& op, std::size_t i) const override { return op.in[i] == op.out[0]; }
  double flops(const OpContext& op) const override { return static_cast<double>(numel(op.out[0].shape)); }

 protected:
  // The shape that operands [first, in.size()) broadcast to; they have one dtype.
  Shape broadcast(std::span<const Type> in) const {
    Shape shape;
    for (const auto& t : in) {
      const std::size_t rank = std::max(shape.size(), t.shape.size());
      Shape wider(rank);
      for (std::size_t d = 0; d < rank; ++d) {
        const auto a = size_at(shape, d, rank), b = size_at(t.shape, d, rank);
        require(a == b || a == 1 || b == 1, "[{}] expected operands that broadcast but got {} and {}", name_, comfytp::to_string(shape), to_string(t));
        wider[d] = a == 1 ? b : a;
      }
      shape = wider;
    }
    return shape;
  }
  static Shape steps(const Shape& s, std::size_t rank) {
    Shape strides(rank, 0);
    const auto dense = row_major_strides(s);
    for (std::size_t d = 0; d < s.size(); ++d) strides[d + rank - s.size()] = s[d] == 1 ? 0 : dense[d];
    return strides;
  }
  template <typename Function>
  void for_each(std::span<const RefTensor> in, RefTensor& out, Function function) const {
    std::vector<Shape> strides;
    for (const auto& t : in) strides.push_back(steps(t.shape, out.shape.size()));
    const auto dense = row_major_strides(out.shape);
    std::vector<double> operands(in.size());
    for (std::int64_t i = 0; i < numel(out.shape); ++i) {
      for (std::size_t k = 0; k < in.size(); ++k) {
        std::int64_t at = 0;
        for (std::size_t d = 0; d < out.shape.size(); ++d) at += i / dense[d] % out.shape[d] * strides[k][d];
        operands[k] = in[k].data[static_cast<std::size_t>(at)];
      }
      out.data[static_cast<std::size_t>(i)] = function(operands);
    }
  }

 private:
  std::string_view name_;
};

enum class Gives { operand, truth };  // the result's dtype: the operands', or bool

class Binary final : public Broadcasting {
 public:
  Binary(std::string_view name, double (*function)(double, double), bool linear, Gives gives)
      : Broadcasting(name), function_(function), linear_(linear), gives_(gives) {}

  std::vector<Type> infer(const Attrs&, std::span<const Type> in) const override {
    expect_inputs(name(), in, 2, 2);
    require(in[0].dtype == in[1].dtype, "[{}] expected operands of one dtype that broadcast but got {} and {}", name(), to_string(in[0]),
            to_string(in[1]));
    return {{gives_ == Gives::truth ? DType::boolean : in[0].dtype, broadcast(in)}};
  }
  Rule rule(const OpContext& op) const override {
    Rule rule = Broadcasting::rule(op);
    rule.linear = linear_;
    return rule;
  }
  void reference(const OpContext&, std::span<const RefTensor> in, std::span<RefTensor> out) const override {
    for_each(in, out[0], [this](const std::vector<double>& x) { return function_(x[0], x[1]); });
  }

 private:
  double (*function_)(double, double);
  bool linear_;
  Gives gives_;
};

const bool registered = [] {
  using Function = double (*)(double, double);
  const auto add = [](std::string_view name, Function function, bool linear = false, Gives gives = Gives::operand) {
    return detail::register_op(std::make_unique<Binary>(name, function, linear, gives));
  };
  const auto compare = [&](std::string_view name, Function function) { return add(name, function, false, Gives::truth); };
  return add("add", [](double a, double b) { return a + b; }, true) && add("sub", [](double a, double b) { return a - b; }) &&
         add("mul", [](double a, double b) { return a * b; }) && add("div", [](double a, double b) { return a / b; }) &&
         add("pow", [](double a, double b) { return std::pow(a, b); }) && add("maximum", [](double a, double b) { return a > b ? a : b; }) &&
         add("minimum", [](double a, double b) { return a < b ? a : b; }) && compare("equal", [](double a, double b) { return double(a == b); }) &&
         compare("not_equal", [](double a, double b) { return double(a != b); }) && compare("less", [](double a, double b) { return double(a < b); }) &&
         compare("less_equal", [](double a, double b) { return double(a <= b); }) &&
         compare("greater", [](double a, double b) { return double(a > b); }) &&
         compare("greater_equal", [](double a, double b) { return double(a >= b); });
}();

// Inputs: condition (bool), a, b: a where the condition holds, else b.
class Where final : public Broadcasting {
 public:
  Where() : Broadcasting("where") {}
  std::vector<Type> infer(const Attrs&, std::span<const Type> in) const override {
    expect_inputs(name(), in, 3, 3);
    require(in[0].dtype == DType::boolean && in[1].dtype == in[2].dtype, "[where] expected a bool condition and two operands of one dtype but got {}, {} and {}",
            to_string(in[0]), to_string(in[1]), to_string(in[2]));
    return {{in[1].dtype, broadcast(in)}};
  }
  void reference(const OpContext&, std::span<const RefTensor> in, std::span<RefTensor> out) const override {
    for_each(in, out[0], [](const std::vector<double>& x) { return x[0] != 0 ? x[1] : x[2]; });
  }
};
COMFYTP_OP(Where)

}  // namespace
}  // namespace comfytp::graph
