#include <unordered_map>

#include "graph/rewrites/passes.h"
#include "graph/text.h"

namespace comfytp::graph {

std::optional<Graph> share_equal_nodes(const Graph& graph) {
  bool changed = false;
  Rewriter rewriter(graph);
  std::unordered_map<std::string, const Node*> seen;
  for (const auto& node : graph.nodes()) {
    // Every rank of a group counts on its peers' collectives, so these stay as they are.
    if (node.op->collective() || is(node, "input")) {
      rewriter.keep(node);
      continue;
    }
    std::string key = std::string(node.op->name()) + to_text(node.attrs);
    for (ValueId id : rewriter.mapped(node.inputs)) key.append(" ").append(std::to_string(id));
    const auto [it, is_new] = seen.emplace(std::move(key), &node);
    if (is_new) {
      rewriter.keep(node);
      continue;
    }
    changed = true;
    for (std::size_t i = 0; i < node.outputs.size(); ++i)
      rewriter.map[static_cast<std::size_t>(node.outputs[i])] = rewriter.map[static_cast<std::size_t>(it->second->outputs[i])];
  }
  if (!changed) return {};
  return rewriter.finish();
}

}  // namespace comfytp::graph
