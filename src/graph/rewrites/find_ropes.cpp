#include <map>
#include <tuple>

#include "graph/rewrites/chains.h"
#include "graph/rewrites/passes.h"
#include "graph/rewrites/rope_patterns.h"

namespace comfytp::graph {
namespace {

// Writes a rope as a step, in parts where its value is a concat: each part can then go on in the pass that makes it.
class RopeWriter {
 public:
  RopeWriter(const Graph& graph, Graph& target, std::vector<ValueId>& map) : graph_(graph), g_(target), map_(map) {}

  // `result` is the node's own value or a cast of it.
  ValueId write(const Rope& rope, const Type& turned, const Type& result, const std::string& name) {
    const Node& split = graph_.producer(rope.pairs);
    Ints sizes = split.attrs.ints("sizes");
    if (rope.columns) {
      sizes.clear();
    } else {
      sizes.pop_back();
      sizes.back() *= 2;
    }
    const auto rank = turned.shape.size();
    const auto dim = split.attrs.integer("dim");
    const auto part = [&](ValueId x, ValueId cos, ValueId sin) {
      if (sizes.size() > 1) x = g_.add("split_dim", {x}, {{"dim", dim}, {"sizes", sizes}}, name);
      const ValueId y = g_.add("pointwise", {as_dtype(g_, x, turned.dtype), cos, sin}, {{"steps", std::string("rope")}}, name);
      return as_dtype(g_, y, result.dtype);
    };
    const auto mapped = [&](ValueId id) { return map_[static_cast<std::size_t>(id)]; };
    const auto [cosines, sines] = rope.columns ? angles_of(rope, name) : std::pair(mapped(rope.cos), mapped(rope.sin));
    const ValueId cos = widened(g_, cosines, rank), sin = widened(g_, sines, rank);
    const ValueId source = uncast(graph_, split.inputs[0]);
    const Node& concat = graph_.producer(source);
    if (!is(concat, "concat") || concat.attrs.integer("dim") >= dim) return part(map_[static_cast<std::size_t>(source)], cos, sin);
    const auto along = concat.attrs.integer("dim");
    std::vector<ValueId> parts;
    std::int64_t at = 0;
    for (ValueId id : concat.inputs) {
      const auto size = graph_.type(id).shape[static_cast<std::size_t>(along)];
      const auto cut = [&](ValueId table) {
        const auto d = static_cast<std::size_t>(along);
        if (g_.type(table).shape[d] == 1) return table;
        const auto [known, fresh] = parts_.try_emplace({table, at, size}, -1);
        if (fresh) known->second = part_of(g_, table, d, at, at + size);
        return known->second;
      };
      parts.push_back(part(map_[static_cast<std::size_t>(id)], cut(cos), cut(sin)));
      at += size;
    }
    return g_.add("concat", parts, {{"dim", along}}, name);
  }

 private:
  // A matrix's columns (a, b) and (c, d) make of a pair a*x0 + c*x1 and b*x0 + d*x1: by the cosines (a, d) and the sines (-c, b).
  std::pair<ValueId, ValueId> angles_of(const Rope& rope, const std::string& name) {
    const auto [known, fresh] = angles_.try_emplace({rope.cos, rope.sin});
    if (!fresh) return known->second;
    const ValueId columns[] = {map_[static_cast<std::size_t>(rope.cos)], map_[static_cast<std::size_t>(rope.sin)]};
    const auto last = g_.type(columns[0]).shape.size() - 1;
    const auto row = [&](int column, std::int64_t which) { return part_of(g_, columns[column], last, which, which + 1); };
    const auto side_by_side = [&](ValueId first, ValueId second) {
      const auto dim = static_cast<std::int64_t>(last);
      return g_.add("merge_dims", {g_.add("concat", {first, second}, {{"dim", dim}}, name)}, {{"dim", dim - 1}, {"count", std::int64_t{2}}}, name);
    };
    const ValueId cosines = side_by_side(row(0, 0), row(1, 1));
    const ValueId sines = side_by_side(g_.add("neg", {row(1, 0)}, {}, name), row(0, 1));
    return known->second = {cosines, sines};
  }

  const Graph& graph_;
  Graph& g_;
  std::vector<ValueId>& map_;
  std::map<std::pair<ValueId, ValueId>, std::pair<ValueId, ValueId>> angles_;  // by the columns in graph_
  std::map<std::tuple<ValueId, std::int64_t, std::int64_t>, ValueId> parts_;                    // of the tables in g_
};

}  // namespace

std::optional<Graph> find_ropes(const Graph& graph) {
  const auto uses = graph.use_counts();
  std::map<ValueId, Rope> found;  // by the value that turned
  for (const auto& node : graph.nodes())
    if (const auto rope = rope_at(graph, node)) found[node.outputs[0]] = *rope;
  if (found.empty()) return {};
  Rewriter rewriter(graph);
  RopeWriter writer(graph, rewriter.target, rewriter.map);
  for (const auto& node : graph.nodes()) {
    const auto turned = is(node, "cast") ? found.find(node.inputs[0]) : found.find(node.outputs[0]);
    const bool cast = is(node, "cast") && turned != found.end() && uses[static_cast<std::size_t>(node.inputs[0])] == 1;
    if (turned == found.end() || (is(node, "cast") && !cast)) {
      rewriter.keep(node);
      continue;
    }
    const Type &own = graph.type(turned->first), &result = graph.type(node.outputs[0]);
    rewriter.map[static_cast<std::size_t>(node.outputs[0])] = writer.write(turned->second, own, result, node.name);
  }
  return rewriter.finish();
}

}  // namespace comfytp::graph
