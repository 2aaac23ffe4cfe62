#include <set>

#include "graph/rewrites.h"
#include "graph/rewrites/passes.h"

namespace comfytp::graph {

std::optional<Graph> gate_linears(const Graph& graph) {
  const auto uses = graph.use_counts();
  const auto varies = varies_per_call(graph);
  const auto node_of = [&](ValueId id) { return static_cast<std::size_t>(graph.value(id).node); };
  const auto is_own_linear = [&](ValueId id, std::size_t glu) {
    const Node& node = graph.producer(id);
    return is(node, "linear") && node.inputs.size() == 2 && node.attrs.text_or("epilogue", "").empty() && !node.attrs.has("product") && uses[static_cast<std::size_t>(id)] == 1 &&
           varies[node_of(id)] == varies[glu];
  };
  std::set<std::size_t> gated, gone;
  for (std::size_t i = 0; i < graph.nodes().size(); ++i) {
    const Node& glu = graph.nodes()[i];
    if (!is(glu, "glu") || !is_own_linear(glu.inputs[0], i) || !is_own_linear(glu.inputs[1], i)) continue;
    const Node &value = graph.producer(glu.inputs[0]), &gate = graph.producer(glu.inputs[1]);
    if (value.inputs[0] != gate.inputs[0] || graph.type(value.inputs[1]) != graph.type(gate.inputs[1])) continue;
    gated.insert(i);
    gone.insert({node_of(glu.inputs[0]), node_of(glu.inputs[1])});
  }
  if (gated.empty()) return std::nullopt;
  Rewriter rewriter(graph);
  for (std::size_t i = 0; i < graph.nodes().size(); ++i) {
    const Node& node = graph.nodes()[i];
    if (gone.count(i)) continue;
    if (!gated.count(i)) {
      rewriter.keep(node);
      continue;
    }
    const Node &value = graph.producer(node.inputs[0]), &gate = graph.producer(node.inputs[1]);
    std::vector<ValueId> inputs = {value.inputs[0], value.inputs[1], gate.inputs[1]};
    inputs.insert(inputs.end(), node.inputs.begin() + 2, node.inputs.end());
    rewriter.map[static_cast<std::size_t>(node.outputs[0])] = rewriter.target.add("gated_linear", rewriter.mapped(inputs), node.attrs, value.name);
  }
  return rewriter.finish();
}

}  // namespace comfytp::graph
