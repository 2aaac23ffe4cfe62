#include "sharding/rule_query.h"

namespace comfytp::sharding {

Major major_of(const graph::Rule& rule, const graph::DimRule& dim) {
  Major major;
  for (int f : dim.factors) {
    const auto size = rule.factors[static_cast<std::size_t>(f)].size;
    if (major.factor >= 0)
      major.step *= size;
    else if (size != 1)
      major.factor = f;
  }
  return major;
}

bool can_cut(const graph::Rule& rule, int factor) {
  const auto& f = rule.factors[static_cast<std::size_t>(factor)];
  if (f.kind == graph::FactorKind::whole || f.size <= 1) return false;
  for (const auto* side : {&rule.inputs, &rule.outputs})
    for (const auto& operand : *side)
      for (const auto& dim : operand)
        for (int other : dim.factors)
          if (other == factor && major_of(rule, dim).factor != factor) return false;
  return true;
}

bool is_leaf(const graph::Node& node) { return is(node, "input") || is(node, "weight") || is(node, "constant"); }

}  // namespace comfytp::sharding
