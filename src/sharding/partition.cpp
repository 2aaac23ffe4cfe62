#include "sharding/partition.h"

#include <algorithm>
#include <optional>
#include <set>

#include "base/error.h"
#include "sharding/pair_gathers.h"
#include "sharding/resharder.h"
#include "sharding/rule_query.h"

namespace comfytp::sharding {
namespace {

using graph::Attrs;
using graph::DimRule;
using graph::FactorKind;
using graph::Graph;
using graph::Node;
using graph::OpContext;
using graph::Rule;
using graph::ValueId;

// A node in a message: a capture names few.
std::string label(const Node& node) {
  return node.name.empty() ? fmt::format("{} %{}", node.op->name(), node.outputs.at(0)) : fmt::format("{} '{}'", node.op->name(), node.name);
}

// The cut factors of one node.
struct Cuts {
  std::vector<const Cut*> of;  // by factor, null where whole
  std::string describe(const Rule& rule, const Mesh& mesh) const {
    std::string text;
    for (std::size_t f = 0; f < of.size(); ++f)
      if (of[f]) text += fmt::format("{}{}/{}", text.empty() ? "" : ", ", rule.factors[f].name, mesh.axes()[of[f]->axis].name);
    return text.empty() ? "whole" : text;
  }
};

Cuts cuts_of(int index, const Node& node, const Rule& rule, const Assignment& assignment, const Mesh& mesh) {
  Cuts cuts{std::vector<const Cut*>(rule.factors.size(), nullptr)};
  std::set<int> axes;
  for (auto it = assignment.lower_bound({index, 0}); it != assignment.end() && it->first.first == index; ++it) {
    const auto factor = static_cast<std::size_t>(it->first.second);
    const auto& cut = it->second;
    const auto where = label(node);
    require(factor < rule.factors.size() && can_cut(rule, static_cast<int>(factor)), "[partition] factor {} of {} cannot be cut", factor, where);
    require(cut.axis >= 0 && cut.axis < static_cast<int>(mesh.axes().size()), "[partition] {} is cut along axis {} of {}", where, cut.axis,
            mesh.axes().size());
    require(axes.insert(cut.axis).second, "[partition] {} is cut twice along '{}'", where, mesh.axes()[cut.axis].name);
    const bool covers = cut.bounds.size() == static_cast<std::size_t>(mesh.axes()[cut.axis].size) + 1 && cut.bounds.front() == 0 &&
                        cut.bounds.back() == rule.factors[factor].size && std::is_sorted(cut.bounds.begin(), cut.bounds.end());
    require(covers, "[partition] expected {} ascending bounds from 0 to {} for '{}' of {} but got {}", mesh.axes()[cut.axis].size + 1,
            rule.factors[factor].size, rule.factors[factor].name, where, comfytp::to_string(cut.bounds));
    cuts.of[factor] = &cut;
  }
  return cuts;
}

// Where the parts of one dimension of an operand lie when its node is cut so.
Want want_of(const Rule& rule, const DimRule& dim, const Cuts& cuts) {
  const Major major = major_of(rule, dim);
  if (major.factor < 0 || !cuts.of[major.factor]) return {};
  const Cut& cut = *cuts.of[major.factor];
  Want want{cut.axis, {}};
  for (std::size_t r = 0; r + 1 < cut.bounds.size(); ++r) {
    const Interval part{cut.bounds[r] * major.step, cut.bounds[r + 1] * major.step};
    want.parts.push_back(dim.window ? dim.window(part) : part);
  }
  return want;
}

Wants wants_of(const Rule& rule, const std::vector<DimRule>& dims, const Cuts& cuts) {
  Wants wants;
  for (const auto& dim : dims) wants.push_back(want_of(rule, dim, cuts));
  return wants;
}

class Partitioner {
 public:
  Partitioner(const Graph& graph, const Mesh& mesh, const Assignment& assignment, Placement placement)
      : graph_(graph), mesh_(mesh), assignment_(assignment), uses_(graph.use_counts()), reshard_(graph, mesh, placement) {}

