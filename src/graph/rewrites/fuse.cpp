#include <algorithm>

#include "graph/ops/epilogue.h"
#include "graph/rewrites.h"
#include "graph/rewrites/chains.h"
#include "graph/rewrites/passes.h"

namespace comfytp::graph {
namespace {

constexpr std::size_t kMostInputs = 8;  // of a linear or convolution

// A node and those behind it that it can do itself. The fused node stands where the last of them stood, so that the
// operands are there.
struct Epilogue {
  std::size_t head = 0;
  std::size_t tail = 0;
  std::vector<std::string> steps;
  std::vector<ValueId> operands;
  bool ends_in_activation() const { return !steps.empty() && !takes_operand(steps.back()); }
};

class Fuser {
 public:
  explicit Fuser(const Graph& graph)
      : graph_(graph), nodes_(graph.nodes()), uses_(graph.use_counts()), varies_(varies_per_call(graph)), chain_of_(nodes_.size(), -1) {}

  Graph run() {
    for (std::size_t i = 0; i < nodes_.size(); ++i) {
      if (const int c = best_chain(i); c >= 0)
        extend(c, i);
      else if (is_projection(nodes_[i]) || is(nodes_[i], "group_norm"))
        begin(i);
    }
    Rewriter rewriter(graph_);
    for (std::size_t i = 0; i < nodes_.size(); ++i) {
      if (chain_of_[i] < 0)
        rewriter.keep(nodes_[i]);
      else if (const Epilogue& chain = chains_[static_cast<std::size_t>(chain_of_[i])]; chain.tail == i)
        emit(rewriter, chain);
    }
    return rewriter.finish();
  }

 private:
  void begin(std::size_t i) {
    Epilogue chain{i, i, {}, {}};
    if (is_projection(nodes_[i])) chain.steps = epilogue_of(nodes_[i].attrs);
    chain_of_[i] = static_cast<int>(chains_.size());
    chains_.push_back(std::move(chain));
  }

  // The chain that node i continues, or -1. Of two, not the gate's but the gated one's, else the one that began later.
  int best_chain(std::size_t i) const {
    int best = -1;
    for (ValueId id : nodes_[i].inputs) {
      const int c = chain_of_[static_cast<std::size_t>(graph_.value(id).node)];
      if (c < 0 || step_of(c, i).empty()) continue;
      const auto rank = [&](int k) {
        const Epilogue& chain = chains_[static_cast<std::size_t>(k)];
        return std::pair(!chain.ends_in_activation(), chain.head);
      };
      if (best < 0 || rank(c) > rank(best)) best = c;
    }
    return best;
  }

  // The other operand of a step of two.
  ValueId operand(const Epilogue& chain, std::size_t i) const {
    const auto& in = nodes_[i].inputs;
    return in[in[0] == nodes_[chain.tail].outputs[0] ? 1 : 0];
  }

  // What node i is as a step of the chain; empty if it cannot be one.
  std::string step_of(int c, std::size_t i) const {
    const Epilogue& chain = chains_[static_cast<std::size_t>(c)];
    const Node &head = nodes_[chain.head], &node = nodes_[i];
    const ValueId value = nodes_[chain.tail].outputs[0];
    const std::string step(node.op->name());
    // A prologue's node that became a call's would run in every call.
    if (std::find(node.inputs.begin(), node.inputs.end(), value) == node.inputs.end() || uses_[static_cast<std::size_t>(value)] != 1 ||
        varies_[i] != varies_[chain.head])
      return {};
    if (is(head, "group_norm")) return step == "silu" && head.attrs.text_or("activation", "").empty() && chain.steps.empty() ? step : "";
    if (activates_epilogue(step)) return step;
    if ((step != "add" && step != "mul") || head.inputs.size() + chain.operands.size() >= kMostInputs) return {};
    const Shape &shape = graph_.type(value).shape, &other = graph_.type(operand(chain, i)).shape;
    if (other == shape) return step;
    return step == "add" && is_per_channel(other, shape, channel_dim(graph_, head)) ? "bias" : "";
  }

  void extend(int c, std::size_t i) {
    Epilogue& chain = chains_[static_cast<std::size_t>(c)];
    const std::string step = step_of(c, i);
    if (takes_operand(step)) chain.operands.push_back(operand(chain, i));
    chain.steps.push_back(step);
    chain.tail = i;
    chain_of_[i] = c;
  }

  void emit(Rewriter& rewriter, const Epilogue& chain) const {
    const Node& head = nodes_[chain.head];
    auto inputs = rewriter.mapped(head.inputs);
    Attrs attrs = head.attrs;
    if (is(head, "group_norm")) {
      if (!chain.steps.empty()) attrs.set("activation", chain.steps[0]);
    } else if (!chain.steps.empty()) {
      const auto given = epilogue_of(head.attrs).size();
      std::size_t next = 0;
      std::string list;
      for (std::size_t s = 0; s < chain.steps.size(); ++s) {
        list.append(s ? "," : "").append(chain.steps[s]);
        if (s < given || !takes_operand(chain.steps[s])) continue;
        const ValueId operand = chain.operands[next++], mapped = rewriter.mapped({operand})[0];
        const std::size_t skip = graph_.type(head.outputs[0]).shape.size() - graph_.type(operand).shape.size();
        inputs.push_back(chain.steps[s] == "bias" ? flat(rewriter.target, mapped, channel_dim(graph_, head) - skip) : mapped);
      }
      attrs.set("epilogue", list);
    }
    const auto outputs = rewriter.target.add_node(*head.op, inputs, attrs, head.name);
    rewriter.map[static_cast<std::size_t>(nodes_[chain.tail].outputs[0])] = outputs[0];
  }

  const Graph& graph_;
  const std::vector<Node>& nodes_;
  std::vector<int> uses_;
  std::vector<bool> varies_;
  std::vector<Epilogue> chains_;
  std::vector<int> chain_of_;
};

}  // namespace

Graph fuse(const Graph& graph, Fusion fusion) {
  const Graph needed = prune(graph);  // a reader that nobody needs is no reason to keep a value
  return fusion == Fusion::passes ? fuse_into_passes(needed) : Fuser(needed).run();
}

}  // namespace comfytp::graph
