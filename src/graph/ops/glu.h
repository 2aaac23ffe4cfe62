// What a glu and a gated_linear have in common.
#pragma once

#include <cstddef>

#include "graph/attrs.h"

namespace comfytp::graph {

/// Numbers of the inputs that are biases; 0: there is none.
struct GluBiases {
  std::size_t value = 0, gate = 0;
};

/// By the attribute biases ("", "value", "gate" or "value,gate"), for an op whose biases begin with input `first`.
inline GluBiases glu_biases(const Attrs& attrs, std::size_t first) {
  const auto& which = attrs.text("biases");
  GluBiases biases;
  if (which.starts_with("value")) biases.value = first++;
  if (which.ends_with("gate")) biases.gate = first;
  return biases;
}

}  // namespace comfytp::graph
