// Runs graphs through the ops' references: the oracle that rewrites, shardings and backends are held against.
#pragma once

#include <functional>
#include <map>
#include <string>

#include "graph/graph.h"

namespace comfytp::graph {

/// Gives the value of an "input" or "weight" node (its whole; parts are cut from it by the node's offset and shape).
using Leaves = std::function<RefTensor(const Node&)>;
using Results = std::map<std::string, RefTensor>;

/// One device.
Results evaluate(const Graph& graph, const Leaves& leaves);
/// All devices of a mesh in step; collectives meet where every rank of their group has come to them. Throws Error when
/// the ranks' collectives do not match.
std::vector<Results> evaluate(const std::vector<Graph>& devices, const Leaves& leaves);

/// The part of `whole` at `offset` with `shape`, seen without dimensions of size 1.
RefTensor part_of(const RefTensor& whole, const Ints& full, const Ints& offset, const Ints& shape);

}  // namespace comfytp::graph
