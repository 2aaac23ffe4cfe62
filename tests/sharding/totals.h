// What a device's graph does in all, and names of test cases.
#pragma once

#include <cctype>
#include <cstdint>
#include <map>
#include <string>

#include "graph/graph.h"

namespace comfytp::test {

struct Totals {
  double flops = 0;
  std::int64_t weights = 0;
  std::map<std::string, int> collectives;
};
inline Totals totals(const graph::Graph& graph) {
  Totals t;
  for (const auto& node : graph.nodes()) {
    t.flops += node.op->flops(graph.context(node));
    if (graph::is(node, "weight")) t.weights += numel(graph.type(node.outputs[0]).shape);
    if (node.op->collective()) ++t.collectives[std::string(node.op->name())];
  }
  return t;
}

// Of letters and digits, as GoogleTest wants them.
inline std::string test_name(std::string name) {
  for (char& c : name)
    if (!std::isalnum(static_cast<unsigned char>(c))) c = '_';
  return name;
}

}  // namespace comfytp::test
