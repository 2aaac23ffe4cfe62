// The graphs of all devices while they are made, in step: a value has the same number on every device, and is fetched in
// the sharding that its reader wants, by the collectives that lead there.
#pragma once

#include <compare>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "graph/graph.h"
#include "sharding/partition.h"

namespace comfytp::sharding {

/// The parts of one dimension: whole on every device, or coordinate r of `axis` has parts[r]. Parts may overlap (halos).
struct Want {
  int axis = -1;
  std::vector<Interval> parts;
  bool operator==(const Want&) const = default;
};
using Wants = std::vector<Want>;

class Resharder {
 public:
  Resharder(const graph::Graph& whole, const Mesh& mesh, Placement placement);

  /// At most one dimension that is not 1: biases and norms' weights, of which every device that needs one keeps its own.
  static bool is_vector(const Shape& shape);

  /// Appends a node to every device's graph; `attrs` has one entry a device.
  std::vector<graph::ValueId> emit(const graph::Op& op, const std::vector<graph::ValueId>& inputs, const std::vector<graph::Attrs>& attrs,
                                   const std::string& name);
  /// Says where the parts of a value of the whole graph are, once its node is emitted. `reason` names the node and its cuts.
  void define(graph::ValueId value, graph::ValueId id, Wants where, std::vector<int> partial, std::string reason);

  /// The value on the devices as `wants` says; sums are complete but along the axes in `keep_partial`.
  graph::ValueId get(graph::ValueId value, const Wants& wants, const std::set<int>& keep_partial, const std::string& reason);
  /// A vector's value on the devices with coordinate 0 along `axes`, zeros on the others: so that a sum over them is the value.
  graph::ValueId on_first(graph::ValueId leaf, const Wants& wants, const std::set<int>& axes);
  /// Parts that lie along a leading dimension of size 1 a device, joined along it.
  graph::ValueId gather(graph::ValueId id, int dim, int axis, const std::string& reason);

  bool is_partial(graph::ValueId value, int axis) const;
  /// Where a value was made; leaves: whole.
  Wants where(graph::ValueId value) const;
  Sharding sharding_of(graph::ValueId value) const;
  Box box(graph::ValueId value, const Wants& wants, int device) const;

  std::vector<graph::Graph> devices;

 private:
  // One form of a value on the devices.
  struct Form {
    Wants where;
    std::vector<int> partial;
    graph::ValueId id = -1;
    std::string reason;
  };
  graph::ValueId leaf(const graph::Node& node, graph::ValueId value, const Wants& wants, const std::set<int>& only_first);
  graph::ValueId fetch(const graph::Node& node, graph::ValueId value, const std::vector<Box>& boxes);
  std::size_t owner(graph::ValueId weight, std::size_t group_size);
  // What leads from a form to what is wanted.
  struct Path {
    double elements = 0;  ///< that all devices receive
    int collectives = 0;
    auto operator<=>(const Path&) const = default;
  };
  std::optional<Path> path(const Form& form, graph::ValueId value, const Wants& wants, const std::set<int>& keep_partial) const;
  void slice(Form& form, graph::ValueId value, const Wants& wants, std::size_t dim);
  graph::ValueId collective(const std::string& op, graph::ValueId id, int axis, graph::Attrs attrs, const std::string& reason);
  graph::Attrs localized(const graph::Node& node, const Box& box) const;

  const graph::Graph& whole_;
  Mesh mesh_;
  Placement placement_;
  std::vector<std::vector<Form>> forms_;  // by value of the whole graph; the first is where it was made
  std::map<std::size_t, std::map<graph::ValueId, std::size_t>> owners_;  // by the size of a group: which of it stores a weight
};

}  // namespace comfytp::sharding
