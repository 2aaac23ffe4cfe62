#include "graph/ops/steps.h"

#include <algorithm>
#include <array>

#include "base/error.h"

namespace comfytp::graph {
namespace {

constexpr std::array<std::string_view, 6> kActivations = {"silu", "gelu", "gelu_tanh", "sigmoid", "tanh", "relu"};

// The step rope.
void turn(RefTensor& y, const RefTensor& cos, const RefTensor& sin) {
  const auto columns = y.shape.back(), each = columns / cos.shape.back();
  const auto strides = row_major_strides(y.shape), own = row_major_strides(cos.shape);
  for (std::int64_t i = 0; i < numel(y.shape); i += 2) {
    std::int64_t at = 0;
    for (std::size_t d = 0; d + 1 < y.shape.size(); ++d)
      if (cos.shape[d] != 1) at += i / strides[d] % y.shape[d] * own[d];
    const auto pair = i % columns;
    const auto first = static_cast<std::size_t>(at + pair / each), second = static_cast<std::size_t>(at + (pair + 1) / each);
    const double x0 = y.data[static_cast<std::size_t>(i)], x1 = y.data[static_cast<std::size_t>(i) + 1];
    y.data[static_cast<std::size_t>(i)] = x0 * cos.data[first] - x1 * sin.data[first];
    y.data[static_cast<std::size_t>(i) + 1] = x1 * cos.data[second] + x0 * sin.data[second];
  }
}

// The reference of another op, applied to a value and maybe an operand that broadcasts.
void run_reference(std::string_view op, RefTensor& y, const RefTensor* operand = nullptr) {
  const Attrs none;
  std::vector<RefTensor> in = {std::move(y)}, out = {RefTensor(in[0].shape)};
  if (operand) in.push_back(*operand);
  find_op(op).reference({none, {}, {}}, in, out);
  y = std::move(out[0]);
}

}  // namespace

std::vector<std::string> steps_of(std::string_view list) {
  std::vector<std::string> steps;
  for (std::size_t at = 0; at < list.size();) {
    const auto end = std::min(list.find(',', at), list.size());
    steps.emplace_back(list.substr(at, end - at));
    at = end + 1;
  }
  return steps;
}

std::size_t operands_of(std::string_view step) {
  if (step == "rope") return 2;
  return step == "bias" || step == "mul" || step == "add" || step == "add_one_mul" ? 1 : 0;
}

bool takes_operand(std::string_view step) { return operands_of(step) > 0; }

bool is_activation(std::string_view step) { return std::find(kActivations.begin(), kActivations.end(), step) != kActivations.end(); }

std::size_t operand_count(std::string_view list) {
  std::size_t count = 0;
  for (const auto& step : steps_of(list)) count += operands_of(step);
  return count;
}

DType dtype_or(const Attrs& attrs, std::string_view attribute, DType value) {
  return attrs.has(attribute) ? dtype_from_name(attrs.text(attribute)) : value;
}

void check_dtypes(std::string_view op, std::span<const Type> types) {
  DType narrow = DType::f32;
  for (const auto& type : types) {
    if (type.dtype == DType::f32 || type.dtype == narrow) continue;
    const bool beside = type.dtype == DType::f16 || type.dtype == DType::bf16;
    bool alone = narrow == DType::f32;
    for (const auto& other : types) alone = alone && (beside || other.dtype == type.dtype);
    require(alone && is_float(type.dtype), "[{}] expected operands of one dtype, or f32 beside f16 or bf16, but got {} and {}", op, to_string(types[0]),
            to_string(type));
    narrow = type.dtype;
  }
}

std::size_t check_steps(std::string_view op, std::string_view list, std::span<const Type> in, std::size_t first, const Type& x,
                        std::size_t channel) {
  const auto steps = steps_of(list);
  require(steps.size() <= kMostSteps, "[{}] expected at most {} steps but got '{}'", op, kMostSteps, list);
  for (const auto& step : steps) {
    if (is_activation(step)) continue;
    require(takes_operand(step), "[{}] expected a step of bias, add, mul, add_one_mul, rope or an activation but got '{}'", op, step);
    require(first + operands_of(step) <= in.size(), "[{}] expected an operand for '{}' but got none", op, step);
    const Type& operand = in[first++];
    bool fits = true;
    if (step == "rope") {
      fits = operand.shape.size() == x.shape.size() && !x.shape.empty() && x.shape.back() % 2 == 0 && in[first++] == operand &&
             (operand.shape.back() == x.shape.back() || operand.shape.back() == x.shape.back() / 2);
      for (std::size_t d = 0; fits && d + 1 < x.shape.size(); ++d) fits = operand.shape[d] == x.shape[d] || operand.shape[d] == 1;
    } else if (step == "bias") {
      require(channel < x.shape.size(), "[{}] expected a channel dimension of {} for 'bias' but got {}", op, to_string(x), channel);
      fits = operand.shape == Shape{x.shape[channel]};
    } else {
      fits = operand.shape.size() == x.shape.size();
      for (std::size_t d = 0; fits && d < x.shape.size(); ++d) fits = operand.shape[d] == x.shape[d] || operand.shape[d] == 1;
    }
    require(fits, "[{}] expected an operand for '{}' of {} but got {}", op, step, to_string(x), to_string(operand));
  }
  return first;
}

std::size_t lay_operands(std::string_view list, const OpContext& op, std::size_t first, const Order& x, Layout& layout) {
  for (const auto& step : steps_of(list))
    for (std::size_t k = 0; k < operands_of(step); ++k, ++first) {
      if (op.in[first].shape == op.in[0].shape) layout.in[first] = x;
      else if (step == "rope") layout.in[first] = row_major(x.size());
    }
  return first;
}

bool takes_pairs(std::string_view list) {
  const auto steps = steps_of(list);
  return std::find(steps.begin(), steps.end(), "rope") != steps.end();
}

void steps_reference(std::string_view list, std::span<const RefTensor> operands, std::size_t channel, RefTensor& y) {
  std::size_t next = 0;
  for (const auto& step : steps_of(list)) {
    if (is_activation(step)) {
      run_reference(step, y);
      continue;
    }
    if (step == "rope") {
      turn(y, operands[next], operands[next + 1]);
      next += 2;
      continue;
    }
    RefTensor operand = operands[next++];
    if (step == "bias") operand.shape.resize(y.shape.size() - channel, 1);
    if (step == "add_one_mul")
      for (double& v : operand.data) v += 1;
    run_reference(step == "bias" || step == "add" ? "add" : "mul", y, &operand);
  }
}

double steps_flops(std::string_view list) {
  double flops = 0;
  for (const auto& step : steps_of(list)) flops += is_activation(step) ? 8 : step == "rope" ? 3 : step == "add_one_mul" ? 2 : 1;
  return flops;
}

}  // namespace comfytp::graph
