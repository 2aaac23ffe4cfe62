// Elementwise ops of one operand, one row of the table each, and cast.
#include <cmath>
#include <numbers>

#include "graph/graph.h"

namespace comfytp::graph {
namespace {

class Elementwise : public Op {
 public:
  Rule rule(const OpContext& op) const override {
    Rule rule;
    rule.inputs = {free_dims(rule, op.in[0].shape)};
    rule.outputs = rule.inputs;
    return rule;
  }
  Layout layout(const OpContext&, std::span<const Order> produced) const override { return {{produced[0]}, {produced[0]}}; }
};

class Unary final : public Elementwise {
 public:
  Unary(std::string_view name, double (*function)(double), double flops) : name_(name), function_(function), flops_(flops) {}
  std::string_view name() const override { return name_; }
  std::vector<Type> infer(const Attrs&, std::span<const Type> in) const override {
    expect_inputs(name_, in, 1, 1);
    return {in[0]};
  }
  bool in_place(const OpContext&, std::size_t) const override { return true; }
  double flops(const OpContext& op) const override { return flops_ * static_cast<double>(numel(op.out[0].shape)); }
  void reference(const OpContext&, std::span<const RefTensor> in, std::span<RefTensor> out) const override {
    for (std::size_t i = 0; i < in[0].data.size(); ++i) out[0].data[i] = function_(in[0].data[i]);
  }

 private:
  std::string_view name_;
  double (*function_)(double);
  double flops_;
};

// GELU with the error function and by tanh (Hendrycks & Gimpel 2016) and SiLU (Elfwing et al. 2017), as torch defines them.
const bool registered = [] {
  const auto add = [](std::string_view name, double (*function)(double), double flops) {
    return detail::register_op(std::make_unique<Unary>(name, function, flops));
  };
  return add("silu", [](double x) { return x / (1 + std::exp(-x)); }, 4) &&
         add("gelu", [](double x) { return 0.5 * x * (1 + std::erf(x / std::numbers::sqrt2)); }, 8) &&
         add("gelu_tanh", [](double x) { return 0.5 * x * (1 + std::tanh(std::sqrt(2 / std::numbers::pi) * (x + 0.044715 * x * x * x))); }, 10) &&
         add("sin", [](double x) { return std::sin(x); }, 4) && add("cos", [](double x) { return std::cos(x); }, 4) &&
         add("tanh", [](double x) { return std::tanh(x); }, 4) && add("sigmoid", [](double x) { return 1 / (1 + std::exp(-x)); }, 4) &&
         add("relu", [](double x) { return x > 0 ? x : 0; }, 1) && add("exp", [](double x) { return std::exp(x); }, 4) &&
         add("log", [](double x) { return std::log(x); }, 4) && add("sqrt", [](double x) { return std::sqrt(x); }, 2) &&
         add("rsqrt", [](double x) { return 1 / std::sqrt(x); }, 2) && add("abs", [](double x) { return std::abs(x); }, 1) &&
         add("neg", [](double x) { return -x; }, 1) && add("logical_not", [](double x) { return double(x == 0); }, 1);
}();

// Attribute: dtype. The reference keeps double precision.
class Cast final : public Elementwise {
 public:
  std::string_view name() const override { return "cast"; }
  std::vector<Type> infer(const Attrs& a, std::span<const Type> in) const override {
    expect_inputs(name(), in, 1, 1);
    return {{dtype_from_name(a.text("dtype")), in[0].shape}};
  }
  void reference(const OpContext&, std::span<const RefTensor> in, std::span<RefTensor> out) const override {
    out[0].data = in[0].data;
  }
};
COMFYTP_OP(Cast)

}  // namespace
}  // namespace comfytp::graph
