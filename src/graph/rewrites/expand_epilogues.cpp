#include "graph/ops/epilogue.h"
#include "graph/rewrites/passes.h"

namespace comfytp::graph {
namespace {

// A bias [o] with the dimensions of size 1 behind it that make it broadcast over an image.
ValueId bias_of_image(Graph& g, ValueId bias) {
  const Node node = g.producer(bias);
  if (!is(node, "weight")) return g.add("split_dim", {bias}, {{"dim", 0}, {"sizes", Ints{g.type(bias).shape[0], 1, 1}}});
  Attrs attrs = node.attrs;
  for (const auto& [name, fill] : {std::pair{"full", 1}, {"offset", 0}, {"shape", 1}}) {
    Ints sizes = attrs.ints(name);
    sizes.insert(sizes.end(), 2, fill);
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
    std::size_t next = own;
    for (const auto& step : norm ? std::vector<std::string>{} : epilogue_of(node.attrs)) {
      if (step == "bias")
        y = g.add("add", {y, is(node, "conv2d") ? bias_of_image(g, inputs[next++]) : inputs[next++]});
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
