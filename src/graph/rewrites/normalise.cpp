#include "graph/rewrites.h"
#include "graph/rewrites/passes.h"

namespace comfytp::graph {

Graph normalise(const Graph& graph) {
  constexpr Pass passes[] = {expand_epilogues, simplify_views, fold_constants, share_equal_nodes, split_merged_projections, split_concat_inputs};
  constexpr int most_rounds = 32;  // every pass makes a graph smaller or moves slices up, so a few are enough
  Graph result = prune(graph);
  for (int round = 0; round < most_rounds; ++round) {
    bool changed = false;
    for (Pass pass : passes)
      if (auto next = pass(result)) {
        result = std::move(*next);
        changed = true;
      }
    if (!changed) break;
  }
  verify(result);
  return result;
}

}  // namespace comfytp::graph
