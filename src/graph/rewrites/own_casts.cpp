#include "graph/rewrites/chains.h"
#include "graph/rewrites/passes.h"

namespace comfytp::graph {

std::optional<Graph> own_casts(const Graph& graph) {
  const auto uses = graph.use_counts();
  const auto is_shared = [&](ValueId id) {
    return uses[static_cast<std::size_t>(id)] > 1 && widened_from(graph, id) != id;
  };
  bool changed = false;
  Rewriter rewriter(graph);
  Graph& g = rewriter.target;
  for (const auto& node : graph.nodes()) {
    std::vector<ValueId> inputs = rewriter.mapped(node.inputs);
    bool any = false;
    for (std::size_t i = 0; i < inputs.size(); ++i) {
      if (!is_shared(node.inputs[i])) continue;
      const Node& cast = graph.producer(node.inputs[i]);
      inputs[i] = g.add_node(*cast.op, rewriter.mapped(cast.inputs), cast.attrs, cast.name)[0];
      any = changed = true;
    }
    if (!any) {
      rewriter.keep(node);
      continue;
    }
    const auto outputs = g.add_node(*node.op, inputs, node.attrs, node.name);
    for (std::size_t i = 0; i < outputs.size(); ++i) rewriter.map[static_cast<std::size_t>(node.outputs[i])] = outputs[i];
  }
  if (!changed) return {};
  return rewriter.finish();
}

}  // namespace comfytp::graph
