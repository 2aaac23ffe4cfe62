#include "graph/rewrites/chains.h"

#include <algorithm>

#include "graph/ops/steps.h"
#include "graph/rewrites/passes.h"

namespace comfytp::graph {
namespace {

// With the rank of `full` where it broadcasts to it, and nothing else does.
std::optional<Shape> broadcast(const Graph& graph, ValueId operand, const Shape& full) {
  Shape shape = graph.type(operand).shape;
  if (shape.size() > full.size() || (shape.empty() && !full.empty() && !is(graph.producer(operand), "constant"))) return {};
  shape.insert(shape.begin(), full.size() - shape.size(), 1);
  for (std::size_t d = 0; d < full.size(); ++d)
    if (shape[d] != full[d] && shape[d] != 1) return {};
  return shape;
}

std::optional<std::size_t> channel_of(const Graph& graph, ValueId value, ValueId operand, std::optional<std::size_t> known) {
  const Shape &full = graph.type(value).shape, &shape = graph.type(operand).shape;
  std::vector<std::size_t> candidates;
  if (known)
    candidates = {*known};
  else if (const Node& producer = graph.producer(value); is_projection(producer))
    candidates = {channel_dim(graph, producer)};
  else
    for (std::size_t d = full.size(); d-- > 0;) candidates.push_back(d);
  for (std::size_t d : candidates)
    if (is_per_channel(shape, full, d)) return d;
  return {};
}

}  // namespace

bool is_heavy(const Graph& graph, ValueId id) {
  const Node* node = &graph.producer(id);
  while (is_view(*node)) node = &graph.producer(node->inputs[0]);
  return is_heavy(*node) || (node->op->collective() && !is(*node, "fetch_weight"));
}

bool is_constant(const Graph& graph, ValueId id, double value) {
  const Node& node = graph.producer(id);
  if (!is(node, "constant")) return false;
  const auto& values = node.attrs.reals("values");
  return std::all_of(values.begin(), values.end(), [&](double v) { return v == value; });
}

ValueId behind_one_plus(const Graph& graph, ValueId id) {
  const Node& node = graph.producer(id);
  if (!is(node, "add")) return -1;
  for (int i : {0, 1})
    if (is_constant(graph, node.inputs[i], 1) && graph.type(node.inputs[1 - i]) == graph.type(id)) return node.inputs[1 - i];
  return -1;
}

bool is_working(DType dtype) { return dtype == DType::f32 || dtype == DType::f16 || dtype == DType::bf16; }

ValueId widened_from(const Graph& graph, ValueId id) {
  const Node& cast = graph.producer(id);
  if (!is(cast, "cast") || graph.type(id).dtype != DType::f32) return id;
  const DType from = graph.type(cast.inputs[0]).dtype;
  return from == DType::f16 || from == DType::bf16 ? cast.inputs[0] : id;
}

ValueId uncast(const Graph& graph, ValueId id) {
  for (;;) {
    const Node& cast = graph.producer(id);
    if (!is(cast, "cast") || !is_working(graph.type(id).dtype) || !is_working(graph.type(cast.inputs[0]).dtype)) return id;
    id = cast.inputs[0];
  }
}

bool is_view(const Node& node) { return is(node, "transpose") || is(node, "split_dim") || is(node, "merge_dims"); }

std::optional<Attrs> view_of_operand(const Node& view, const Shape& full, const Shape& operand) {
  if (is(view, "transpose")) return view.attrs;
  const auto dim = static_cast<std::size_t>(view.attrs.integer("dim"));
  if (is(view, "split_dim")) {
    if (operand[dim] == full[dim]) return view.attrs;
    Attrs attrs = view.attrs;
    attrs.set("sizes", Ints(view.attrs.ints("sizes").size(), 1));
    return attrs;
  }
  bool whole = true, ones = true;
  for (std::size_t d = dim; d < dim + static_cast<std::size_t>(view.attrs.integer("count")); ++d) {
    whole = whole && operand[d] == full[d];
    ones = ones && operand[d] == 1;
  }
  if (whole || ones) return view.attrs;
  return {};
}

std::optional<std::size_t> dim_behind(const Node& view, std::size_t dim) {
  if (is(view, "transpose")) {
    const auto& order = view.attrs.ints("order");
    return static_cast<std::size_t>(std::find(order.begin(), order.end(), static_cast<std::int64_t>(dim)) - order.begin());
  }
  const auto at = static_cast<std::size_t>(view.attrs.integer("dim"));
  const bool split = is(view, "split_dim");
  const auto many = split ? view.attrs.ints("sizes").size() : static_cast<std::size_t>(view.attrs.integer("count"));
  const auto before = split ? 1 : many, behind = split ? many : 1;
  if (dim < at) return dim;
  if (dim >= at + before) return dim + behind - before;
  return {};
}

std::optional<Step> step_of(const Graph& graph, int index, ValueId value, std::optional<std::size_t> channel) {
  const Node& node = graph.nodes()[static_cast<std::size_t>(index)];
  const Type& type = graph.type(value);
  if (!is_float(type.dtype) || node.outputs.size() != 1 || graph.type(node.outputs[0]) != type) return {};
  Step step;
  step.name = node.op->name();
  step.node = index;
  step.from = value;
  if (step.name == "pointwise") {  // what find_ropes() makes
    if (node.attrs.text("steps") != "rope" || node.inputs[0] != value) return {};
    step.name = "rope";
    step.operand = node.inputs[1];
    step.second = node.inputs[2];
    return step;
  }
  if (is_activation(step.name)) return step;
  if (step.name != "add" && step.name != "mul") return {};
  step.operand = node.inputs[node.inputs[0] == value ? 1 : 0];
  if (const auto d = step.name == "add" ? channel_of(graph, value, step.operand, channel) : std::nullopt) {
    step.name = "bias";
    step.dim = *d;
    return step;
  }
  const auto shape = broadcast(graph, step.operand, type.shape);
  if (!shape) return {};
  step.shape = *shape;
  return step;
}

ValueId flat(Graph& g, ValueId operand, std::size_t channel) {
  const std::size_t rank = g.type(operand).shape.size();
  if (rank == 1) return operand;
  const Node node = g.producer(operand);
  bool only_ones = is(node, "weight");
  for (std::size_t d = 0; only_ones && d < rank; ++d) only_ones = d == channel || node.attrs.ints("full")[d] == 1;
  if (!only_ones) return g.add("merge_dims", {operand}, {{"dim", std::int64_t{0}}, {"count", static_cast<std::int64_t>(rank)}});
  Attrs attrs = node.attrs;
  for (const char* name : {"full", "offset", "shape"}) attrs.set(name, Ints{attrs.ints(name)[channel]});
  return g.add("weight", {}, attrs, node.name);
}

ValueId as_dtype(Graph& g, ValueId operand, DType dtype) {
  if (g.type(operand).dtype == dtype) return operand;
  return g.add("cast", {operand}, {{"dtype", std::string(name_of(dtype))}}, g.producer(operand).name);
}

ValueId widened(Graph& g, ValueId operand, std::size_t rank) {
  const Shape shape = g.type(operand).shape;
  if (shape.size() == rank) return operand;
  const Node node = g.producer(operand);
  const auto in_front = [&](Ints sizes, std::int64_t fill) {
    sizes.insert(sizes.begin(), rank - shape.size(), fill);
    return sizes;
  };
  Attrs attrs = node.attrs;
  if (is(node, "weight")) {
    for (const auto& [name, fill] : {std::pair{"full", 1}, {"offset", 0}, {"shape", 1}}) attrs.set(name, in_front(attrs.ints(name), fill));
    return g.add("weight", {}, attrs, node.name);
  }
  if (is(node, "constant")) {
    attrs.set("shape", in_front(attrs.ints("shape"), 1));
    return g.add("constant", {}, attrs, node.name);
  }
  return g.add("split_dim", {operand}, {{"dim", std::int64_t{0}}, {"sizes", in_front({shape[0]}, 1)}});
}

}  // namespace comfytp::graph
