#include <algorithm>

#include "graph/rewrites.h"
#include "graph/rewrites/chains.h"
#include "graph/rewrites/passes.h"

namespace comfytp::graph {
namespace {

class Gathers {
 public:
  explicit Gathers(const Graph& graph)
      : graph_(graph),
        nodes_(graph.nodes()),
        varies_(varies_per_call(graph)),
        reader_(nodes_.size(), nodes_.size()),
        aside_(nodes_.size()),
        placed_(nodes_.size()) {
    const auto read_by = readers(graph);
    for (std::size_t i = nodes_.size(); i-- > 0;)
      for (ValueId id : nodes_[i].outputs)
        for (int user : read_by[static_cast<std::size_t>(id)]) {
          if (user < 0) continue;
          const auto by = static_cast<std::size_t>(user);
          reader_[i] = std::min(reader_[i], is_view(nodes_[by]) ? reader_[by] : by);
        }
  }

  Graph run() {
    for (std::size_t begin = 0; begin < nodes_.size();) {
      const auto end = window(begin);
      arrange(begin, end);
      begin = end;
    }
    Rewriter rewriter(graph_);
    for (auto i : order_) {
      const Node& node = nodes_[i];
      if (!aside_[i]) {
        rewriter.keep(node);
        continue;
      }
      Attrs attrs = node.attrs;
      attrs.set("aside", std::int64_t{1});
      rewriter.map[static_cast<std::size_t>(node.outputs[0])] = rewriter.target.add_node(*node.op, rewriter.mapped(node.inputs), attrs, node.name)[0];
    }
    return rewriter.finish();
  }

 private:
  // Statistics of a norm are of few bytes, and read at once.
  bool is_candidate(std::size_t i) const {
    if (!is(nodes_[i], "all_gather") || !varies_[i] || reader_[i] == nodes_.size()) return false;
    const Node& from = graph_.producer(nodes_[i].inputs[0]);
    return !is(from, "row_moments") && !is(from, "group_moments");
  }

  // The nodes from `begin` on up to the first that reads a gather among them, or is another collective.
  std::size_t window(std::size_t begin) const {
    std::size_t end = begin, last = nodes_.size();
    do {
      if (is_candidate(end)) last = std::min(last, reader_[end]);
      ++end;
    } while (end < last && (!nodes_[end].op->collective() || is_candidate(end)));
    return end;
  }

  // Each gather with what it needs, then the rest.
  void arrange(std::size_t begin, std::size_t end) {
    const auto first = order_.size();
    for (std::size_t gather = begin; gather < end; ++gather) {
      if (!is_candidate(gather)) continue;
      std::vector<bool> needed(nodes_.size());
      needed[gather] = true;
      for (std::size_t i = gather + 1; i-- > begin;)
        if (needed[i])
          for (ValueId id : nodes_[i].inputs) needed[static_cast<std::size_t>(graph_.value(id).node)] = true;
      for (std::size_t i = begin; i <= gather; ++i)
        if (needed[i]) place(i);
    }
    for (std::size_t i = begin; i < end; ++i) place(i);
    bool beside = false;  // is there work for the time that a gather takes?
    for (std::size_t p = order_.size(); p-- > first;) {
      const auto i = order_[p];
      if (is_candidate(i)) aside_[i] = beside;
      beside = beside || (is_heavy(nodes_[i]) && varies_[i]);
    }
  }

  void place(std::size_t i) {
    if (!placed_[i]) order_.push_back(i);
    placed_[i] = true;
  }

  const Graph& graph_;
  const std::vector<Node>& nodes_;
  const std::vector<bool> varies_;
  std::vector<std::size_t> reader_;    // the first that reads what a node makes, views aside
  std::vector<bool> aside_, placed_;
  std::vector<std::size_t> order_;
};

}  // namespace

Graph gathers_aside(const Graph& graph) { return Gathers(graph).run(); }

}  // namespace comfytp::graph
