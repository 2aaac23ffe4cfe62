#include "graph/rewrites/rope_patterns.h"

#include <array>
#include <utility>
#include <vector>

#include "graph/ops/steps.h"
#include "graph/rewrites/chains.h"
#include "graph/rewrites/passes.h"

namespace comfytp::graph {
namespace {

// A half of a value's pairs of neighbours: `first` or second of each. `pairs` is the value with its last dimension split in pairs.
struct Half {
  ValueId pairs = -1;
  bool first = true;
  bool operator==(const Half&) const = default;
};

// sign * half * factor; without a factor -1.
struct Term {
  Half half;
  ValueId factor = -1;
  double sign = 1;
};

class Ropes {
 public:
  explicit Ropes(const Graph& graph) : graph_(graph) {}

  std::optional<Rope> at(const Node& node) const {
    auto rope = is(node, "merge_dims") ? of_halves(node) : is(node, "add") ? of_turned(node) : std::nullopt;
    if (!rope && is(node, "merge_dims")) rope = of_matrices(node);
    if (!rope || !agree(graph_.type(node.outputs[0]).dtype, graph_.type(rope->cos).dtype)) return {};
    if (shape(node.outputs[0]) != (rope->columns ? shape(by(rope->pairs).inputs[0]) : whole(rope->pairs))) return {};
    return rope;
  }

 private:
  const Node& by(ValueId id) const { return graph_.producer(id); }
  const Shape& shape(ValueId id) const { return graph_.type(id).shape; }
  ValueId uncast(ValueId id) const { return comfytp::graph::uncast(graph_, id); }

  // One dtype, or one of them is f32: what a step takes.
  static bool agree(DType a, DType b) { return is_working(a) && is_working(b) && (a == b || a == DType::f32 || b == DType::f32); }

  // The shape of what was split in pairs.
  Shape whole(ValueId pairs) const {
    Shape whole = shape(pairs);
    whole.pop_back();
    whole.back() *= 2;
    return whole;
  }

  // A view with one more dimension, of size 1, behind the last.
  bool opens(const Node& node) const {
    return is(node, "split_dim") && node.attrs.ints("sizes").size() == 2 && node.attrs.ints("sizes")[1] == 1 &&
           node.attrs.integer("dim") + 2 == static_cast<std::int64_t>(shape(node.outputs[0]).size());
  }

  // The views with a last dimension of size 1 more or less, and casts.
  ValueId bare(ValueId id) const {
    for (;;) {
      id = uncast(id);
      const Node& node = by(id);
      const bool adds = opens(node);
      const bool drops = is(node, "merge_dims") && node.attrs.integer("count") == 2 && shape(node.inputs[0]).back() == 1 &&
                         node.attrs.integer("dim") + 2 == static_cast<std::int64_t>(shape(node.inputs[0]).size());
      if (!adds && !drops) return id;
      id = node.inputs[0];
    }
  }

  std::optional<Half> half(ValueId id) const {
    const ValueId part = bare(id);
    const Node& slice = by(part);
    if (!is(slice, "slice") || slice.attrs.integer_or("step", 1) != 1 || shape(part).back() != 1) return {};
    const ValueId pairs = slice.inputs[0];
    if (slice.attrs.integer("dim") + 1 != static_cast<std::int64_t>(shape(pairs).size()) || !is_split_in_pairs(pairs)) return {};
    return Half{pairs, slice.attrs.integer("start") == 0};
  }

  bool is_split_in_pairs(ValueId id) const {
    const Node& split = by(id);
    return is(split, "split_dim") && split.attrs.ints("sizes").size() >= 2 && split.attrs.ints("sizes").back() == 2 &&
           split.attrs.integer("dim") + static_cast<std::int64_t>(split.attrs.ints("sizes").size()) == static_cast<std::int64_t>(shape(id).size());
  }

  // Appends the terms of a sum; false where it has others.
  bool terms(ValueId id, double sign, std::vector<Term>& found) const {
    id = bare(id);
    if (found.size() > 2) return false;
    if (const auto alone = half(id)) {
      found.push_back({*alone, -1, sign});
      return true;
    }
    const Node& node = by(id);
    if (is(node, "neg")) return terms(node.inputs[0], -sign, found);
    if (is(node, "add") || is(node, "sub"))
      return terms(node.inputs[0], sign, found) && terms(node.inputs[1], is(node, "sub") ? -sign : sign, found);
    if (!is(node, "mul")) return false;
    for (int i : {0, 1})
      if (const auto part = half(node.inputs[i])) {
        // The angles are along what the half is along: it may have the pairs' last dimension, of size 1, or not.
        ValueId factor = node.inputs[1 - i];
        const auto rank = shape(part->pairs).size(), own = shape(node.inputs[i]).size();
        if (own == rank) {
          const Node& view = by(uncast(factor));
          if (!opens(view)) return false;
          factor = view.inputs[0];
        } else if (own + 1 != rank) {
          return false;
        }
        found.push_back({*part, factor, sign});
        return true;
      }
    return false;
  }

  // The two values that a concat of pairs puts side by side, where the node merges these.
  std::optional<std::pair<ValueId, ValueId>> sides(ValueId id) const {
    const Node& merge = by(id);
    if (!is(merge, "merge_dims") || merge.attrs.integer("count") != 2) return {};
    const Node& concat = by(merge.inputs[0]);
    const auto rank = static_cast<std::int64_t>(shape(merge.inputs[0]).size());
    if (!is(concat, "concat") || concat.inputs.size() != 2 || concat.attrs.integer("dim") + 1 != rank || merge.attrs.integer("dim") + 2 != rank ||
        shape(concat.inputs[0]).back() != 1 || shape(concat.inputs[1]).back() != 1)
      return {};
    return std::pair(concat.inputs[0], concat.inputs[1]);
  }

