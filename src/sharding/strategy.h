// What to cut: finds the groups of factors that belong together and gives them to the axes of a mesh.
#pragma once

#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "sharding/partition.h"

namespace comfytp::sharding {

/// Factors that meet in values and can only be cut together: "the heads of block 7", "the inner channels of ResBlock 3".
struct FactorGroup {
  std::vector<std::pair<int, int>> members;  ///< (node, factor)
  std::int64_t units = 0;                    ///< every member can be cut into this many equal steps
  double flops = 0;                          ///< of the nodes whose work a cut would divide
  double leave_bytes = 0;                    ///< that have to be communicated where the group ends
  std::string name;                          ///< of its heaviest node, for `plan --dump`
};

/// All groups of a graph.
class FactorGroups {
 public:
  explicit FactorGroups(const graph::Graph& graph);
  const std::vector<FactorGroup>& all() const { return groups_; }
  const graph::Rule& rule(int node) const { return rules_[static_cast<std::size_t>(node)]; }
  /// The group of a node's factor; -1 if it cannot be cut.
  int of(int node, int factor) const { return of_[static_cast<std::size_t>(node)][static_cast<std::size_t>(factor)]; }
  /// The group that cuts a dimension of a value; -1 if there is none.
  int of_value(graph::ValueId value, std::size_t dim) const;
  /// The group and all that hang on it by halos: the rows of all resolutions of an image.
  std::set<int> connected(int group) const;

 private:
  std::pair<int, int> cut_of_value(graph::ValueId value, std::size_t dim) const;  // factor (-1: none) and node
  void measure();

  const graph::Graph& graph_;
  std::vector<graph::Rule> rules_;
  std::vector<std::vector<int>> of_;
  std::vector<FactorGroup> groups_;
  std::map<int, std::set<int>> neighbours_;
};

struct Decision {
  Assignment assignment;
  std::vector<std::string> notes;   ///< what could not be cut as the mesh asks, and what was done instead
  std::vector<std::string> groups;  ///< which group went to which axis, for `plan --dump`
};
/// Gives the groups of a normalised graph to the mesh's axes: batch (the samples), patch (rows and tokens), tensor (heads,
/// feed-forwards, inner channels, and what is left by output channels).
Decision decide(const graph::Graph& graph, const Mesh& mesh);

}  // namespace comfytp::sharding
