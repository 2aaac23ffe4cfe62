// From one graph and a decision what to cut, one graph per device with the collectives in it.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "graph/graph.h"
#include "sharding/mesh.h"

namespace comfytp::sharding {

/// A cut of one factor of one node along one mesh axis: coordinate r gets [bounds[r], bounds[r+1]).
struct Cut {
  int axis = 0;
  std::vector<std::int64_t> bounds;
  bool operator==(const Cut&) const = default;
};

/// What is cut where: (node's index, factor of its rule) -> cut. What is not named here is whole on every device. Along one
/// axis at most one factor of a node is cut.
using Assignment = std::map<std::pair<int, int>, Cut>;

/// Where a value's parts lie: per dimension a cut or none, and the axes along which it is a partial sum.
struct Sharding {
  struct Dim {
    int axis = -1;  ///< -1: whole
    std::vector<std::int64_t> bounds;
    bool operator==(const Dim&) const = default;
  };
  std::vector<Dim> dims;
  std::vector<int> partial;  ///< axes, ascending
  bool operator==(const Sharding&) const = default;
};
/// "[n/batch{0,1,2}, 320, …] partial(tensor)" as `plan --dump` shows it.
std::string to_string(const Sharding& sharding, const Mesh& mesh);

/// How weights lie in memory, apart from how the work is split.
enum class Placement {
  resident,  ///< every device holds what it computes with
  gathered,  ///< where several devices need the same, one stores it and the others fetch it just ahead of use
};

/// The part of an output that a device holds after a call. Several devices may hold the same part; one of them, `writes`, hands it over.
struct OutputPart {
  Box box;
  bool writes = false;
};

struct Partition {
  Mesh mesh;
  std::vector<graph::Graph> devices;
  std::map<std::string, std::vector<OutputPart>> outputs;  ///< by name, one entry a device
  std::vector<Sharding> values;                            ///< of every value of the whole graph, by its id
  std::vector<std::string> notes;                          ///< what could not be cut as asked, for the plan
};

/// Realises an assignment. Collectives carry the attribute "reason". Throws Error when the assignment contradicts the ops' rules.
Partition partition(const graph::Graph& graph, const Mesh& mesh, const Assignment& assignment, Placement placement);

}  // namespace comfytp::sharding