  std::optional<Rope> of_halves(const Node& node) const {
    const auto both = sides(node.outputs[0]);
    std::vector<Term> left, right;
    if (!both || !terms(both->first, 1, left) || !terms(both->second, 1, right) || left.size() != 2 || right.size() != 2) return {};
    for (auto* side : {&left, &right})
      if (!(*side)[0].half.first) std::swap((*side)[0], (*side)[1]);
    const Half x0 = left[0].half, x1 = left[1].half;
    if (!x0.first || x1.first || x0.pairs != x1.pairs || right[0].half != x0 || right[1].half != x1) return {};
    if (left[0].sign != 1 || left[1].sign != -1 || right[0].sign != 1 || right[1].sign != 1) return {};
    const Rope rope{x0.pairs, left[0].factor, left[1].factor};
    if (rope.cos < 0 || rope.sin < 0 || right[1].factor != rope.cos || right[0].factor != rope.sin || !fits(rope, 2)) return {};
    return rope;
  }

  std::optional<Rope> of_turned(const Node& node) const {
    for (int i : {0, 1}) {
      const Node &plain = by(uncast(node.inputs[i])), &turned = by(uncast(node.inputs[1 - i]));
      if (!is(plain, "mul") || !is(turned, "mul")) continue;
      for (int k : {0, 1}) {
        const auto both = sides(uncast(turned.inputs[k]));
        std::vector<Term> left, right;
        if (!both || !terms(both->first, 1, left) || !terms(both->second, 1, right) || left.size() != 1 || right.size() != 1) continue;
        const Half x1 = left[0].half, x0 = right[0].half;
        if (left[0].factor >= 0 || right[0].factor >= 0 || left[0].sign != -1 || right[0].sign != 1) continue;
        if (x1.first || !x0.first || x0.pairs != x1.pairs) continue;
        for (int j : {0, 1}) {
          const Rope rope{x0.pairs, plain.inputs[1 - j], turned.inputs[1 - k]};
          if (is_whole(uncast(plain.inputs[j]), x0.pairs) && fits(rope, 1)) return rope;
        }
      }
    }
    return {};
  }

  // m[..., 0] * x0 + m[..., 1] * x1, where the columns of m have two rows for each pair: its two results, which the node puts side by side.
  std::optional<Rope> of_matrices(const Node& node) const {
    const Node& sum = by(node.inputs[0]);
    const Shape& results = shape(node.inputs[0]);
    const auto rank = results.size();
    if (!is(sum, "add") || rank < 2 || results.back() != 2) return {};
    if (node.attrs.integer("count") != 2 || node.attrs.integer("dim") + 2 != static_cast<std::int64_t>(rank)) return {};
    std::array<ValueId, 2> columns = {-1, -1};
    ValueId pairs = -1;
    for (ValueId id : sum.inputs) {
      const Node& product = by(uncast(id));
      if (!is(product, "mul")) return {};
      for (int i : {0, 1})
        if (const auto part = half(product.inputs[i])) {
          if (pairs >= 0 && part->pairs != pairs) return {};
          if (shape(product.inputs[i]).size() != rank || shape(product.inputs[i]).back() != 1) return {};
          pairs = part->pairs;
          columns[part->first ? 0 : 1] = product.inputs[1 - i];
        }
    }
    if (columns[0] < 0 || columns[1] < 0 || graph_.type(columns[0]) != graph_.type(columns[1])) return {};
    const Node& split = by(pairs);
    const Shape &x = shape(split.inputs[0]), &table = shape(columns[0]);
    if (split.attrs.integer("dim") + 1 != static_cast<std::int64_t>(x.size()) || x.size() + 1 != rank || table.size() != rank) return {};
    for (std::size_t d = 0; d < rank; ++d)
      if (table[d] != results[d] && (table[d] != 1 || d + 2 >= rank)) return {};
    return Rope{pairs, columns[0], columns[1], true};
  }

  // `id` is what `pairs` is without the last split.
  bool is_whole(ValueId id, ValueId pairs) const {
    const Node& split = by(pairs);
    Ints sizes = split.attrs.ints("sizes");
    const ValueId source = uncast(split.inputs[0]);
    if (sizes.size() == 2) return id == source;
    sizes.pop_back();
    sizes.back() *= 2;
    const Node& whole = by(id);
    return is(whole, "split_dim") && whole.attrs.integer("dim") == split.attrs.integer("dim") && whole.attrs.ints("sizes") == sizes &&
           uncast(whole.inputs[0]) == source;
  }

  // The angles broadcast over the value, and have their own number along the last dimension.
  bool fits(const Rope& rope, std::int64_t each) const {
    Shape full = whole(rope.pairs);
    full.back() /= each;
    if (graph_.type(rope.cos) != graph_.type(rope.sin)) return false;
    const Shape& angles = shape(rope.cos);
    if (angles.empty() || angles.size() > full.size() || angles.back() != full.back()) return false;
    for (std::size_t d = 0; d + 1 < angles.size(); ++d)
      if (const auto at = d + full.size() - angles.size(); angles[d] != 1 && angles[d] != full[at]) return false;
    return true;
  }

  const Graph& graph_;
};

}  // namespace

std::optional<Rope> rope_at(const Graph& graph, const Node& node) { return Ropes(graph).at(node); }

}  // namespace comfytp::graph
