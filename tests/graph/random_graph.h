// Seeded random graphs over the ops, and leaves to run them with.
#pragma once

#include <cstdint>
#include <random>

#include "graph/evaluate.h"
#include "graph/graph.h"

namespace comfytp::graph::test {

/// A small graph of up to `nodes` random nodes: some nodes are equal, some undo each other, some nobody needs.
Graph random_graph(std::uint32_t seed, int nodes);

/// Values in [-1, 1) that depend on the leaf's name or key, so that the same leaf is the same in every graph.
Leaves seeded_leaves();

/// The largest |a - b| / (1 + |a|) over all outputs; infinite where names or shapes differ or a value is not finite.
double difference(const Results& a, const Results& b);

}  // namespace comfytp::graph::test
