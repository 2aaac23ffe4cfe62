#include "graph/ops/epilogue.h"

#include <cmath>

#include "base/error.h"

namespace comfytp::graph {

std::vector<std::string> epilogue_of(const Attrs& attrs) { return steps_of(attrs.text_or("epilogue", "")); }

void check_epilogue(std::string_view op, const Attrs& attrs, std::span<const Type> in, std::size_t skip, const Type& out,
                    std::size_t channel_dim) {
  std::size_t next = skip;
  for (const auto& step : epilogue_of(attrs)) {
    if (step == "silu" || step == "gelu") continue;
    require(step == "bias" || step == "mul" || step == "add", "[{}] expected an epilogue of bias, mul, add, silu, gelu but got '{}'", op, step);
    require(next < in.size(), "[{}] expected an operand for '{}' of the epilogue but got none", op, step);
    const Type expected{out.dtype, step == "bias" ? Shape{out.shape[channel_dim]} : out.shape};
    require(in[next] == expected, "[{}] expected {} as {} but got {}", op, step, to_string(expected), to_string(in[next]));
    ++next;
  }
  require(next == in.size(), "[{}] expected {} inputs but got {}", op, next, in.size());
}

void epilogue_rule(Rule& rule, const OpContext& op, std::size_t channel_dim) {
  const auto steps = epilogue_of(op.attrs);
  for (const auto& step : steps) {
    if (step == "bias") rule.inputs.push_back({rule.outputs[0][channel_dim]});
    if (step == "mul" || step == "add") rule.inputs.push_back(rule.outputs[0]);
  }
  if (steps.empty()) return;
  for (auto& factor : rule.factors)
    if (factor.kind == FactorKind::contracted) factor.kind = FactorKind::whole;
}

void epilogue_reference(const OpContext& op, std::span<const RefTensor> in, std::size_t skip, std::size_t channel_dim, RefTensor& out) {
  const auto inner = row_major_strides(out.shape)[channel_dim];
  std::size_t next = skip;
  for (const auto& step : epilogue_of(op.attrs)) {
    const RefTensor* operand = takes_operand(step) ? &in[next++] : nullptr;
    for (std::size_t i = 0; i < out.data.size(); ++i) {
      double& y = out.data[i];
      if (step == "bias") y += operand->data[static_cast<std::int64_t>(i) / inner % out.shape[channel_dim]];
      if (step == "mul") y *= operand->data[i];
      if (step == "add") y += operand->data[i];
      if (step == "silu") y /= 1 + std::exp(-y);
      if (step == "gelu") y = 0.5 * y * (1 + std::erf(y * std::sqrt(0.5)));
    }
  }
}

double epilogue_flops(const OpContext& op) {
  return static_cast<double>(epilogue_of(op.attrs).size()) * static_cast<double>(numel(op.out[0].shape));
}

}  // namespace comfytp::graph