  Partition run() {
    for (std::size_t i = 0; i < graph_.nodes().size(); ++i) {
      const Node& node = graph_.nodes()[i];
      if (!is_leaf(node)) place(static_cast<int>(i), node);
    }
    Partition result{mesh_, {}, {}, {}, {}};
    for (const auto& output : graph_.outputs()) result.outputs[output.name] = hand_over(output);
    result.devices = std::move(reshard_.devices);
    for (auto& device : result.devices) {
      device = graph::prune(device);
      graph::verify(device);
    }
    pair_gathers(result.devices);
    for (std::size_t v = 0; v < graph_.value_count(); ++v) result.values.push_back(reshard_.sharding_of(static_cast<ValueId>(v)));
    return result;
  }

 private:
  void place(int index, const Node& node) {
    const OpContext op = graph_.context(node);
    const Rule rule = node.op->rule(op);
    const Cuts cuts = cuts_of(index, node, rule, assignment_, mesh_);
    std::set<int> cut_axes, partial;
    for (std::size_t f = 0; f < cuts.of.size(); ++f) {
      if (!cuts.of[f]) continue;
      cut_axes.insert(cuts.of[f]->axis);
      if (rule.factors[f].kind == FactorKind::contracted) partial.insert(cuts.of[f]->axis);
    }
    const std::set<int> kept = stays_partial(node, rule, cut_axes);
    partial.insert(kept.begin(), kept.end());

    std::vector<ValueId> inputs;
    const auto reason = fmt::format("{} ({})", label(node), cuts.describe(rule, mesh_));
    for (std::size_t i = 0; i < node.inputs.size(); ++i) {
      const Wants wants = narrowed(wants_of(rule, rule.inputs[i], cuts), rule, i, node.inputs[i]);
      const bool once = !kept.empty() && is_leaf(graph_.producer(node.inputs[i]));
      inputs.push_back(once ? reshard_.on_first(node.inputs[i], wants, kept) : reshard_.get(node.inputs[i], wants, kept, reason));
    }
    std::vector<Attrs> local;
    for (int d = 0; d < mesh_.size(); ++d) local.push_back(node.op->localize(op, ranges(rule, cuts, d), types_of(inputs, d)));
    add_moments(node, rule, cuts, local, inputs);

    const auto outputs = reshard_.emit(*node.op, inputs, local, node.name);
    for (std::size_t i = 0; i < outputs.size(); ++i)
      reshard_.define(node.outputs[i], outputs[i], wants_of(rule, rule.outputs[i], cuts), {partial.begin(), partial.end()}, reason);
  }

  // Of a value that is cut along a dimension, every device gets the one row that a slice takes of it, and not all of them.
  Wants narrowed(Wants wants, const Rule& rule, std::size_t input, ValueId id) const {
    const Wants where = reshard_.where(id);
    for (std::size_t d = 0; d < wants.size(); ++d) {
      const auto& dim = rule.inputs[input][d];
      const int axis = where[d].axis;
      const bool one = dim.shift && rule.factors[static_cast<std::size_t>(dim.factors[0])].size == 1 && graph_.type(id).shape[d] > 1;
      if (!one || axis < 0 || std::any_of(wants.begin(), wants.end(), [&](const Want& w) { return w.axis == axis; })) continue;
      wants[d] = {axis, std::vector<Interval>(static_cast<std::size_t>(mesh_.axes()[static_cast<std::size_t>(axis)].size), dim.window({0, 1}))};
    }
    return wants;
  }

  std::vector<graph::Type> types_of(const std::vector<ValueId>& ids, int device) const {
    std::vector<graph::Type> types;
    for (ValueId id : ids) types.push_back(reshard_.devices[static_cast<std::size_t>(device)].type(id));
    return types;
  }

