#include "backend/cuda/chain_plan.h"

#include <algorithm>
#include <map>
#include <string>

#include "base/error.h"
#include "graph/ops/steps.h"

namespace comfytp::backend::cuda {
namespace {

// Strides of an operand along x's dimensions.
Shape strides_along(const std::string& step, const Operand& operand, std::size_t rank, std::size_t channel) {
  Shape strides(rank, 0);
  if (step == "bias") {
    strides[channel] = 1;
    return strides;
  }
  const auto own = graph::strides_of(operand.type.shape, operand.order);
  for (std::size_t d = 0; d < rank; ++d)
    if (operand.type.shape[d] != 1) strides[d] = own[d];
  return strides;
}

}  // namespace

StepKind step_kind(const std::string& step) {
  static const std::map<std::string, StepKind> kinds = {
      {"bias", StepKind::add},           {"add", StepKind::add},         {"mul", StepKind::mul},
      {"add_one_mul", StepKind::add_one_mul}, {"silu", StepKind::silu},  {"gelu", StepKind::gelu},
      {"gelu_tanh", StepKind::gelu_tanh},     {"sigmoid", StepKind::sigmoid}, {"tanh", StepKind::tanh}, {"relu", StepKind::relu},
      {"rope", StepKind::rope}};
  const auto it = kinds.find(step);
  require(it != kinds.end(), "[cuda] expected a step that the kernels know but got '{}'", step);
  return it->second;
}

Chain plan_chain(std::string_view list, const Operand& x, std::span<const Operand> operands, std::size_t channel, bool rows) {
  const auto names = graph::steps_of(list);
  const auto rank = x.type.shape.size();
  std::vector<ChainStep> steps;
  std::vector<Shape> strides;  // of the steps that take operands
  std::vector<std::size_t> step_strides;
  int next = 0;
  for (const auto& name : names) {
    ChainStep step;
    step.kind = step_kind(name);
    if (graph::takes_operand(name)) {
      const Operand& operand = operands[static_cast<std::size_t>(next)];
      step.operand = static_cast<std::int8_t>(next);
      step.wide = operand.type.dtype == DType::f32;
      step.halved = name == "rope" && operand.type.shape.back() != x.type.shape.back();
      step_strides.push_back(strides.size());
      strides.push_back(strides_along(name, operand, rank, channel));
      require(name != "rope" || x.order.back() + 1 == static_cast<int>(rank), "[cuda] expected pairs of neighbours in memory for 'rope'");
      next += static_cast<int>(graph::operands_of(name));
    } else {
      step_strides.push_back(0);
    }
    steps.push_back(step);
  }
  const bool halved = std::any_of(steps.begin(), steps.end(), [](const ChainStep& step) { return step.halved; });
  struct Dim {
    std::int64_t size;
    std::vector<std::int64_t> strides;
  };
  std::vector<Dim> dims;
  for (std::size_t i = 0; i < rank; ++i) {
    const auto d = static_cast<std::size_t>(x.order[i]);
    const bool inner = (rows || halved) && i + 1 == rank;  // half an index along it is none of a merged one
    if (x.type.shape[d] == 1 && !inner) continue;
    Dim dim{x.type.shape[d], {}};
    for (const auto& s : strides) dim.strides.push_back(s[d]);
    const auto follows = [&](const Dim& outer) {
      for (std::size_t k = 0; k < dim.strides.size(); ++k)
        if (outer.strides[k] != dim.strides[k] * dim.size) return false;
      return true;
    };
    if (!dims.empty() && !inner && follows(dims.back())) {
      dims.back().size *= dim.size;
      dims.back().strides = dim.strides;
    } else {
      dims.push_back(std::move(dim));
    }
  }
  if (dims.empty()) dims.push_back({1, std::vector<std::int64_t>(strides.size(), 0)});
  require(dims.size() <= kChainDims, "[cuda] expected steps over at most {} dimensions but got {}", kChainDims, dims.size());
  require(next <= kChainOperands, "[cuda] expected at most {} operands but got {}", kChainOperands, next);
  Chain chain;
  chain.dims = static_cast<int>(dims.size());
  chain.count = static_cast<int>(steps.size());
  for (std::size_t d = 0; d < dims.size(); ++d) chain.size[d] = dims[d].size;
  for (std::size_t s = 0; s < steps.size(); ++s) {
    if (steps[s].operand >= 0)
      for (std::size_t d = 0; d < dims.size(); ++d) {
        steps[s].stride[d] = dims[d].strides[step_strides[s]];
        steps[s].varies |= d + 1 < dims.size() && steps[s].stride[d] != 0;
      }
    chain.steps[s] = steps[s];
  }
  return chain;
}

ChainOperands chain_operands(const Chain& chain, std::span<const void* const> in, std::size_t first) {
  ChainOperands operands;
  for (int s = 0; s < chain.count; ++s)
    if (const int o = chain.steps[s].operand; o >= 0) {
      operands.at[o] = in[first + static_cast<std::size_t>(o)];
      if (chain.steps[s].kind == StepKind::rope) operands.at[o + 1] = in[first + static_cast<std::size_t>(o) + 1];
    }
  return operands;
}

}  // namespace comfytp::backend::cuda
