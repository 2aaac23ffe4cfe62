#include "sharding/strategy.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>

#include "base/error.h"
#include "sharding/joint_bounds.h"
#include "sharding/rule_query.h"

namespace comfytp::sharding {
namespace {

using graph::FactorKind;
using graph::Graph;
using graph::Node;
using graph::ValueId;

class Strategy {
 public:
  Strategy(const Graph& graph, const Mesh& mesh, double least_work)
      : graph_(graph), mesh_(mesh), least_work_(least_work), groups_(graph), uses_(graph.use_counts()) {
    for (std::size_t n = 0; n < graph.nodes().size(); ++n) {
      const Node& node = graph.nodes()[n];
      for (ValueId id : node.inputs) readers_[id].push_back(static_cast<int>(n));
      flops_.push_back(groups_.varies(static_cast<int>(n)) ? node.op->flops(graph.context(node)) : 0);
    }
  }

  Decision run() {
    for (int axis = 0; axis < static_cast<int>(mesh_.axes().size()); ++axis) {
      if (mesh_.axes()[axis].size == 1) continue;
      const auto& name = mesh_.axes()[axis].name;
      if (name == "batch") cut_dimension(axis, "samples");
      if (name == "patch") cut_dimension(axis, "rows");
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
    constexpr double kFarOff = 0.1;
    const auto& asked = mesh_.axes()[axis].shares;
    const auto parts = proportional_bounds(units, shares(axis));
    const auto sizes = sizes_of(parts);
    const bool even = std::adjacent_find(sizes.begin(), sizes.end(), std::not_equal_to<>()) == sizes.end();
    if (!even && asked.empty())
      uneven_[fmt::format("{} {} over {} devices are uneven ({})", units, what, mesh_.axes()[axis].size, fmt::join(sizes, "+"))].push_back(name);
    const double all = std::accumulate(asked.begin(), asked.end(), 0.0);
    double off = 0;
    for (std::size_t r = 0; r < asked.size(); ++r) off = std::max(off, std::abs(static_cast<double>(sizes[r]) / static_cast<double>(units) - asked[r] / all));
    if (off > kFarOff)
      uneven_[fmt::format("{} {} cannot be shared out as {}, and are {}", units, what, fmt::join(asked, ":"), fmt::join(sizes, "+"))].push_back(name);
    cut_at(parts, members, units, axis, name, what);
  }

  static Bounds sizes_of(const Bounds& bounds) {
    Bounds sizes(bounds.size());
    std::adjacent_difference(bounds.begin(), bounds.end(), sizes.begin());
    sizes.erase(sizes.begin());
    return sizes;
  }

  void cut_at(const Bounds& parts, const std::vector<std::pair<int, int>>& members, std::int64_t units, int axis, const std::string& name,
              const std::string& what) {
    decision_.groups.push_back(fmt::format("{}: {} of '{}', {} = {}", name_of(axis), what, name, units, fmt::join(sizes_of(parts), "+")));
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

  // Samples, or rows, and all that hangs on them by halos or as parts.
  void cut_dimension(int axis, const std::string& what) {
    const ValueId output = graph_.outputs().at(0).value;
    const auto& name = name_of(axis);
    const auto size = mesh_.axes()[static_cast<std::size_t>(axis)].size;
    const bool scalar = graph_.type(output).shape.empty();
    const int seed = scalar ? -1 : what == "samples" ? groups_.of_value(output, 0) : rows_of(output, axis);
    if (seed < 0) {
      decision_.notes.push_back(fmt::format("{}={}: the output {} has no {} to cut, so every device of the axis does the same work; use {}=1, or tensor={}",
                                            name, size, graph::to_string(graph_.type(output)), what, name, size));
      return;
    }
    if (const auto units = groups_.all()[static_cast<std::size_t>(seed)].units; units < size)
      decision_.notes.push_back(fmt::format("{}={}: the output {} has {} {} to cut, so {} of the devices of the axis get none; use {}={} at most, or tensor={}",
                                            name, size, graph::to_string(graph_.type(output)), units, what, size - units, name, units, size));
    const auto connected = groups_.connected(seed);
    const auto joint = best_joint_bounds(connected, axis);
    for (int g : connected) {
      const auto& group = groups_.all()[static_cast<std::size_t>(g)];
      if (!free_of(group, axis)) continue;
      if (const auto bounds = joint.find(g); bounds != joint.end())
        cut_at(bounds->second, group.members, group.units, axis, group.name, what);
      else
        cut(group.members, group.units, axis, group.name, what);
    }
    note_whole_work(axis, what);
  }

  // The longest sequence may do the least: an image's tokens beside those of a text that is read as keys alone. Where another of them as the
  // one that is divided evenly leaves the busiest device clearly less, it is.
  std::map<int, Bounds> best_joint_bounds(const std::set<int>& connected, int axis) const {
    constexpr double kClearly = 0.95;
    auto best = joint_bounds(groups_, connected, shares(axis));
    double least = busiest_by(connected, best, axis);
    std::set<int> roots;
    if (least * kClearly > busiest_by(connected, {}, axis))  // as if each were divided evenly by itself
      for (const auto& i : groups_.inclusions())
        if (connected.count(i.whole) && connected.count(i.part)) roots.insert({i.whole, i.part});
    for (int root : roots) {
      auto bounds = joint_bounds_from(groups_, connected, root, shares(axis));
      const double busiest = busiest_by(connected, bounds, axis);
      if (busiest < kClearly * least) best = std::move(bounds), least = busiest;
    }
    return best;
  }

  // Floating-point operations of a step that the device does which has the most for its share, where the groups are cut so; those
  // that `joint` has not are divided in proportion.
  double busiest_by(const std::set<int>& connected, const std::map<int, Bounds>& joint, int axis) const {
    const auto parts = shares(axis);
    std::vector<double> sums(parts.size(), 0);
    std::set<int> divided;
    for (int g : connected) {
      const auto& group = groups_.all()[static_cast<std::size_t>(g)];
      const auto found = joint.find(g);
      const auto sizes = sizes_of(found != joint.end() ? found->second : proportional_bounds(group.units, parts));
      for (auto [n, f] : group.members) {
        if (!divided.insert(n).second) continue;
        for (std::size_t r = 0; r < parts.size(); ++r)
          sums[r] += flops_[static_cast<std::size_t>(n)] * static_cast<double>(sizes[r]) / static_cast<double>(group.units);
      }
    }
    double whole = std::accumulate(flops_.begin(), flops_.end(), 0.0), most = 0;
    for (int n : divided) whole -= flops_[static_cast<std::size_t>(n)];
    for (std::size_t r = 0; r < parts.size(); ++r) most = std::max(most, (whole + sums[r]) / parts[r]);
    return most;
  }

  // The group of the output's dimension, behind that of the samples, of which a cut leaves the busiest device the least to do: an image's rows, a
  // film's frames (or its rows, where it has one frame), a sequence's tokens, wherever a model has them; -1 if none can be cut. Of
  // dimensions that are as good, the first behind the channels of an image. Channels are not asked: they cut weights.
  int rows_of(ValueId output, int axis) const {
    const auto rank = graph_.type(output).shape.size();
    std::vector<std::size_t> dims;
    if (rank >= 4) dims.push_back(2);
    for (std::size_t d = 1; d < rank; ++d) dims.push_back(d);
    int best = -1;
    double least = 0;
    for (std::size_t d : dims) {
      const int seed = groups_.of_value(output, d);
      if (seed < 0 || groups_.all()[static_cast<std::size_t>(seed)].work > 0) continue;  // the latter: channels
      const double left = left_by(seed, axis);
      if (best < 0 || left < 0.99 * least) best = seed, least = left;
    }
    return best;
  }

  // Floating-point operations of a step that the busiest device does when a group and all that hangs on it are cut.
  double left_by(int seed, int axis) const {
    std::set<int> nodes;
    for (int g : groups_.connected(seed))
      for (auto [n, f] : groups_.all()[static_cast<std::size_t>(g)].members) nodes.insert(n);
    const auto units = groups_.all()[static_cast<std::size_t>(seed)].units;
    const auto sizes = sizes_of(proportional_bounds(units, shares(axis)));
    const double most = static_cast<double>(*std::max_element(sizes.begin(), sizes.end())) / static_cast<double>(units);
    double left = 0;
    for (std::size_t n = 0; n < flops_.size(); ++n) left += flops_[n] * (nodes.count(static_cast<int>(n)) ? most : 1);
    return left;
  }

  // Where much of the arithmetic hangs on something that cannot be cut so, more devices gain little.
  void note_whole_work(int axis, const std::string& what) {
    constexpr double kMuch = 0.2;
    double whole = 0, all = 0;
    for (std::size_t n = 0; n < flops_.size(); ++n) {
      all += flops_[n];
      if (!taken_.count({static_cast<int>(n), axis})) whole += flops_[n];
    }
    if (whole > kMuch * all)
      decision_.notes.push_back(fmt::format("{}={}: {:.0f} % of a step's arithmetic cannot be divided by {}, so every device of the axis does all of it", name_of(axis),
                                            mesh_.axes()[static_cast<std::size_t>(axis)].size, 100 * whole / all, what));
  }

  bool is_weight(ValueId id) const { return graph::is(graph_.producer(id), "weight"); }
  const std::string& name_of(int axis) const { return mesh_.axes()[static_cast<std::size_t>(axis)].name; }

  void cut_channels(int axis) {
    const auto given = mesh_.cuts.find(name_of(axis));
    if (given == mesh_.cuts.end()) {
      const auto candidates = worthy_groups();
      const double least = least_of(candidates);
      choose_groups(candidates, least, axis);
      choose_alone(least, axis);
    } else {
      follow(axis, given->second);
    }
  }

  // A group that begins with the output channels of one heavy op and ends in the partial sums of another costs one sum for the work of
  // both; those that cost the fewest bytes an operation come first.
  std::vector<const FactorGroup*> worthy_groups() const {
    std::vector<const FactorGroup*> candidates;
    for (const auto& group : groups_.all()) {
      const auto divides = [&](FactorKind kind) {
        return std::any_of(group.members.begin(), group.members.end(), [&](const auto& m) {
          return groups_.rule(m.first).factors[static_cast<std::size_t>(m.second)].kind == kind && groups_.divided_weights(m.first, m.second) > 0;
        });
      };
      if (group.units > 1 && divides(FactorKind::free) && divides(FactorKind::contracted)) candidates.push_back(&group);
    }
    std::stable_sort(candidates.begin(), candidates.end(),
                     [](const FactorGroup* a, const FactorGroup* b) { return a->leave * b->weights < b->leave * a->weights; });
    return candidates;
  }

  // The multiplications for a channel that is sent below which a cut does not pay. Of a small model everything is little work: there it is what
  // is far less than the rest.
  double least_of(const std::vector<const FactorGroup*>& candidates) const {
    std::vector<double> usual;
    for (const auto* group : candidates) usual.push_back(group->work / group->leave);
    std::sort(usual.begin(), usual.end());
    return usual.empty() ? least_work_ : std::min(least_work_, usual[usual.size() / 2] / 2);
  }

  // What works for the prompt alone costs a step nothing.
  static bool pays(double work, double weights, double leave, double least) { return (work == 0 && weights > 0) || work >= least * leave; }

  void choose_groups(const std::vector<const FactorGroup*>& candidates, double least, int axis) {
    std::vector<std::string> whole;
    for (const auto* group : candidates) {
      if (!free_of(*group, axis)) continue;
      if (pays(group->work, group->weights, group->leave, least))
        cut_group(*group, axis);
      else
        whole.push_back(group->name);
    }
    if (!whole.empty())
      decision_.notes.push_back(fmt::format(
          "{}={}: not divided: {} group{} of layers (that of '{}'{}), since to send the results would take longer than dividing the work saves", name_of(axis),
          mesh_.axes()[static_cast<std::size_t>(axis)].size, whole.size(), whole.size() > 1 ? "s" : "", whole[0].substr(0, whole[0].find('[')),
          whole.size() > 1 ? " and others" : ""));
  }

  // What is left over is cut op by op, where it is worth a collective of its own: from a thousandth of all weights on.
  void choose_alone(double least, int axis) {
    double weights = 0;
    for (const auto* weight : graph_.all("weight")) weights += static_cast<double>(graph_.type(weight->outputs[0]).bytes());
    for (int n = 0; n < static_cast<int>(graph_.nodes().size()); ++n) {
      double own = 0;
      for (ValueId id : weights_left(n, axis)) own += static_cast<double>(graph_.type(id).bytes());
      if (own <= weights / 1000) continue;
      const auto cuts = cuts_alone(n, axis);
      if (cuts.joined.factor >= 0)
        cut_alone(n, cuts.joined, true, axis);
      else if (cuts.output.factor >= 0 && pays_alone(n, cuts.output.factor, least))
        cut_alone(n, cuts.output, false, axis);
    }
  }

  // By output channels, which are gathered.
  bool pays_alone(int n, int factor, double least) const {
    const double weights = groups_.divided_weights(n, factor), channels = static_cast<double>(groups_.rule(n).factors[static_cast<std::size_t>(factor)].size);
    return pays(groups_.varies(n) ? weights : 0, weights, channels, least);
  }

  void follow(int axis, const Cuts& given) {
    const auto missing = [&](const std::string& name) {
      fail("[strategy] the plan cuts '{}' along '{}' but this model has no such weight, or it cannot be cut so, or twice", name, name_of(axis));
    };
    for (const auto& name : given.groups) {
      const auto& all = groups_.all();
      const auto group = std::find_if(all.begin(), all.end(), [&](const FactorGroup& g) { return g.name == name && g.weights > 0; });
      if (group == all.end() || !free_of(*group, axis)) missing(name);
      cut_group(*group, axis);
    }
    std::set<std::string> left(given.alone.begin(), given.alone.end());
    for (int n = 0; n < static_cast<int>(graph_.nodes().size()); ++n) {
      if (weights_left(n, axis).empty()) continue;
      const auto cuts = cuts_alone(n, axis);
      for (const auto* one : {&cuts.input, &cuts.output})
        if (one->factor >= 0 && std::find(given.alone.begin(), given.alone.end(), one->name) != given.alone.end()) {
          left.erase(one->name);
          cut_alone(n, *one, one == &cuts.input, axis);
          break;
        }
    }
    if (!left.empty()) missing(*left.begin());
  }

  void cut_group(const FactorGroup& group, int axis) {
    cut(group.members, group.units, axis, group.name, "units");
    decision_.cuts[name_of(axis)].groups.push_back(group.name);
  }

  // The weights of a heavy op that nothing cuts yet along this axis.
  std::vector<ValueId> weights_left(int n, int axis) const {
    std::vector<ValueId> weights;
    if (!is_heavy(groups_.rule(n)) || taken_.count({n, axis})) return weights;
    for (ValueId id : graph_.nodes()[static_cast<std::size_t>(n)].inputs)
      if (is_weight(id)) weights.push_back(id);
    return weights;
  }

  // A factor of one heavy op and the dimension of its weight; factor -1: none can be cut.
  struct Alone {
    int factor = -1;
    std::string name;
  };
  struct CutsAlone {
    Alone output, input, joined;  ///< joined: input, where the partial sum meets another one in a sum
  };
  CutsAlone cuts_alone(int n, int axis) const {
    const Node& node = graph_.nodes()[static_cast<std::size_t>(n)];
    const auto& rule = groups_.rule(n);
    const auto at = std::find_if(node.inputs.begin(), node.inputs.end(), [&](ValueId id) { return is_weight(id); }) - node.inputs.begin();
    const auto& dims = rule.inputs[static_cast<std::size_t>(at)];
    CutsAlone cuts;
    for (std::size_t d = 0; d < dims.size(); ++d) {
      const int f = major_of(rule, dims[d]).factor;
      if (f < 0 || !can_cut(rule, f) || decision_.assignment.count({n, f})) continue;
      auto& alone = rule.factors[static_cast<std::size_t>(f)].kind == FactorKind::contracted ? cuts.input : cuts.output;
      alone.factor = f;
      alone.name = weight_name(graph_.producer(node.inputs[static_cast<std::size_t>(at)]), d);
    }
    if (cuts.input.factor >= 0 && joins_partial_sum(node.outputs[0], axis)) cuts.joined = cuts.input;
    return cuts;
  }

  // One heavy op, by its input channels or by its output channels together with the bias behind it.
  void cut_alone(int n, const Alone& alone, bool input, int axis) {
    const Node& node = graph_.nodes()[static_cast<std::size_t>(n)];
    std::vector<std::pair<int, int>> members = {{n, alone.factor}};
    const std::int64_t units = groups_.rule(n).factors[static_cast<std::size_t>(alone.factor)].size;
    if (!input)
      if (const int bias = bias_behind(node.outputs[0]); bias >= 0 && !taken_.count({bias, axis})) {
        const int group = groups_.of(n, alone.factor);
        for (std::size_t f = 0; f < groups_.rule(bias).factors.size(); ++f)
          if (groups_.of(bias, static_cast<int>(f)) == group && !decision_.assignment.count({bias, static_cast<int>(f)}))
            members.push_back({bias, static_cast<int>(f)});
      }
    cut(members, units, axis, alone.name, input ? "input channels" : "output channels");
    auto& names = decision_.cuts[name_of(axis)].alone;
    if (std::find(names.begin(), names.end(), alone.name) == names.end()) names.push_back(alone.name);
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
  const double least_work_;
  FactorGroups groups_;
  std::vector<int> uses_;
  std::map<ValueId, std::vector<int>> readers_;
  std::vector<double> flops_;            // of each node in a step
  std::set<std::pair<int, int>> taken_;  // (node, axis)
  std::map<std::string, std::vector<std::string>> uneven_;
  Decision decision_;
};

}  // namespace

Decision decide(const Graph& graph, const Mesh& mesh, double least_work) { return Strategy(graph, mesh, least_work).run(); }

}  // namespace comfytp::sharding
