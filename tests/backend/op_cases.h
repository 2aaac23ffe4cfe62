// Uses of every op that a backend has a kernel for: usual, odd and empty shapes.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "graph/builder.h"

namespace comfytp::test {

struct OpCase {
  std::string name;  ///< of letters, digits and underscores
  std::function<graph::ValueId(graph::Builder&)> build;
  bool weights = false;
  double fp8_tolerance = 0;  ///< what stands for a device's usual one where weights are stored in fp8, if it is larger
};

std::vector<OpCase> op_cases();

}  // namespace comfytp::test
