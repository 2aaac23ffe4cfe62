// What fuse() knows of elementwise chains: which nodes can be steps of one, and how operands are brought into its form.
#pragma once

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "graph/graph.h"

namespace comfytp::graph {

/// One node as a step (graph/ops/steps.h), or a cast between floats, which a pass does without: it computes in f32 and takes and gives any dtype.
struct Step {
  std::string name;
  ValueId from = -1;      ///< what it is a step from, as the graph has it
  ValueId operand = -1;   ///< -1: takes none
  ValueId second = -1;    ///< rope's sines
  Shape shape;            ///< the operand's, as it broadcasts to the chain's value; of a bias empty
  std::size_t dim = 0;    ///< of a bias: the dimension of the value, as the step finds it
  std::size_t views = 0;  ///< how many of the chain's views stand before it
  std::optional<std::size_t> split;  ///< of a bias: the view that splits or merges its dimension; behind that it is a sum
  int node = -1;
};

/// Steps from one value on that nothing else reads in between, and maybe a norm among them. The views between the steps are
/// moved before all of them: they only say how the same memory is seen.
struct Chain {
  ValueId start = -1, value = -1;      ///< from where to where
  std::vector<Step> pre, post;         ///< before and behind the norm; without a norm all are in pre
  std::vector<int> views;              ///< nodes; those behind the last step are the chain's only if a norm follows
  int norm = -1;                       ///< node
  ValueId normed = -1;                 ///< what the norm reads, behind a cast that is the norm's own
  DType narrow = DType::f32;           ///< the one dtype beside f32 among the start, the operands and the results
  std::optional<std::size_t> channel;  ///< dimension of `value` along which the biases of pre are
  std::vector<int> absorbed;           ///< nodes of other chains that it does too
  bool owns_start = false;             ///< nothing else reads `start`, which runs as often as the first step
  bool gone = false;                   ///< another does its steps

  /// The node is the norm, or the cast before it that is its own.
  bool reads_normed(int node) const {
    return node == norm || (!pre.empty() && pre.back().name == "cast" && pre.back().node == node && pre.back().from == normed);
  }
  std::vector<Step>& steps() { return norm < 0 ? pre : post; }
  const std::vector<Step>& steps() const { return norm < 0 ? pre : post; }
  int last_node() const { return !post.empty() ? post.back().node : norm >= 0 ? norm : pre.back().node; }
  std::size_t views_used() const { return norm >= 0 ? views.size() : pre.empty() ? 0 : pre.back().views; }
};

/// (value + bias) * activation(gate + bias); a bias may be -1.
struct Gated {
  ValueId value = -1, gate = -1, value_bias = -1, gate_bias = -1;
  std::string activation;
  std::vector<int> absorbed;  ///< nodes that it does too
};

struct Chains {
  std::vector<Chain> chains;
  std::map<int, Gated> gated;    ///< by the node of the product
  std::map<int, int> activated;  ///< the node of a silu, and the group_norm before it
};

/// What of a graph can be done in passes, every node at most once. What a chain or product replaces can run where its last
/// node stands: its operands are there, and whoever reads its values stands behind.
Chains find_chains(const Graph& graph);

/// How many of a chain's first steps stay in the epilogue of the linear before it: a bias and tanh gelu that stand alone, which the libraries
/// can do at once, and where there are few rows any activations.
std::size_t steps_in_epilogue(const Graph& graph, const Chain& chain);

/// Made by a projection, a product, attention or a collective, seen through views: what costs more than a pass.
bool is_heavy(const Graph& graph, ValueId id);
bool is_constant(const Graph& graph, ValueId id, double value);
/// For 1 + s, s; else -1.
ValueId behind_one_plus(const Graph& graph, ValueId id);
/// f32, and f16 or bf16, which it holds exactly.
bool is_working(DType dtype);
/// What was widened to f32 to give the value, or the value itself.
ValueId widened_from(const Graph& graph, ValueId id);
/// What the value was before any casts between working dtypes.
ValueId uncast(const Graph& graph, ValueId id);
/// transpose, split_dim, merge_dims.
bool is_view(const Node& node);
/// The attributes with which a view of a value of shape `full` is applied to an operand that broadcasts to it; nothing where
/// the operand has no such view.
std::optional<Attrs> view_of_operand(const Node& view, const Shape& full, const Shape& operand);
/// Where a dimension is behind the view; nothing where it is split or merged.
std::optional<std::size_t> dim_behind(const Node& view, std::size_t dim);

/// `node`, which reads `value`, as a step of a chain whose biases are along `channel` (none yet: along any).
std::optional<Step> step_of(const Graph& graph, int node, ValueId value, std::optional<std::size_t> channel);

/// A per-channel operand as a plain [c]; `channel` is the dimension of the operand's own.
ValueId flat(Graph& g, ValueId operand, std::size_t channel);
/// The operand, or a cast of it.
ValueId as_dtype(Graph& g, ValueId operand, DType dtype);
/// With dimensions of size 1 in front.
ValueId widened(Graph& g, ValueId operand, std::size_t rank);

}  // namespace comfytp::graph
