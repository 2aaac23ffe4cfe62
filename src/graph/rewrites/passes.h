// The single rewrites that normalise() runs until none of them finds anything to do, and what rewrites share.
#pragma once

#include <optional>

#include "graph/graph.h"

namespace comfytp::graph {

/// Each returns nothing where it changes nothing.
using Pass = std::optional<Graph> (*)(const Graph&);

/// The epilogue of a linear or convolution and the activation of a group_norm become nodes of their own.
std::optional<Graph> expand_epilogues(const Graph& graph);
/// Nodes that are equal to an earlier one give way to it.
std::optional<Graph> share_equal_nodes(const Graph& graph);
/// Views, casts, slices, concats, paddings and expansions that undo each other or do nothing go; a slice moves above the views before it.
std::optional<Graph> simplify_views(const Graph& graph);
/// Small nodes that read constants alone become constants.
std::optional<Graph> fold_constants(const Graph& graph);
/// A linear or convolution that is only sliced along its output channels becomes one for each slice.
std::optional<Graph> split_merged_projections(const Graph& graph);
/// A linear over a concat of channels becomes a sum of linears, so that each part's channels can be cut on their own.
std::optional<Graph> split_concat_inputs(const Graph& graph);

/// Rotary embeddings that are written out become a pointwise of one step, rope.
std::optional<Graph> find_ropes(const Graph& graph);
/// A cast to f32 that several nodes read becomes one for each of them, just before it.
std::optional<Graph> own_casts(const Graph& graph);

/// A glu of two linears that nobody else reads becomes a gated_linear.
std::optional<Graph> gate_linears(const Graph& graph);

/// Linears of one x that stand together become linears: small plain ones over weights of one shape, and those that ask for their products in fp8.
std::optional<Graph> join_linears(const Graph& graph);

/// fuse() with Fusion::passes.
Graph fuse_into_passes(const Graph& graph);

/// linear or a convolution.
bool is_projection(const Node& node);
/// A projection, attention or matmul: what takes the time.
bool is_heavy(const Node& node);
/// The dimension of a projection's output that its weight's dimension 0 makes.
std::size_t channel_dim(const Graph& graph, const Node& projection);
/// `operand` broadcasts over all dimensions of `out` but `channel`: a bias, whatever its dimensions of size 1.
bool is_per_channel(const Shape& operand, const Shape& out, std::size_t channel);

/// [start, stop) of dimension `dim`: a weight is narrowed, anything else sliced.
ValueId part_of(Graph& g, ValueId x, std::size_t dim, std::int64_t start, std::int64_t stop);

/// Who reads each value: indices of nodes (twice where a node reads it twice), and -1 for an output of the graph.
std::vector<std::vector<int>> readers(const Graph& graph);

}  // namespace comfytp::graph
