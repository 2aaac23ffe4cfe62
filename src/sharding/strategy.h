// What to cut: finds the groups of factors that belong together and gives them to the axes of a mesh.
#pragma once

#include "sharding/partition.h"

namespace comfytp::sharding {

/// Factors that meet in values and can only be cut together: "the heads of block 7", "the inner channels of ResBlock 3".
struct FactorGroup {
  std::vector<std::pair<int, int>> members;  ///< (node, factor)
  std::int64_t units = 1;                    ///< every member can be cut into this many equal steps
  double flops = 0;                          ///< of the nodes whose work a cut would divide
  double leave_bytes = 0;                    ///< that have to be communicated where the group ends
  std::string name;                          ///< of its first heavy node, for `plan --dump`
};
std::vector<FactorGroup> factor_groups(const graph::Graph& graph);

struct Decision {
  Assignment assignment;
  std::vector<std::string> notes;  ///< what could not be cut as the mesh asks, and what was done instead
  std::vector<std::string> groups; ///< which group went to which axis, for `plan --dump`
};
/// Gives the groups of a normalised graph to the mesh's axes: batch (the samples), patch (rows and tokens), tensor (heads,
/// feed-forwards, inner channels, and what is left by output channels).
Decision decide(const graph::Graph& graph, const Mesh& mesh);

}  // namespace comfytp::sharding
