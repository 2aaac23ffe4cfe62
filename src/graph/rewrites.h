// Rewrites of a graph: same inputs, same outputs, same values within rounding. Each verifies what it made.
#pragma once

#include <functional>
#include <string>

#include "graph/graph.h"

namespace comfytp::graph {

/// Before partitioning: what makes a graph easy to cut, and what makes a built and an imported graph alike.
/// A linear or convolution whose output is only sliced along its output channels (a merged projection) becomes one per
/// slice, with its part of the weight; epilogues and activations become nodes of their own; views that undo each other
/// and casts that do nothing go; small nodes of constants become constants; equal nodes become one; what nothing needs goes.
Graph normalise(const Graph& graph);

/// The same graph whose linears over weights of such keys ask for products in fp8 (see the op), which devices make that can.
Graph multiply_in_fp8(const Graph& graph, const std::function<bool(const std::string& key)>& stored_in_fp8);

/// Where a device does what stands between two heavy ops. On a CPU the epilogue of oneDNN's matmuls and convolutions is the best
/// place: it saves a pass over memory. On a GPU an epilogue sends them to slower kernels, while a pass of our own finds their result
/// in the cache and can take the next norm too.
enum class Fusion {
  epilogues,  ///< in the epilogue of the heavy op before it
  passes,     ///< in passes of its own: pointwise, fused_norm, glu, gated_linear, linears
};

/// After partitioning, on one device's graph. Nothing moves from the prologue into the call, and what has other readers stays.
/// `epilogues`: bias, activation, products and sums that stand alone behind a linear or a convolution become its epilogue.
/// `passes`: chains of bias, activations, products and sums behind any op become a pointwise, with the norm that reads their result
/// and its modulation a fused_norm, and a product with an activated gate a glu, or with two linears before it a gated_linear. A linear
/// keeps a bias and tanh gelu that stand alone, and one of few rows any activations. Small linears of one x, and those that
/// multiply in fp8, become linears.
/// Both: silu behind a group_norm becomes its activation.
Graph fuse(const Graph& graph, Fusion fusion = Fusion::epilogues);

/// For every node: does it depend on inputs that vary with the call? The others (those that hang on prompt inputs,
/// weights and constants alone) are the prologue and run once per prompt. A fetch_weight whose readers all vary counts as
/// varying: kept from the prologue on, it would take the memory that fetching saves.
std::vector<bool> varies_per_call(const Graph& graph);

}  // namespace comfytp::graph
