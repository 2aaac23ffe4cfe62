#include <algorithm>
#include <vector>

#include "graph/rewrites.h"
#include "graph/rewrites/passes.h"

namespace comfytp::graph {
namespace {

// Results of one linear up to which one matmul for several is faster than one for each: with more, each fills a GPU by itself.
constexpr std::int64_t kFew = 6 << 20;
// Rows that are multiplied as a matrix, and not one by one.
constexpr std::int64_t kLeastRows = 64;

class Joiner {
 public:
  explicit Joiner(const Graph& graph) : graph_(graph), rewriter_(graph), kept_(graph.nodes().size()), varies_(varies_per_call(graph)) {}

  std::optional<Graph> run() {
    find();
    if (groups_.empty()) return std::nullopt;
    auto group = groups_.begin();
    for (std::size_t i = 0; i < graph_.nodes().size(); ++i) {
      if (group != groups_.end() && i == group->front())
        write(*group++);
      else
        keep(i);
    }
    return rewriter_.finish();
  }

 private:
  const Node& at(std::size_t i) const { return graph_.nodes()[i]; }

  // A linear that others over its x can share something with: x rounded to fp8, or the matmul itself.
  bool joins_others(const Node& node) const {
    const auto epilogue = is(node, "linear") ? node.attrs.text_or("epilogue", "") : "none";
    if (node.attrs.has("product")) return epilogue.empty() || epilogue == "bias";
    if (!epilogue.empty() || node.inputs.size() != 2 || !is(graph_.producer(node.inputs[1]), "weight")) return false;
    const auto results = numel(graph_.type(node.outputs[0]).shape), outputs = graph_.type(node.outputs[0]).shape.back();
    return results <= kFew && results >= kLeastRows * outputs;
  }
  // Plain ones are multiplied together, by weights of one shape.
  bool alike(const Node& a, const Node& b) const {
    if (a.attrs.text_or("product", "") != b.attrs.text_or("product", "")) return false;
    return a.attrs.has("product") || graph_.type(a.inputs[1]) == graph_.type(b.inputs[1]);
  }
  std::size_t maker(ValueId id) const { return static_cast<std::size_t>(graph_.value(id).node); }

  // There before node i, or made of a weight alone, by nothing that the devices must meet for.
  bool is_there(ValueId id, std::size_t i) const {
    const std::size_t from = maker(id);
    if (from < i || is(at(from), "weight") || is(at(from), "constant")) return true;
    return at(from).inputs.size() == 1 && !at(from).op->collective() && is_there(at(from).inputs[0], i);
  }

  // They stand together, with nothing heavy and no exchange between them: so hardly anything lives longer than it did.
  void find() {
    std::vector<std::size_t> open;
    const auto close = [&] {
      if (open.size() > 1) groups_.push_back(open);
      open.clear();
    };
    for (std::size_t i = 0; i < graph_.nodes().size(); ++i) {
      const Node& node = at(i);
      if (!joins_others(node)) {
        if (is_heavy(node) || node.op->collective()) close();
        continue;
      }
      const bool joins = !open.empty() && at(open[0]).inputs[0] == node.inputs[0] && varies_[open[0]] == varies_[i] &&
                         alike(at(open[0]), node) &&
                         std::all_of(node.inputs.begin(), node.inputs.end(), [&](ValueId id) { return is_there(id, open[0]); });
      if (!joins) close();
      open.push_back(i);
    }
    close();
  }

  void keep(std::size_t i) {
    if (kept_[i]) return;
    kept_[i] = true;
    for (ValueId id : at(i).inputs) keep(maker(id));
    rewriter_.keep(at(i));
  }

  void write(const std::vector<std::size_t>& group) {
    std::vector<ValueId> inputs = {at(group[0]).inputs[0]};
    Ints biased;
    for (auto i : group) inputs.push_back(at(i).inputs[1]);
    for (auto i : group) {
      biased.push_back(at(i).inputs.size() == 3);
      if (biased.back()) inputs.push_back(at(i).inputs[2]);
      kept_[i] = true;
    }
    for (ValueId id : inputs) keep(maker(id));
    Attrs attrs = {{"biased", biased}};
    if (at(group[0]).attrs.has("product")) attrs.set("product", at(group[0]).attrs.text("product"));
    const auto outputs = rewriter_.target.add_node(find_op("linears"), rewriter_.mapped(inputs), std::move(attrs), at(group[0]).name);
    for (std::size_t k = 0; k < group.size(); ++k) rewriter_.map[static_cast<std::size_t>(at(group[k]).outputs[0])] = outputs[k];
  }

  const Graph& graph_;
  Rewriter rewriter_;
  std::vector<char> kept_;
  std::vector<bool> varies_;
  std::vector<std::vector<std::size_t>> groups_;
};

}  // namespace

std::optional<Graph> join_linears(const Graph& graph) { return Joiner(graph).run(); }

}  // namespace comfytp::graph
