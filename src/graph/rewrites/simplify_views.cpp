#include <algorithm>
#include <numeric>

#include "graph/rewrites/passes.h"

namespace comfytp::graph {
namespace {

// Makes the views of one node, each in its simplest form given what its input is made by.
class Views {
 public:
  Views(Graph& g, const std::string& name) : g_(g), name_(name) {}

  ValueId transpose(ValueId x, Ints order) {
    if (const Node& before = g_.producer(x); is(before, "transpose")) {
      for (auto& d : order) d = before.attrs.ints("order")[static_cast<std::size_t>(d)];
      return transpose(before.inputs[0], order);
    }
    if (std::is_sorted(order.begin(), order.end())) return x;
    return g_.add("transpose", {x}, {{"order", std::move(order)}}, name_);
  }

  ValueId split(ValueId x, std::int64_t dim, Ints sizes) {
    if (sizes.size() == 1) return x;
    const Node& before = g_.producer(x);
    if (is(before, "merge_dims") && before.attrs.integer("dim") == dim) {
      const Shape& shape = g_.type(before.inputs[0]).shape;
      const auto first = shape.begin() + dim;
      if (sizes == Ints(first, first + before.attrs.integer("count"))) return before.inputs[0];
    }
    if (is(before, "split_dim")) {
      Ints all = before.attrs.ints("sizes");
      const auto at = dim - before.attrs.integer("dim");
      if (at >= 0 && at < static_cast<std::int64_t>(all.size())) {
        all.insert(all.erase(all.begin() + at), sizes.begin(), sizes.end());
        return split(before.inputs[0], before.attrs.integer("dim"), all);
      }
    }
    return g_.add("split_dim", {x}, {{"dim", dim}, {"sizes", std::move(sizes)}}, name_);
  }

  ValueId merge(ValueId x, std::int64_t dim, std::int64_t count) {
    if (count == 1) return x;
    const Node& before = g_.producer(x);
    if (is(before, "split_dim")) {
      Ints sizes = before.attrs.ints("sizes");
      const auto at = dim - before.attrs.integer("dim");
      if (at >= 0 && at + count <= static_cast<std::int64_t>(sizes.size())) {
        const auto first = sizes.begin() + at;
        *first = std::accumulate(first, first + count, std::int64_t{1}, std::multiplies<>());
        sizes.erase(first + 1, first + count);
        return split(before.inputs[0], before.attrs.integer("dim"), sizes);
      }
    }
    if (is(before, "merge_dims")) {
      const auto at = before.attrs.integer("dim"), inner = before.attrs.integer("count");
      if (at >= dim && at < dim + count) return merge(before.inputs[0], dim, count + inner - 1);
    }
    return g_.add("merge_dims", {x}, {{"dim", dim}, {"count", count}}, name_);
  }

  // A slice moves towards what makes its input, where a merged projection can be told apart.
  ValueId slice(ValueId x, std::int64_t dim, Interval part) {
    if (part == Interval{0, g_.type(x).shape[static_cast<std::size_t>(dim)]}) return x;
    const Node before = g_.producer(x);
    if (is(before, "slice") && before.attrs.integer("dim") == dim && before.attrs.integer_or("step", 1) == 1) {
      const auto start = before.attrs.integer("start");
      return slice(before.inputs[0], dim, {start + part.lo, start + part.hi});
    }
    if (is(before, "transpose")) {
      const auto& order = before.attrs.ints("order");
      return transpose(slice(before.inputs[0], order[static_cast<std::size_t>(dim)], part), order);
    }
    if (is(before, "split_dim")) {
      Ints sizes = before.attrs.ints("sizes");
      const auto from = before.attrs.integer("dim"), at = dim - from, count = static_cast<std::int64_t>(sizes.size());
      if (at < 0 || at >= count) return split(slice(before.inputs[0], at < 0 ? dim : dim - count + 1, part), from, sizes);
      if (at == 0) {
        const auto inner = std::accumulate(sizes.begin() + 1, sizes.end(), std::int64_t{1}, std::multiplies<>());
        sizes[0] = part.size();
        return split(slice(before.inputs[0], from, {part.lo * inner, part.hi * inner}), from, sizes);
      }
    }
    return g_.add("slice", {x}, {{"dim", dim}, {"start", part.lo}, {"stop", part.hi}}, name_);
  }

