// What partitioning and the strategy both ask of an op's rule.
#pragma once

#include "graph/graph.h"

namespace comfytp::sharding {

/// The factor by which a dimension can be cut, and the size of one step of it in elements; factor -1 if there is none.
/// Factors of size 1 before it do not count.
struct Major {
  int factor = -1;
  std::int64_t step = 1;
};
Major major_of(const graph::Rule& rule, const graph::DimRule& dim);

/// A factor can be cut if its kind allows and no operand has it in a minor place, where a part would not be one interval.
bool can_cut(const graph::Rule& rule, int factor);

/// Inputs, weights and constants: made on every device as they are wanted.
bool is_leaf(const graph::Node& node);

}  // namespace comfytp::sharding
