#include "sharding/strategy.h"

#include <algorithm>
#include <numeric>
#include <optional>

#include "base/error.h"
#include "sharding/rule_query.h"

namespace comfytp::sharding {
namespace {

using graph::FactorKind;
using graph::Graph;
using graph::Node;
using graph::ValueId;

class Strategy {
 public:
  Strategy(const Graph& graph, const Mesh& mesh) : graph_(graph), mesh_(mesh), groups_(graph), uses_(graph.use_counts()) {
    for (std::size_t n = 0; n < graph.nodes().size(); ++n)
      for (ValueId id : graph.nodes()[n].inputs) readers_[id].push_back(static_cast<int>(n));
  }

  Decision run() {
    for (int axis = 0; axis < static_cast<int>(mesh_.axes().size()); ++axis) {
      if (mesh_.axes()[axis].size == 1) continue;
      const auto& name = mesh_.axes()[axis].name;
      if (name == "batch") cut_dimension(axis, 0, "samples");
      if (name == "patch") cut_dimension(axis, std::nullopt, "rows");
      if (name == "tensor") cut_channels(axis);
    }
    for (const auto& [parts, names] : uneven_)
      decision_.notes.push_back(fmt::format("{}: {}{}", parts, names[0], names.size() > 1 ? fmt::format(" and {} more", names.size() - 1) : ""));
    return std::move(decision_);
  }

 private:
  std::vector<double> shares(int axis) const {
    const auto& a = mesh_.axes()[axis];
    return a.shares.empty() ? std::vector<double>(static_cast<std::size_t>(a.size), 1.0) : a.shares;
  }

  // Cuts some factors alike: `units` equal steps in proportion to the axis' shares.
  void cut(const std::vector<std::pair<int, int>>& members, std::int64_t units, int axis, const std::string& name, const std::string& what) {
    const auto parts = proportional_bounds(units, shares(axis));
    std::string sizes;
    bool even = true;
    for (std::size_t r = 0; r + 1 < parts.size(); ++r) {
      sizes += fmt::format("{}{}", r ? "+" : "", parts[r + 1] - parts[r]);
      even = even && parts[r + 1] - parts[r] == parts[1];
    }
    if (!even && mesh_.axes()[axis].shares.empty())
      uneven_[fmt::format("{} {} over {} devices are uneven ({})", units, what, mesh_.axes()[axis].size, sizes)].push_back(name);
    decision_.groups.push_back(fmt::format("{}: {} of '{}', {} = {}", mesh_.axes()[axis].name, what, name, units, sizes));
    for (auto [node, factor] : members) {
      const auto step = groups_.rule(node).factors[static_cast<std::size_t>(factor)].size / units;
      Cut cut{axis, {}};
      for (auto b : parts) cut.bounds.push_back(b * step);
      decision_.assignment[{node, factor}] = cut;
      taken_.insert({node, axis});
    }
  }

  bool free_of(const FactorGroup& group, int axis) const {
    std::set<int> nodes;
    for (auto member : group.members)
      if (decision_.assignment.count(member) || taken_.count({member.first, axis}) || !nodes.insert(member.first).second) return false;
    return true;
  }

  // Samples, or rows: the dimension of the output (without one given: the first behind the channels of an image, the
  // tokens of a sequence), and all that hangs on it by halos.
  void cut_dimension(int axis, std::optional<std::size_t> dim, const std::string& what) {
    const ValueId output = graph_.outputs().at(0).value;
    const auto& shape = graph_.type(output).shape;
    const std::size_t d = dim ? *dim : shape.size() >= 4 ? 2 : 1;
    const auto& name = mesh_.axes()[axis].name;
    const int seed = d < shape.size() ? groups_.of_value(output, d) : -1;
    if (seed < 0) {
      decision_.notes.push_back(fmt::format("{}={}: the output {} has no {} to cut, so every device of the axis does the same work", name,
                                            mesh_.axes()[axis].size, graph::to_string(graph_.type(output)), what));
      return;
    }
    for (int g : groups_.connected(seed)) {
      const auto& group = groups_.all()[static_cast<std::size_t>(g)];
      if (free_of(group, axis)) cut(group.members, group.units, axis, group.name, what);
    }
  }

  // Matmuls and convolutions: what contracts a factor.
  bool heavy(int n) const {
    const auto& factors = groups_.rule(n).factors;
    return std::any_of(factors.begin(), factors.end(), [](const auto& f) { return f.kind == FactorKind::contracted; });
  }
  bool is_weight(ValueId id) const { return graph::is(graph_.producer(id), "weight"); }

  // Whether a group divides heavy work by dividing weights.
  bool divides_weights(const FactorGroup& group) const {
    bool work = false, weights = false;
    for (auto [n, f] : group.members) {
      work = work || heavy(n);
      weights = weights || graph::is(graph_.nodes()[static_cast<std::size_t>(n)], "weight");
    }
    return work && weights;
  }