  // Slices of one value that stand side by side as they did in it are one slice; -1 where there are none such. Those that somebody else reads stay:
  // what makes the value may be cut where they begin. `own[i]`: nobody else reads part i.
  ValueId concat(const std::vector<ValueId>& parts, const std::vector<bool>& own, std::int64_t dim) {
    struct Piece {
      ValueId of;
      Interval part;
    };
    std::vector<Piece> pieces;
    for (std::size_t i = 0; i < parts.size(); ++i) {
      const ValueId id = parts[i];
      const Node& node = g_.producer(id);
      const bool cut = own[i] && is(node, "slice") && node.attrs.integer("dim") == dim && node.attrs.integer_or("step", 1) == 1;
      const Piece piece = cut ? Piece{node.inputs[0], {node.attrs.integer("start"), node.attrs.integer("stop")}}
                              : Piece{id, {0, g_.type(id).shape[static_cast<std::size_t>(dim)]}};
      if (!pieces.empty() && pieces.back().of == piece.of && pieces.back().part.hi == piece.part.lo)
        pieces.back().part.hi = piece.part.hi;
      else
        pieces.push_back(piece);
    }
    if (pieces.size() == parts.size() && pieces.size() > 1) return -1;
    std::vector<ValueId> joined;
    for (const auto& piece : pieces) joined.push_back(slice(piece.of, dim, piece.part));
    return joined.size() == 1 ? joined[0] : g_.add("concat", joined, {{"dim", dim}}, name_);
  }

 private:
  Graph& g_;
  const std::string& name_;
};

// The node's value, of `type`, in its simplest form; -1 where the node is none of those simplified here. `uses`: of the values before.
ValueId simplified(Graph& g, const Node& node, const std::vector<ValueId>& in, const std::vector<int>& uses, const Type& type) {
  Views views(g, node.name);
  const auto& a = node.attrs;
  if (is(node, "transpose")) return views.transpose(in[0], a.ints("order"));
  if (is(node, "split_dim")) return views.split(in[0], a.integer("dim"), a.ints("sizes"));
  if (is(node, "merge_dims")) return views.merge(in[0], a.integer("dim"), a.integer("count"));
  if (is(node, "slice") && a.integer_or("step", 1) == 1) return views.slice(in[0], a.integer("dim"), {a.integer("start"), a.integer("stop")});
  if (is(node, "concat")) {
    std::vector<bool> own;
    for (ValueId id : node.inputs) own.push_back(uses[static_cast<std::size_t>(id)] == 1);
    return views.concat(in, own, a.integer("dim"));
  }
  if ((is(node, "expand") || is(node, "pad")) && g.type(in[0]).shape == type.shape) return in[0];
  if (is(node, "cast") && type.dtype == g.type(in[0]).dtype) return in[0];
  return -1;
}

}  // namespace

std::optional<Graph> simplify_views(const Graph& graph) {
  const auto uses = graph.use_counts();
  bool changed = false;
  Rewriter rewriter(graph);
  Graph& g = rewriter.target;
  for (const auto& node : graph.nodes()) {
    const auto inputs = rewriter.mapped(node.inputs);
    const ValueId value = simplified(g, node, inputs, uses, graph.type(node.outputs[0]));
    if (value < 0) {
      rewriter.keep(node);
      continue;
    }
    rewriter.map[static_cast<std::size_t>(node.outputs[0])] = value;
    const Node& made = g.producer(value);
    changed = changed || made.op != node.op || made.attrs != node.attrs || made.inputs != inputs;
  }
  if (!changed) return {};
  return rewriter.finish();
}

}  // namespace comfytp::graph
