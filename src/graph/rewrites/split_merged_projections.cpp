#include <algorithm>
#include <map>
#include <set>
#include <utility>
#include <vector>

#include "graph/rewrites/passes.h"

namespace comfytp::graph {
namespace {

struct Merged {
  const Node* projection = nullptr;
  std::vector<std::pair<const Node*, ValueId>> steps;  ///< before the slices: a scale, a bias, and their operands
};

// What a step between a projection and its slices may take: a value, or one a channel.
bool is_scalar(const Shape& operand, const Shape& out) { return numel(operand) == 1 && operand.size() <= out.size(); }

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
    Merged merged{&node, {}};
    const Node* last = &node;
    const auto users = [&] { return read_by[static_cast<std::size_t>(last->outputs[0])]; };
    while (users().size() == 1 && users()[0] >= 0 && (is(nodes[users()[0]], "add") || is(nodes[users()[0]], "mul"))) {
      const Node& step = nodes[users()[0]];
      const ValueId other = step.inputs[step.inputs[0] == last->outputs[0] ? 1 : 0];
      const Shape &operand = graph.type(other).shape, &whole = graph.type(node.outputs[0]).shape;
      if (!is_scalar(operand, whole) && !is_per_channel(operand, whole, channel)) break;
      merged.steps.emplace_back(&step, other);
      last = &step;
    }
    const auto all = users();
    const auto is_part = [&](int user) {
      return user >= 0 && is(nodes[user], "slice") && nodes[user].attrs.integer("dim") == static_cast<std::int64_t>(channel) &&
             nodes[user].attrs.integer_or("step", 1) == 1;
    };
    if (all.empty() || !std::all_of(all.begin(), all.end(), is_part)) continue;
    for (int user : all) slices[&nodes[user]] = merged;
    gone.insert(&node);
    for (const auto& [step, operand] : merged.steps) gone.insert(step);
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
    const auto& [projection, steps] = it->second;
    const Shape& whole = graph.type(projection->outputs[0]).shape;
    const std::size_t channel = channel_dim(graph, *projection);
    const auto start = node.attrs.integer("start"), stop = node.attrs.integer("stop");
    auto inputs = rewriter.mapped(projection->inputs);
    inputs[1] = part_of(g, inputs[1], 0, start, stop);
    ValueId y = g.add_node(*projection->op, inputs, projection->attrs, projection->name)[0];
    for (const auto& [step, operand] : steps) {
      const Shape& shape = graph.type(operand).shape;
      ValueId part = rewriter.mapped({operand})[0];
      if (!is_scalar(shape, whole)) part = part_of(g, part, channel - (whole.size() - shape.size()), start, stop);
      y = g.add_node(*step->op, {y, part}, step->attrs, step->name)[0];
    }
    rewriter.map[static_cast<std::size_t>(node.outputs[0])] = y;
  }
  return rewriter.finish();
}

}  // namespace comfytp::graph
