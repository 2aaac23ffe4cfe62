#include "graph/rewrites.h"
#include "graph/rewrites/passes.h"

namespace comfytp::graph {

Graph multiply_in_fp8(const Graph& graph) {
  Rewriter rewriter(graph);
  for (const auto& node : graph.nodes()) {
    if (!is(node, "linear")) {
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
