// What the kernels of linears ask of its attributes.
#pragma once

#include <cstddef>
#include <vector>

#include "graph/attrs.h"

namespace comfytp::graph {

/// One linear of several: the numbers of its operands among the inputs, and its own attributes.
struct LinearOfSeveral {
  std::vector<std::size_t> inputs;  ///< x, its weight and, where it has one, its bias
  Attrs attrs;
};
std::vector<LinearOfSeveral> linears_of(const Attrs& attrs);

}  // namespace comfytp::graph
