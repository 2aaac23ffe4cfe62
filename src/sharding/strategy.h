// What to cut: finds the groups of factors that belong together and gives them to the axes of a mesh.
#pragma once

#include <compare>
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
  // Of the model alone, so that every shape of a call chooses alike.
  double weights = 0;  ///< elements of the weights of heavy ops that a cut would divide
  double work = 0;     ///< multiplications that a cut would divide, for a token of a step; what meets the prompt alone is not among them
  double leave = 0;    ///< channels of a token that have to be communicated where the group ends, a sum counting twice
  std::string name;    ///< the largest weight that it cuts, as in Cuts; without weights its first node
};

/// Two groups of which one is a part of the other: the tokens of a text or an image among those of both, where a concat joins them or a slice
/// takes them out again.
struct Inclusion {
  int whole = -1, part = -1;                    ///< groups
  std::int64_t whole_size = 0, part_size = 0;   ///< elements of the dimension
  std::int64_t begin = 0;                       ///< of the part in the whole
  auto operator<=>(const Inclusion&) const = default;
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
  /// The group and all that hang on it by halos, the rows of all resolutions of an image, or as parts.
  std::set<int> connected(int group) const;
  const std::set<Inclusion>& inclusions() const { return inclusions_; }
  /// Whether a node runs in every step, and not once a prompt.
  bool varies(int node) const { return varies_[static_cast<std::size_t>(node)]; }
  /// The factor of a heavy node divides an operand that is made of weights alone; its elements, 0 if not.
  double divided_weights(int node, int factor) const;

 private:
  std::pair<int, int> cut_of_value(graph::ValueId value, std::size_t dim) const;  // factor (-1: none) and node
  double summed_channels(int node) const;
  double attended_channels(int node, int factor) const;
  void measure();

  const graph::Graph& graph_;
  std::vector<bool> varies_;
  std::vector<graph::Rule> rules_;
  std::vector<bool> of_weights_;  // values that hang on weights alone
  std::vector<std::vector<int>> of_;
  std::vector<FactorGroup> groups_;
  std::map<int, std::set<int>> neighbours_;
  std::set<Inclusion> inclusions_;
};

struct Decision {
  Assignment assignment;
  std::vector<std::string> notes;   ///< what could not be cut as the mesh asks, and what was done instead
  std::vector<std::string> groups;  ///< which group went to which axis, for `plan --dump`
  std::map<std::string, Cuts> cuts;  ///< what was chosen, or the mesh's own
};
/// "key[1]": a dimension of a weight node, as in Cuts.
std::string weight_name(const graph::Node& weight, std::size_t dim);
/// A matmul, a convolution: contracts a factor.
bool is_heavy(const graph::Rule& rule);
/// Gives the groups of a normalised graph to the mesh's axes: batch (the samples), patch (rows and tokens), tensor (heads,
/// feed-forwards, inner channels, and what is left by output channels). What is cut of the weights depends on the model and the mesh
/// alone, not on the shape of the call. Where tensor's cuts are not given, what divides fewer than `least_work` multiplications for a
/// channel that it sends stays whole, if that is less than half of what the model's groups usually do. Throws Error when the mesh's own
/// cuts name what the model has not or cannot cut so.
Decision decide(const graph::Graph& graph, const Mesh& mesh, double least_work = 0);

}  // namespace comfytp::sharding
