#include "graph/ops/epilogue.h"
#include "graph/rewrites/passes.h"

namespace comfytp::graph {
namespace {

// A bias [o] with the dimensions of size 1 behind it that make it broadcast over `spatial` dimensions.
ValueId spread(Graph& g, ValueId bias, std::size_t spatial) {
  if (spatial == 0) return bias;
  const Node node = g.producer(bias);
  if (!is(node, "weight")) {
    Ints sizes(1 + spatial, 1);
    sizes[0] = g.type(bias).shape[0];
    return g.add("split_dim", {bias}, {{"dim", 0}, {"sizes", sizes}});
  }
  Attrs attrs = node.attrs;
  for (const auto& [name, fill] : {std::pair{"full", 1}, {"offset", 0}, {"shape", 1}}) {
    Ints sizes = attrs.ints(name);
    sizes.insert(sizes.end(), spatial, fill);
    attrs.set(name, sizes);
  }
  return g.add("weight", {}, attrs, node.name);
}

}  // namespace

std::optional<Graph> expand_epilogues(const Graph& graph) {
  bool changed = false;
  Rewriter rewriter(graph);
  Graph& g = rewriter.target;
  for (const auto& node : graph.nodes()) {
    const bool norm = is(node, "group_norm") && node.attrs.has("activation");
    if (!norm && !(is_projection(node) && node.attrs.has("epilogue"))) {
      rewriter.keep(node);
      continue;
    }
    changed = true;
    Attrs attrs = node.attrs;
    attrs.erase(norm ? "activation" : "epilogue");
    const auto inputs = rewriter.mapped(node.inputs);
    const std::size_t own = norm ? inputs.size() : 2;
    ValueId y = g.add_node(*node.op, {inputs.begin(), inputs.begin() + own}, attrs, node.name)[0];
    if (norm && !node.attrs.text("activation").empty()) y = g.add(node.attrs.text("activation"), {y});
    const std::size_t spatial = norm ? 0 : graph.type(node.outputs[0]).shape.size() - 1 - channel_dim(graph, node);
    std::size_t next = own;
    for (const auto& step : norm ? std::vector<std::string>{} : epilogue_of(node.attrs)) {
      if (step == "bias")
        y = g.add("add", {y, spread(g, inputs[next++], spatial)});
      else if (takes_operand(step))
        y = g.add(step, {y, inputs[next++]});
      else
        y = g.add(step, {y});
    }
    rewriter.map[static_cast<std::size_t>(node.outputs[0])] = y;
  }
  if (!changed) return {};
  return rewriter.finish();
}

}  // namespace comfytp::graph
