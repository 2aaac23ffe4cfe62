#include "graph/rewrites/passes.h"

namespace comfytp::graph {

bool is_projection(const Node& node) { return is(node, "linear") || is(node, "conv1d") || is(node, "conv2d") || is(node, "conv3d"); }

bool is_heavy(const Node& node) { return is_projection(node) || is(node, "attention") || is(node, "matmul"); }

std::size_t channel_dim(const Graph& graph, const Node& projection) {
  return is(projection, "linear") ? graph.type(projection.outputs[0]).shape.size() - 1 : 1;
}

bool is_per_channel(const Shape& operand, const Shape& out, std::size_t channel) {
  const std::size_t skip = out.size() - operand.size();
  if (operand.size() > out.size() || skip > channel) return false;
  for (std::size_t d = 0; d < operand.size(); ++d)
    if (operand[d] != (d + skip == channel ? out[channel] : 1)) return false;
  return true;
}

ValueId part_of(Graph& g, ValueId x, std::size_t dim, std::int64_t start, std::int64_t stop) {
  const Node node = g.producer(x);
  if (!is(node, "weight")) return g.add("slice", {x}, {{"dim", static_cast<std::int64_t>(dim)}, {"start", start}, {"stop", stop}});
  Attrs attrs = node.attrs;
  Ints offset = attrs.ints("offset"), shape = attrs.ints("shape");
  offset[dim] += start;
  shape[dim] = stop - start;
  attrs.set("offset", offset);
  attrs.set("shape", shape);
  return g.add("weight", {}, attrs, node.name);
}

std::vector<std::vector<int>> readers(const Graph& graph) {
  std::vector<std::vector<int>> result(graph.value_count());
  for (std::size_t i = 0; i < graph.nodes().size(); ++i)
    for (ValueId id : graph.nodes()[i].inputs) result[static_cast<std::size_t>(id)].push_back(static_cast<int>(i));
  for (const auto& output : graph.outputs()) result[static_cast<std::size_t>(output.value)].push_back(-1);
  return result;
}

}  // namespace comfytp::graph
