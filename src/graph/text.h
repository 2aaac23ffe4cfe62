// The text form of a graph: prints for people, reads back exactly, so that a graph can be a file and a test.
#pragma once

#include <string>
#include <string_view>

#include "graph/graph.h"

namespace comfytp::graph {

/// One line a node: `%3, %4 = op(%1, %2) {attr=1, list=[1,2]} : f32[2,3], f32[2] "name"`, then `output name = %5`.
/// Reals are printed so that they read back to the same bits.
std::string to_text(const Graph& graph);

/// The inverse: parse(to_text(g)) prints the same text again. Blank lines and lines that begin with '#' are passed over; the types after
/// ':' may be left out and are checked when present. Throws Error naming the line.
Graph parse(std::string_view text);

}  // namespace comfytp::graph