  void cut_channels(int axis) {
    std::vector<const FactorGroup*> candidates;
    for (const auto& group : groups_.all())
      if (group.units > 1 && divides_weights(group)) candidates.push_back(&group);
    std::stable_sort(candidates.begin(), candidates.end(), [](const FactorGroup* a, const FactorGroup* b) {
      return a->leave_bytes * b->flops < b->leave_bytes * a->flops;
    });
    // A group that begins with the output channels of one heavy op and ends in the partial sums of another costs one sum
    // for the work of both; what is left over is cut op by op below.
    for (const auto* group : candidates) {
      const auto has = [&](FactorKind kind) {
        return std::any_of(group->members.begin(), group->members.end(), [&](const auto& m) {
          return heavy(m.first) && groups_.rule(m.first).factors[static_cast<std::size_t>(m.second)].kind == kind;
        });
      };
      if (has(FactorKind::free) && has(FactorKind::contracted) && free_of(*group, axis))
        cut(group->members, group->units, axis, group->name, "units");
    }
    double flops = 0, weights = 0;
    for (const auto& node : graph_.nodes()) {
      flops += node.op->flops(graph_.context(node));
      if (graph::is(node, "weight")) weights += static_cast<double>(graph_.type(node.outputs[0]).bytes());
    }
    for (int n = 0; n < static_cast<int>(graph_.nodes().size()); ++n) {
      const Node& node = graph_.nodes()[static_cast<std::size_t>(n)];
      if (!heavy(n) || taken_.count({n, axis})) continue;
      double own = 0;
      for (ValueId id : node.inputs)
        if (is_weight(id)) own += static_cast<double>(graph_.type(id).bytes());
      // Not worth a collective of its own below a thousandth of everything.
      if (own > 0 && (own > weights / 1000 || node.op->flops(graph_.context(node)) > flops / 1000)) cut_alone(n, axis);
    }
  }

  // One heavy op: by its contracted factor where the partial sum joins another one, else by its output channels together
  // with the bias behind it.
  void cut_alone(int n, int axis) {
    const Node& node = graph_.nodes()[static_cast<std::size_t>(n)];
    const auto& rule = groups_.rule(n);
    const ValueId weight = *std::find_if(node.inputs.begin(), node.inputs.end(), [&](ValueId id) { return is_weight(id); });
    const std::size_t at = static_cast<std::size_t>(std::find(node.inputs.begin(), node.inputs.end(), weight) - node.inputs.begin());
    int out = -1, contracted = -1;
    for (const auto& dim : rule.inputs[at]) {
      const int f = major_of(rule, dim).factor;
      if (f < 0 || !can_cut(rule, f) || decision_.assignment.count({n, f})) continue;
      (rule.factors[static_cast<std::size_t>(f)].kind == FactorKind::contracted ? contracted : out) = f;
    }
    const bool joins = contracted >= 0 && joins_partial_sum(node.outputs[0], axis);
    const int factor = joins ? contracted : out;
    if (factor < 0) return;
    std::vector<std::pair<int, int>> members = {{n, factor}};
    std::int64_t units = rule.factors[static_cast<std::size_t>(factor)].size;
    if (!joins)
      if (const int bias = bias_behind(node.outputs[0]); bias >= 0 && !taken_.count({bias, axis})) {
        const int group = groups_.of(n, factor);
        for (std::size_t f = 0; f < groups_.rule(bias).factors.size(); ++f)
          if (groups_.of(bias, static_cast<int>(f)) == group && !decision_.assignment.count({bias, static_cast<int>(f)}))
            members.push_back({bias, static_cast<int>(f)});
      }
    cut(members, units, axis, node.name.empty() ? std::string(node.op->name()) : node.name, joins ? "input channels" : "output channels");
  }

  // The node that alone reads a value and adds a weight to it; -1 if there is none.
  int bias_behind(ValueId value) const {
    if (uses_[static_cast<std::size_t>(value)] != 1 || readers_.count(value) == 0) return -1;
    const int reader = readers_.at(value)[0];
    const Node& node = graph_.nodes()[static_cast<std::size_t>(reader)];
    if (!graph::is(node, "add")) return -1;
    return is_weight(node.inputs[0]) || is_weight(node.inputs[1]) ? reader : -1;
  }

  // Does the value, a bias added to it or not, meet another partial sum of this axis in an add?
  bool joins_partial_sum(ValueId value, int axis) const {
    if (const int bias = bias_behind(value); bias >= 0) value = graph_.nodes()[static_cast<std::size_t>(bias)].outputs[0];
    if (uses_[static_cast<std::size_t>(value)] != 1 || readers_.count(value) == 0) return false;
    const Node& sum = graph_.nodes()[static_cast<std::size_t>(readers_.at(value)[0])];
    if (!graph::is(sum, "add")) return false;
    ValueId other = sum.inputs[0] == value ? sum.inputs[1] : sum.inputs[0];
    if (uses_[static_cast<std::size_t>(other)] != 1) return false;
    int maker = graph_.value(other).node;
    const Node& added = graph_.nodes()[static_cast<std::size_t>(maker)];
    if (graph::is(added, "add"))
      for (std::size_t i = 0; i < 2; ++i)
        if (is_weight(added.inputs[i]) && uses_[static_cast<std::size_t>(added.inputs[1 - i])] == 1) maker = graph_.value(added.inputs[1 - i]).node;
    for (const auto& factor : groups_.rule(maker).factors) {
      const auto f = static_cast<int>(&factor - groups_.rule(maker).factors.data());
      const auto it = decision_.assignment.find({maker, f});
      if (factor.kind == FactorKind::contracted && it != decision_.assignment.end() && it->second.axis == axis) return true;
    }
    return false;
  }

  const Graph& graph_;
  const Mesh& mesh_;
  FactorGroups groups_;
  std::vector<int> uses_;
  std::map<ValueId, std::vector<int>> readers_;
  std::set<std::pair<int, int>> taken_;  // (node, axis)
  std::map<std::string, std::vector<std::string>> uneven_;
  Decision decision_;
};

}  // namespace

Decision decide(const Graph& graph, const Mesh& mesh) { return Strategy(graph, mesh).run(); }

}  // namespace comfytp::sharding
