#include <algorithm>

#include "graph/rewrites/passes.h"

namespace comfytp::graph {
namespace {

// For each value: was anything heavy needed for it?
std::vector<bool> behind_heavy(const Graph& graph) {
  std::vector<bool> result(graph.value_count());
  for (const auto& node : graph.nodes()) {
    bool heavy = is_heavy(node);
    for (ValueId id : node.inputs) heavy = heavy || result[static_cast<std::size_t>(id)];
    for (ValueId id : node.outputs) result[static_cast<std::size_t>(id)] = heavy;
  }
  return result;
}

// A linear whose input is several tensors' channels one behind the other, and whose weight can be read in parts.
bool is_over_concat(const Graph& graph, const Node& node) {
  if (!is(node, "linear") || node.attrs.has("epilogue") || !is(graph.producer(node.inputs[1]), "weight")) return false;
  const Node& concat = graph.producer(node.inputs[0]);
  return is(concat, "concat") && concat.attrs.integer("dim") + 1 == static_cast<std::int64_t>(graph.type(node.inputs[0]).shape.size());
}

}  // namespace

std::optional<Graph> split_concat_inputs(const Graph& graph) {
  const auto heavy = behind_heavy(graph);
  bool changed = false;
  Rewriter rewriter(graph);
  Graph& g = rewriter.target;
  for (const auto& node : graph.nodes()) {
    // What only angles and embeddings went into (a timestep's sines and cosines) has no parts to keep apart.
    if (!is_over_concat(graph, node) || !heavy[static_cast<std::size_t>(node.inputs[0])]) {
      rewriter.keep(node);
      continue;
    }
    changed = true;
    const ValueId weight = rewriter.mapped({node.inputs[1]})[0];
    ValueId sum = -1;
    std::int64_t at = 0;
    for (ValueId part : graph.producer(node.inputs[0]).inputs) {
      const auto size = graph.type(part).shape.back();
      const ValueId columns = part_of(g, weight, 1, at, at + size);
      const ValueId y = g.add_node(*node.op, {rewriter.mapped({part})[0], columns}, node.attrs, node.name)[0];
      sum = sum < 0 ? y : g.add("add", {sum, y}, {}, node.name);
      at += size;
    }
    rewriter.map[static_cast<std::size_t>(node.outputs[0])] = sum;
  }
  if (!changed) return {};
  return rewriter.finish();
}

}  // namespace comfytp::graph
