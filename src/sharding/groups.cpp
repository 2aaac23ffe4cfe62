// Factors that meet in values belong together: cutting one means cutting all, without a word between the devices until
// the group ends.
#include <fmt/format.h>

#include <algorithm>
#include <numeric>
#include <optional>
#include <set>

#include "graph/rewrites.h"
#include "sharding/rule_query.h"
#include "sharding/strategy.h"

namespace comfytp::sharding {
namespace {

using graph::Graph;
using graph::Node;
using graph::Rule;
using graph::ValueId;

// Union-find over the factors of all nodes, numbered one behind the other.
class Sets {
 public:
  int add(int count) {
    const int first = static_cast<int>(parent_.size());
    parent_.resize(parent_.size() + static_cast<std::size_t>(count));
    std::iota(parent_.begin() + first, parent_.end(), first);
    return first;
  }
  int find(int i) {
    while (parent_[i] != i) i = parent_[i] = parent_[parent_[i]];
    return i;
  }
  // The lower number leads, so that results do not depend on the order of joins.
  void join(int a, int b) {
    a = find(a), b = find(b);
    parent_[std::max(a, b)] = std::min(a, b);
  }

 private:
  std::vector<int> parent_;
};

}  // namespace

std::string weight_name(const Node& weight, std::size_t dim) {
  const auto offset = weight.attrs.ints("offset")[dim];
  return fmt::format("{}[{}]{}", weight.attrs.text("key"), dim, offset ? fmt::format("@{}", offset) : "");
}

bool is_heavy(const Rule& rule) {
  return std::any_of(rule.factors.begin(), rule.factors.end(), [](const auto& f) { return f.kind == graph::FactorKind::contracted; });
}

FactorGroups::FactorGroups(const Graph& graph) : graph_(graph), varies_(graph::varies_per_call(graph)) {
  const auto& nodes = graph.nodes();
  Sets sets;
  std::vector<int> first;
  for (const auto& node : nodes) {
    rules_.push_back(node.op->rule(graph.context(node)));
    first.push_back(sets.add(static_cast<int>(rules_.back().factors.size())));
    const auto from_weights = [&](ValueId id) { return of_weights_[static_cast<std::size_t>(id)]; };
    const bool only = is(node, "weight") || (!node.inputs.empty() && std::all_of(node.inputs.begin(), node.inputs.end(), from_weights));
    of_weights_.resize(of_weights_.size() + node.outputs.size(), only);
  }
  struct Window {
    int made, read;  // factors of neighbours that differ by a halo or a shift
    std::optional<std::int64_t> shift;
    std::int64_t made_size, read_size;
  };
  std::vector<Window> windows;
  for (std::size_t n = 0; n < nodes.size(); ++n)
    for (std::size_t i = 0; i < nodes[n].inputs.size(); ++i)
      for (std::size_t d = 0; d < rules_[n].inputs[i].size(); ++d) {
        const auto& dim = rules_[n].inputs[i][d];
        const auto [made, maker] = cut_of_value(nodes[n].inputs[i], d);
        const int read = major_of(rules_[n], dim).factor;
        if (made < 0 || read < 0 || !can_cut(rules_[n], read)) continue;
        if (dim.shift && is_leaf(nodes[static_cast<std::size_t>(maker)])) continue;  // of which every device reads what it wants
        const int a = first[static_cast<std::size_t>(maker)] + made, b = first[n] + read;
        if (dim.window)
          windows.push_back({a, b, dim.shift, graph.type(nodes[n].inputs[i]).shape[d], rules_[n].factors[static_cast<std::size_t>(read)].size});
        else
          sets.join(a, b);
      }
  std::map<int, int> index;
  for (std::size_t n = 0; n < nodes.size(); ++n) {
    of_.emplace_back(rules_[n].factors.size(), -1);
    for (std::size_t f = 0; f < rules_[n].factors.size(); ++f) {
      if (!can_cut(rules_[n], static_cast<int>(f))) continue;
      const int root = sets.find(first[n] + static_cast<int>(f));
      const auto [it, fresh] = index.emplace(root, static_cast<int>(groups_.size()));
      if (fresh) groups_.push_back({{}, 0, 0, 0, 0, {}});
      auto& group = groups_[static_cast<std::size_t>(it->second)];
      group.members.push_back({static_cast<int>(n), static_cast<int>(f)});
      group.units = std::gcd(group.units, rules_[n].factors[f].size);
      of_[n][f] = it->second;
    }
  }
  for (const auto& w : windows) {
    const int from = index.at(sets.find(w.made)), to = index.at(sets.find(w.read));
    if (from == to) continue;
    neighbours_[from].insert(to);
    neighbours_[to].insert(from);
    if (w.shift && w.made_size <= w.read_size)
      inclusions_.insert({to, from, w.read_size, w.made_size, -*w.shift});  // of a concat
    else if (w.shift)
      inclusions_.insert({from, to, w.made_size, w.read_size, *w.shift});  // of a slice
  }
  measure();
}

std::pair<int, int> FactorGroups::cut_of_value(ValueId value, std::size_t dim) const {
  const int maker = graph_.value(value).node;
  const Node& node = graph_.nodes()[static_cast<std::size_t>(maker)];
  const Rule& rule = rules_[static_cast<std::size_t>(maker)];
  const auto output = static_cast<std::size_t>(std::find(node.outputs.begin(), node.outputs.end(), value) - node.outputs.begin());
  const int factor = major_of(rule, rule.outputs[output][dim]).factor;
  return {factor >= 0 && can_cut(rule, factor) ? factor : -1, maker};
}

int FactorGroups::of_value(ValueId value, std::size_t dim) const {
  const auto [factor, node] = cut_of_value(value, dim);
  return factor < 0 ? -1 : of(node, factor);
}

double FactorGroups::divided_weights(int node, int factor) const {
  const auto& inputs = graph_.nodes()[static_cast<std::size_t>(node)].inputs;
  double elements = 0;
  if (is_heavy(rule(node)))
    for (std::size_t i = 0; i < inputs.size(); ++i)
      for (const auto& dim : rule(node).inputs[i])
        if (of_weights_[static_cast<std::size_t>(inputs[i])] && major_of(rule(node), dim).factor == factor)
          elements += static_cast<double>(numel(graph_.type(inputs[i]).shape));
  return elements;
}

// The tokens that a step's attention is taken to have, since no shape of a call decides what is cut: those of most of SDXL's blocks at its own size.
constexpr double kTokens = 1024;

// The channels of a token of a node's output: the free factors of its weight. A sum of activations has one, a product of activations
// has as many as there are tokens, which is more than any layer's.
double FactorGroups::summed_channels(int node) const {
  const auto& inputs = graph_.nodes()[static_cast<std::size_t>(node)].inputs;
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    if (!of_weights_[static_cast<std::size_t>(inputs[i])]) continue;
    double channels = 1;
    for (const auto& dim : rule(node).inputs[i])
      for (int f : dim.factors)
        if (const auto& factor = rule(node).factors[static_cast<std::size_t>(f)]; factor.kind == graph::FactorKind::free)
          channels *= static_cast<double>(factor.size);
    return channels;
  }
  constexpr double kMany = 1e6;
  return inputs.size() == 1 ? 1 : kMany;
}

