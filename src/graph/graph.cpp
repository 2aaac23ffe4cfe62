#include "graph/graph.h"

#include <set>

#include "base/error.h"

namespace comfytp::graph {

std::vector<ValueId> Graph::add_node(const Op& op, std::vector<ValueId> inputs, Attrs attrs, std::string name) {
  std::vector<Type> in;
  for (ValueId id : inputs) {
    require(id >= 0 && static_cast<std::size_t>(id) < values_.size(), "[graph] expected an earlier value as input of {} '{}' but got %{}",
            op.name(), name, id);
    in.push_back(type(id));
  }
  std::vector<Type> out;
  try {
    out = op.infer(attrs, in);
    for (const auto& t : out) expect_shape(op.name(), t.shape);
  } catch (const Error& e) {
    if (name.empty()) throw;
    fail("{} (at '{}')", e.what(), name);
  }
  Node node{&op, std::move(attrs), std::move(inputs), {}, std::move(name)};
  for (auto& t : out) {
    node.outputs.push_back(static_cast<ValueId>(values_.size()));
    values_.push_back({std::move(t), static_cast<std::int32_t>(nodes_.size())});
  }
  nodes_.push_back(std::move(node));
  return nodes_.back().outputs;
}

ValueId Graph::add(std::string_view op, std::vector<ValueId> inputs, Attrs attrs, std::string name) {
  const auto out = add_node(find_op(op), std::move(inputs), std::move(attrs), std::move(name));
  require(out.size() == 1, "[graph] expected '{}' to have one output but it has {}", op, out.size());
  return out[0];
}

void Graph::add_output(std::string name, ValueId value) { outputs_.push_back({std::move(name), value}); }

OpContext Graph::context(const Node& node) const {
  OpContext op{node.attrs, {}, {}};
  for (ValueId id : node.inputs) op.in.push_back(type(id));
  for (ValueId id : node.outputs) op.out.push_back(type(id));
  return op;
}

std::vector<const Node*> Graph::all(std::string_view op) const {
  std::vector<const Node*> found;
  for (const auto& node : nodes_)
    if (is(node, op)) found.push_back(&node);
  return found;
}

std::vector<int> Graph::use_counts() const {
  std::vector<int> uses(values_.size(), 0);
  for (const auto& node : nodes_)
    for (ValueId id : node.inputs) ++uses[static_cast<std::size_t>(id)];
  for (const auto& output : outputs_) ++uses[static_cast<std::size_t>(output.value)];
  return uses;
}

bool is(const Node& node, std::string_view op) { return node.op->name() == op; }

bool is_input_part(const Node& node) { return is(node, "input") && node.attrs.has("offset"); }

void verify(const Graph& graph) {
  std::set<std::string> names;
  for (const auto& node : graph.nodes()) {
    const auto op = graph.context(node);
    for (ValueId id : node.inputs)
      require(id < node.outputs.front(), "[verify] {} '{}' reads %{} before it is made", node.op->name(), node.name, id);
    require(node.op->infer(node.attrs, op.in) == op.out, "[verify] {} '{}' states types that its rule does not give",
            node.op->name(), node.name);
    if (is(node, "input") && !is_input_part(node))
      require(names.insert("in " + node.attrs.text("name")).second, "[verify] expected one input '{}' but got two", node.attrs.text("name"));
  }
  for (const auto& output : graph.outputs()) {
    require(output.value >= 0 && static_cast<std::size_t>(output.value) < graph.value_count(),
            "[verify] output '{}' names no value", output.name);
    require(names.insert("out " + output.name).second, "[verify] expected one output '{}' but got two", output.name);
  }
}

Graph prune(const Graph& graph) {
  std::vector<bool> needed(graph.value_count(), false);
  for (const auto& output : graph.outputs()) needed[static_cast<std::size_t>(output.value)] = true;
  const auto& nodes = graph.nodes();
  std::vector<bool> keep(nodes.size(), false);
  for (std::size_t i = nodes.size(); i-- > 0;) {
    bool wanted = nodes[i].op->collective() || is(nodes[i], "input");
    for (ValueId id : nodes[i].outputs) wanted = wanted || needed[static_cast<std::size_t>(id)];
    if (!wanted) continue;
    keep[i] = true;
    for (ValueId id : nodes[i].inputs) needed[static_cast<std::size_t>(id)] = true;
  }
  Rewriter copy(graph);
  for (std::size_t i = 0; i < nodes.size(); ++i)
    if (keep[i]) copy.keep(nodes[i]);
  for (const auto& output : graph.outputs()) copy.target.add_output(output.name, copy.map[static_cast<std::size_t>(output.value)]);
  return std::move(copy.target);
}

std::vector<ValueId> Rewriter::mapped(const std::vector<ValueId>& values) const {
  std::vector<ValueId> result;
  for (ValueId id : values) result.push_back(map[static_cast<std::size_t>(id)]);
  return result;
}

void Rewriter::keep(const Node& node) {
  const auto outputs = target.add_node(*node.op, mapped(node.inputs), node.attrs, node.name);
  for (std::size_t i = 0; i < outputs.size(); ++i) map[static_cast<std::size_t>(node.outputs[i])] = outputs[i];
}

Graph Rewriter::finish() {
  for (const auto& output : source.outputs()) target.add_output(output.name, map[static_cast<std::size_t>(output.value)]);
  Graph result = prune(target);
  verify(result);
  return result;
}

}  // namespace comfytp::graph
