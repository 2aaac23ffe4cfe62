#include <algorithm>
#include <map>
#include <set>

#include "graph/rewrites/passes.h"

namespace comfytp::graph {
namespace {

struct Merged {
  const Node* projection = nullptr;
  ValueId bias = -1;  ///< added before the slices; -1 if there is none
};

}  // namespace

std::optional<Graph> split_merged_projections(const Graph& graph) {
  const auto& nodes = graph.nodes();
  const auto read_by = readers(graph);
  std::map<const Node*, Merged> slices;
  std::set<const Node*> gone;
  for (const auto& node : nodes) {
    if (!is_projection(node) || node.attrs.has("epilogue") || node.attrs.integer_or("groups", 1) != 1 ||
        !is(graph.producer(node.inputs[1]), "weight"))
      continue;
    const std::size_t channel = channel_dim(graph, node);
    Merged merged{&node, -1};
    const Node* last = &node;
    const auto users = [&] { return read_by[static_cast<std::size_t>(last->outputs[0])]; };
    if (users().size() == 1 && users()[0] >= 0 && is(nodes[users()[0]], "add")) {
      const Node& add = nodes[users()[0]];
      const ValueId other = add.inputs[add.inputs[0] == node.outputs[0] ? 1 : 0];
      if (is_per_channel(graph.type(other).shape, graph.type(node.outputs[0]).shape, channel)) {
        merged.bias = other;
        last = &add;
      }
    }
    const auto all = users();
    const auto is_part = [&](int user) {
      return user >= 0 && is(nodes[user], "slice") && nodes[user].attrs.integer("dim") == static_cast<std::int64_t>(channel) &&
             nodes[user].attrs.integer_or("step", 1) == 1;
    };
    if (all.empty() || !std::all_of(all.begin(), all.end(), is_part)) continue;
    for (int user : all) slices[&nodes[user]] = merged;
    gone.insert({&node, last});
  }
  if (slices.empty()) return {};

  Rewriter rewriter(graph);
  Graph& g = rewriter.target;
  for (const auto& node : nodes) {
    if (gone.count(&node)) continue;
    const auto it = slices.find(&node);
    if (it == slices.end()) {
      rewriter.keep(node);
      continue;
    }
    const auto& [projection, bias] = it->second;
    const std::size_t channel = channel_dim(graph, *projection), rank = graph.type(projection->outputs[0]).shape.size();
    const auto start = node.attrs.integer("start"), stop = node.attrs.integer("stop");
    auto inputs = rewriter.mapped(projection->inputs);
    inputs[1] = part_of(g, inputs[1], 0, start, stop);
    ValueId y = g.add_node(*projection->op, inputs, projection->attrs, projection->name)[0];
    if (bias >= 0) {
      const std::size_t skip = rank - graph.type(bias).shape.size();
      y = g.add("add", {y, part_of(g, rewriter.mapped({bias})[0], channel - skip, start, stop)});
    }
    rewriter.map[static_cast<std::size_t>(node.outputs[0])] = y;
  }
  return rewriter.finish();
}

}  // namespace comfytp::graph