// Of an attention over a step's own tokens, whose heads the factor cuts; else 0. A prompt has few.
double FactorGroups::attended_channels(int node, int factor) const {
  const Node& attention = graph_.nodes()[static_cast<std::size_t>(node)];
  if (!graph::is(attention, "attention") || !varies(graph_.value(attention.inputs[1]).node)) return 0;
  const auto& q = rule(node).inputs[0];
  const auto& shape = graph_.type(attention.inputs[0]).shape;
  return major_of(rule(node), q[1]).factor == factor ? static_cast<double>(shape[1] * shape[3]) : 0;
}

// What a cut of a group saves and costs, a token: the elements of weights that it multiplies with, and the channels of every value
// that has to be summed or gathered where the group ends.
void FactorGroups::measure() {
  const auto& nodes = graph_.nodes();
  std::vector<std::int64_t> largest(groups_.size(), 0);
  for (std::size_t g = 0; g < groups_.size(); ++g)
    for (auto [n, f] : groups_[g].members) {
      const Node& node = nodes[static_cast<std::size_t>(n)];
      const Rule& rule = rules_[static_cast<std::size_t>(n)];
      const double divided = divided_weights(n, f);
      groups_[g].weights += divided;
      if (varies(n)) groups_[g].work += divided;
      if (const double channels = attended_channels(n, f)) groups_[g].work += 2 * kTokens * channels;
      if (rule.factors[static_cast<std::size_t>(f)].kind == graph::FactorKind::contracted) groups_[g].leave += 2 * summed_channels(n);
      if (graph::is(node, "weight")) {
        const auto& dims = rule.outputs[0];
        const auto elements = numel(graph_.type(node.outputs[0]).shape);
        for (std::size_t d = 0; d < dims.size(); ++d)
          if (elements > largest[g] && major_of(rule, dims[d]).factor == f) {
            largest[g] = elements;
            groups_[g].name = weight_name(node, d);
          }
      }
    }
  for (auto& group : groups_) {
    const Node& node = nodes[static_cast<std::size_t>(group.members[0].first)];
    if (group.name.empty()) group.name = node.name.empty() ? std::string(node.op->name()) : node.name;
  }
  std::set<std::pair<int, ValueId>> gathered;
  for (std::size_t n = 0; n < nodes.size(); ++n)
    for (std::size_t i = 0; i < nodes[n].inputs.size(); ++i)
      for (std::size_t d = 0; d < rules_[n].inputs[i].size(); ++d) {
        const int g = of_value(nodes[n].inputs[i], d);
        const int read = major_of(rules_[n], rules_[n].inputs[i][d]).factor;
        if (g < 0 || (read >= 0 && of(static_cast<int>(n), read) == g) || !gathered.insert({g, nodes[n].inputs[i]}).second) continue;
        groups_[static_cast<std::size_t>(g)].leave += static_cast<double>(graph_.type(nodes[n].inputs[i]).shape[d]);
      }
}

std::set<int> FactorGroups::connected(int group) const {
  std::set<int> found;
  std::vector<int> next = {group};
  while (!next.empty()) {
    const int g = next.back();
    next.pop_back();
    if (!found.insert(g).second) continue;
    if (const auto it = neighbours_.find(g); it != neighbours_.end()) next.insert(next.end(), it->second.begin(), it->second.end());
  }
  return found;
}

}  // namespace comfytp::sharding
