#include "sharding/pair_gathers.h"

#include <algorithm>
#include <map>

#include <fmt/format.h>

#include "graph/rewrites.h"
#include "graph/rewrites/chains.h"
#include "sharding/rule_query.h"

namespace comfytp::sharding {
namespace {

using graph::Graph;
using graph::Node;
using graph::ValueId;

using Pairs = std::map<std::size_t, std::size_t>;  // the second of two nodes, and the first

bool is_light(const Node& node) { return is_leaf(node) || graph::is(node, "slice") || graph::is_view(node); }

bool are_alike(const Graph& g, const Node& a, const Node& b) {
  const auto same = [&](const char* attribute) { return a.attrs.ints(attribute) == b.attrs.ints(attribute); };
  return g.type(a.inputs[0]) == g.type(b.inputs[0]) && a.attrs.integer("dim") == b.attrs.integer("dim") && same("bounds") && same("group");
}

Pairs find_pairs(const std::vector<Graph>& devices) {
  const auto& nodes = devices[0].nodes();
  const auto varies = graph::varies_per_call(devices[0]);
  Pairs pairs;
  std::size_t open = nodes.size();  // the last that may get a second
  for (std::size_t i = 0; i < nodes.size(); ++i) {
    if (!graph::is(nodes[i], "all_gather")) {
      // What stands between the two reads nothing of the first, which comes when the second does.
      const auto& in = nodes[i].inputs;
      if (open < i && (!is_light(nodes[i]) || std::find(in.begin(), in.end(), nodes[open].outputs[0]) != in.end())) open = nodes.size();
      continue;
    }
    const auto second = [&] {
      const ValueId x = nodes[i].inputs[0];
      return varies[open] == varies[i] && x != nodes[open].inputs[0] && x != nodes[open].outputs[0] &&
             std::all_of(devices.begin(), devices.end(), [&](const Graph& g) { return are_alike(g, g.nodes()[open], g.nodes()[i]); });
    };
    const bool pair = open < i && second();
    if (pair) pairs[i] = open;
    open = pair ? nodes.size() : i;
  }
  return pairs;
}

// Side by side along a new first dimension, so that each lies in one piece before and after.
void write_pair(graph::Rewriter& rewriter, const Node& first, const Node& second) {
  Graph& g = rewriter.target;
  std::vector<ValueId> both;
  for (const Node* node : {&first, &second}) {
    const ValueId x = rewriter.mapped(node->inputs)[0];
    both.push_back(g.add("split_dim", {x}, {{"dim", std::int64_t{0}}, {"sizes", graph::Ints{1, g.type(x).shape[0]}}}));
  }
  auto attrs = first.attrs;
  attrs.set("dim", first.attrs.integer("dim") + 1);
  attrs.set("reason", fmt::format("{}; {}", first.attrs.text("reason"), second.attrs.text("reason")));
  const ValueId gathered = g.add("all_gather", {g.add("concat", both, {{"dim", std::int64_t{0}}})}, attrs, first.name);
  std::int64_t at = 0;
  for (const Node* node : {&first, &second}) {
    const ValueId own = g.add("slice", {gathered}, {{"dim", std::int64_t{0}}, {"start", at}, {"stop", at + 1}});
    rewriter.map[static_cast<std::size_t>(node->outputs[0])] = g.add("merge_dims", {own}, {{"dim", std::int64_t{0}}, {"count", std::int64_t{2}}});
    ++at;
  }
}

}  // namespace

void pair_gathers(std::vector<Graph>& devices) {
  const auto pairs = find_pairs(devices);
  if (pairs.empty()) return;
  std::vector<char> delayed(devices[0].nodes().size(), 0);
  for (const auto& [second, first] : pairs) delayed[first] = 1;
  for (auto& device : devices) {
    graph::Rewriter rewriter(device);
    const auto& nodes = device.nodes();
    for (std::size_t i = 0; i < nodes.size(); ++i) {
      if (const auto pair = pairs.find(i); pair != pairs.end())
        write_pair(rewriter, nodes[pair->second], nodes[i]);
      else if (!delayed[i])
        rewriter.keep(nodes[i]);
    }
    device = rewriter.finish();
  }
}

}  // namespace comfytp::sharding
