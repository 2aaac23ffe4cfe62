// The text form of a graph: prints for people, reads back exactly, so that a graph can be a file and a test.
#pragma once

#include <string>
#include <string_view>

#include "graph/graph.h"

namespace comfytp::graph {

/// One line a node: `%3, %4 = op(%1, %2) {attr=1, list=[1,2]} : f32[2,3], f32[2] "name"`, then `output name = %5`.
/// Attributes: integers 3, reals 3.0 (always with a point, an exponent, inf or nan; they read back to the same bits), texts
/// "a\n\x00", lists [1,2] and [1.0,2.0], empty lists [] and [.] (reals). A name that is no plain word stands in quotes.
std::string to_text(const Graph& graph);
/// `{attr=1, list=[1,2]}`; equal texts mean equal attributes, bit by bit.
std::string to_text(const Attrs& attrs);

/// The inverse: parse(to_text(g)) prints the same text again. Blank lines and lines that begin with '#' are passed over; the
/// numbers of values may be any; the types after ':' may be left out and are checked when present. Throws Error naming the line.
Graph parse(std::string_view text);

}  // namespace comfytp::graph
