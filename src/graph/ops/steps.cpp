#include "graph/ops/steps.h"

#include <algorithm>
#include <array>

#include "base/error.h"

namespace comfytp::graph {
namespace {

constexpr std::array<std::string_view, 6> kActivations = {"silu", "gelu", "gelu_tanh", "sigmoid", "tanh", "relu"};

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

bool takes_operand(std::string_view step) { return step == "bias" || step == "mul" || step == "add" || step == "add_one_mul"; }

bool is_activation(std::string_view step) { return std::find(kActivations.begin(), kActivations.end(), step) != kActivations.end(); }

std::size_t operand_count(std::string_view list) {
  const auto steps = steps_of(list);
  return static_cast<std::size_t>(std::count_if(steps.begin(), steps.end(), [](const auto& step) { return takes_operand(step); }));
}

std::size_t check_steps(std::string_view op, std::string_view list, std::span<const Type> in, std::size_t first, const Type& x,
                        std::size_t channel) {
  const auto steps = steps_of(list);
  require(steps.size() <= kMostSteps, "[{}] expected at most {} steps but got '{}'", op, kMostSteps, list);
  for (const auto& step : steps) {
    if (is_activation(step)) continue;
    require(takes_operand(step), "[{}] expected a step of bias, add, mul, add_one_mul or an activation but got '{}'", op, step);
    require(first < in.size(), "[{}] expected an operand for '{}' but got none", op, step);
    const Type& operand = in[first++];
    bool fits = operand.dtype == x.dtype;
    if (step == "bias") {
      require(channel < x.shape.size(), "[{}] expected a channel dimension of {} for 'bias' but got {}", op, to_string(x), channel);
      fits = fits && operand.shape == Shape{x.shape[channel]};
    } else {
      fits = fits && operand.shape.size() == x.shape.size();
      for (std::size_t d = 0; fits && d < x.shape.size(); ++d) fits = operand.shape[d] == x.shape[d] || operand.shape[d] == 1;
    }
    require(fits, "[{}] expected an operand for '{}' of {} but got {}", op, step, to_string(x), to_string(operand));
  }
  return first;
}

void steps_reference(std::string_view list, std::span<const RefTensor> operands, std::size_t channel, RefTensor& y) {
  std::size_t next = 0;
  for (const auto& step : steps_of(list)) {
    if (is_activation(step)) {
      run_reference(step, y);
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
  for (const auto& step : steps_of(list)) flops += is_activation(step) ? 8 : step == "add_one_mul" ? 2 : 1;
  return flops;
}

}  // namespace comfytp::graph
