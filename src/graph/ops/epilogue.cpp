#include "graph/ops/epilogue.h"

#include "base/error.h"

namespace comfytp::graph {

std::vector<std::string> epilogue_of(const Attrs& attrs) { return steps_of(attrs.text_or("epilogue", "")); }

bool activates_epilogue(std::string_view step) { return step == "silu" || step == "gelu" || step == "gelu_tanh"; }

void check_epilogue(std::string_view op, const Attrs& attrs, std::span<const Type> in, std::size_t skip, const Type& out,
                    std::size_t channel_dim) {
  std::size_t next = skip;
  for (const auto& step : epilogue_of(attrs)) {
    if (activates_epilogue(step)) continue;
    require(step == "bias" || step == "mul" || step == "add", "[{}] expected an epilogue of bias, mul, add, silu, gelu, gelu_tanh but got '{}'", op, step);
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
  steps_reference(op.attrs.text_or("epilogue", ""), in.subspan(skip), channel_dim, out);
}

double epilogue_flops(const OpContext& op) {
  return static_cast<double>(epilogue_of(op.attrs).size()) * static_cast<double>(numel(op.out[0].shape));
}

}  // namespace comfytp::graph
