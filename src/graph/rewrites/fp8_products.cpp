#include "graph/rewrites.h"
#include "graph/rewrites/passes.h"

namespace comfytp::graph {
namespace {

// The weight that a value is, or is a view of.
const Node* weight_of(const Graph& graph, ValueId id) {
  const Node* node = &graph.producer(id);
  while (!is(*node, "weight") && node->inputs.size() == 1) node = &graph.producer(node->inputs[0]);
  return is(*node, "weight") ? node : nullptr;
}

}  // namespace

Graph multiply_in_fp8(const Graph& graph, const std::function<bool(const std::string& key)>& stored_in_fp8) {
  Rewriter rewriter(graph);
  for (const auto& node : graph.nodes()) {
    const Node* weight = is(node, "linear") ? weight_of(graph, node.inputs[1]) : nullptr;
    if (!weight || !stored_in_fp8(weight->attrs.text("key"))) {
      rewriter.keep(node);
      continue;
    }
    auto attrs = node.attrs;
    attrs.set("product", std::string("fp8"));
    rewriter.map[static_cast<std::size_t>(node.outputs[0])] = rewriter.target.add_node(*node.op, rewriter.mapped(node.inputs), attrs, node.name)[0];
  }
  return rewriter.finish();
}

}  // namespace comfytp::graph
