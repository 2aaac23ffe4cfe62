#include <algorithm>

#include "graph/rewrites/passes.h"

namespace comfytp::graph {
namespace {

constexpr std::int64_t kMostElements = 4096;

bool is_small(const Type& type) { return numel(type.shape) >= 1 && numel(type.shape) <= kMostElements; }

RefTensor value_of(const Graph& g, ValueId constant) {
  std::vector<RefTensor> out(1, RefTensor(g.type(constant).shape));
  const Node& node = g.producer(constant);
  node.op->reference(g.context(node), {}, out);
  return out[0];
}

}  // namespace

std::optional<Graph> fold_constants(const Graph& graph) {
  bool changed = false;
  Rewriter rewriter(graph);
  Graph& g = rewriter.target;
  for (const auto& node : graph.nodes()) {
    const auto inputs = rewriter.mapped(node.inputs);
    const auto op = graph.context(node);
    // How an integer is rounded to is the device's business, so only floats are folded.
    const auto folds = [&](ValueId id) { return is(g.producer(id), "constant") && is_small(g.type(id)) && is_float(g.type(id).dtype); };
    if (inputs.empty() || node.op->collective() || op.out.size() != 1 || !is_small(op.out[0]) || !is_float(op.out[0].dtype) ||
        !std::all_of(inputs.begin(), inputs.end(), folds)) {
      rewriter.keep(node);
      continue;
    }
    changed = true;
    std::vector<RefTensor> in, out(1, RefTensor(op.out[0].shape));
    for (ValueId id : inputs) in.push_back(value_of(g, id));
    node.op->reference(op, in, out);
    rewriter.map[static_cast<std::size_t>(node.outputs[0])] =
        g.add("constant", {}, {{"shape", Ints(op.out[0].shape)}, {"values", out[0].data}, {"dtype", std::string(name_of(op.out[0].dtype))}},
              node.name);
  }
  if (!changed) return {};
  return rewriter.finish();
}

}  // namespace comfytp::graph
