// The graph: values in static single assignment, each with a static type, and the ops that make them.
#pragma once

#include <string>
#include <vector>

#include "graph/op.h"

namespace comfytp::graph {

struct Node {
  const Op* op = nullptr;
  Attrs attrs;
  std::vector<ValueId> inputs;
  std::vector<ValueId> outputs;
  std::string name;  ///< where it stands in the model, for messages and profiles; may be empty
};

struct Value {
  Type type;
  std::int32_t node = -1;  ///< the node that makes it
};

struct Output {
  std::string name;
  ValueId value = -1;
};

/// Nodes stand in an order in which they can run. Values are numbered as they are made.
class Graph {
 public:
  /// Appends a node; its output types are inferred. Throws Error naming the op and the node.
  std::vector<ValueId> add_node(const Op& op, std::vector<ValueId> inputs, Attrs attrs = {}, std::string name = {});
  /// The same for an op with one output.
  ValueId add(std::string_view op, std::vector<ValueId> inputs, Attrs attrs = {}, std::string name = {});
  void add_output(std::string name, ValueId value);

  const std::vector<Node>& nodes() const { return nodes_; }
  const std::vector<Output>& outputs() const { return outputs_; }
  std::size_t value_count() const { return values_.size(); }
  const Value& value(ValueId id) const { return values_[static_cast<std::size_t>(id)]; }
  const Type& type(ValueId id) const { return value(id).type; }
  const Node& producer(ValueId id) const { return nodes_[static_cast<std::size_t>(value(id).node)]; }
  /// The op's view of a node.
  OpContext context(const Node& node) const;
  /// Nodes of the ops "input" and "weight", in order.
  std::vector<const Node*> all(std::string_view op) const;
  /// How often each value is read, graph outputs included.
  std::vector<int> use_counts() const;

 private:
  std::vector<Node> nodes_;
  std::vector<Value> values_;
  std::vector<Output> outputs_;
};

bool is(const Node& node, std::string_view op);

/// A device's input, which is a part of the whole: there may be several of one name, and on one device of several they may be the same part.
bool is_input_part(const Node& node);

/// Checks what add_node cannot know: that every type is what the op infers, that operands come before their use, names of
/// inputs and outputs are unique. Throws Error naming the node.
void verify(const Graph& graph);

/// The same graph without what no output needs. Collectives and inputs stay.
Graph prune(const Graph& graph);

/// Builds a new graph from an old one, node by node; a rewrite overrides what it changes.
class Rewriter {
 public:
  explicit Rewriter(const Graph& source) : source(source), map(source.value_count(), -1) {}
  /// The inputs of a node in the new graph.
  std::vector<ValueId> mapped(const std::vector<ValueId>& values) const;
  /// Copies a node as it is.
  void keep(const Node& node);
  /// Copies the outputs and returns the new graph, pruned and verified.
  Graph finish();

  const Graph& source;
  Graph target;
  std::vector<ValueId> map;  ///< old value -> new value, -1 while there is none
};

}  // namespace comfytp::graph