  std::vector<Interval> ranges(const Rule& rule, const Cuts& cuts, int device) const {
    std::vector<Interval> ranges;
    for (std::size_t f = 0; f < rule.factors.size(); ++f) {
      if (!cuts.of[f]) {
        ranges.push_back({0, rule.factors[f].size});
        continue;
      }
      const auto r = static_cast<std::size_t>(mesh_.coordinate(device, cuts.of[f]->axis));
      ranges.push_back({cuts.of[f]->bounds[r], cuts.of[f]->bounds[r + 1]});
    }
    return ranges;
  }

  // The axes along which this node may work on partial sums: it is linear, and what comes in is a partial sum that nobody
  // else reads, or a bias: adding that on the first device alone costs nothing. A larger weight is not added so, however small it is
  // beside this call's values: where weights lie must not depend on the shape of a call.
  std::set<int> stays_partial(const Node& node, const Rule& rule, const std::set<int>& cut_axes) const {
    std::set<int> kept;
    if (!rule.linear) return kept;
    for (int axis = 0; axis < static_cast<int>(mesh_.axes().size()); ++axis) {
      if (cut_axes.count(axis)) continue;
      bool any = false, all = true;
      for (ValueId id : node.inputs) {
        if (is_leaf(graph_.producer(id))) {
          all = all && graph::is(graph_.producer(id), "weight") && Resharder::is_vector(graph_.type(id).shape);
          continue;
        }
        const bool alone = reshard_.is_partial(id, axis) && uses_[static_cast<std::size_t>(id)] == 1;
        any = any || alone;
        all = all && alone;
      }
      if (any && all) kept.insert(axis);
    }
    return kept;
  }

  // Where a normalised set is cut, the parts' moments are gathered and become a further input.
  void add_moments(const Node& node, const Rule& rule, const Cuts& cuts, const std::vector<Attrs>& local, std::vector<ValueId>& inputs) {
    std::optional<ValueId> moments;
    for (std::size_t f = 0; f < rule.factors.size(); ++f) {
      if (!cuts.of[f] || rule.factors[f].kind != FactorKind::statistics) continue;
      if (!moments) {
        for (int d = 0; d < mesh_.size(); ++d) moments = node.op->emit_moments(reshard_.devices[d], local[d], inputs);
      }
      moments = reshard_.gather(*moments, 0, cuts.of[f]->axis, fmt::format("statistics of {}", label(node)));
    }
    if (moments) inputs.push_back(*moments);
  }

  std::vector<OutputPart> hand_over(const graph::Output& output) {
    const Wants where = reshard_.where(output.value);
    const ValueId id = reshard_.get(output.value, where, {}, fmt::format("output '{}'", output.name));
    std::vector<OutputPart> parts;
    for (int d = 0; d < mesh_.size(); ++d) {
      reshard_.devices[d].add_output(output.name, id);
      OutputPart part{reshard_.box(output.value, where, d), true};
      for (int axis = 0; axis < static_cast<int>(mesh_.axes().size()); ++axis) {
        const bool cut = std::any_of(where.begin(), where.end(), [&](const Want& w) { return w.axis == axis; });
        if (!cut && mesh_.coordinate(d, axis) != 0) part.writes = false;
      }
      parts.push_back(std::move(part));
    }
    return parts;
  }

  const Graph& graph_;
  const Mesh& mesh_;
  const Assignment& assignment_;
  std::vector<int> uses_;
  Resharder reshard_;
};

}  // namespace

Partition partition(const Graph& graph, const Mesh& mesh, const Assignment& assignment, Placement placement) {
  return Partitioner(graph, mesh, assignment, placement).run();
}

std::string to_string(const Sharding& sharding, const Mesh& mesh) {
  std::string text = "[";
  for (std::size_t d = 0; d < sharding.dims.size(); ++d) {
    const auto& dim = sharding.dims[d];
    text += d ? ", " : "";
    text += dim.axis < 0 ? "*" : mesh.axes()[static_cast<std::size_t>(dim.axis)].name + comfytp::to_string(dim.bounds);
  }
  text += "]";
  for (int axis : sharding.partial) text += " partial(" + mesh.axes()[static_cast<std::size_t>(axis)].name + ")";
  return text;
}

}  // namespace comfytp::sharding
