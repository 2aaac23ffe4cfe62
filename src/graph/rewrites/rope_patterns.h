// How models write rotary embeddings.
#pragma once

#include <optional>

#include "graph/graph.h"

namespace comfytp::graph {

/// What turns by angles: pairs (the value with its last dimension split in neighbours), and cosines and sines along the last dimension, of
/// its size or of half of it. `columns`: those of a matrix for every pair instead, what its first half is multiplied by and what its second,
/// for both of the results.
struct Rope {
  ValueId pairs = -1, cos = -1, sin = -1;
  bool columns = false;
};

/// The rope whose result is the value that `node` makes: a concat of both halves, each a sum of products; x * cos + (-x1, x0) * sin; or a
/// product of matrices.
std::optional<Rope> rope_at(const Graph& graph, const Node& node);

}  // namespace comfytp::graph
