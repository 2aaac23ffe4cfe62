#include <algorithm>
#include <set>

#include "graph/ops/steps.h"
#include "graph/rewrites/chains.h"
#include "graph/rewrites/passes.h"

namespace comfytp::graph {
namespace {

// Writes a graph anew with the chains that were found in it.
class PassWriter {
 public:
  PassWriter(const Graph& graph, const Chains& found) : graph_(graph), found_(found), readers_(readers(graph)), rewriter_(graph), g_(rewriter_.target) {}

  Graph run() {
    for (const auto& chain : found_.chains)
      if (!chain.gone) plan(chain);
    for (const auto& [product, gated] : found_.gated) done_.insert(gated.absorbed.begin(), gated.absorbed.end());
    for (const auto& [silu, norm] : found_.activated) done_.insert(norm);
    for (int i = 0; i < static_cast<int>(graph_.nodes().size()); ++i) {
      const Node& node = at(i);
      if (const auto it = epilogues_.find(i); it != epilogues_.end())
        write_epilogue(*it->second.first, it->second.second, node.outputs[0]);
      else if (const auto pass = passes_.find(i); pass != passes_.end())
        write(*pass->second, node.outputs[0]);
      else if (const auto product = found_.gated.find(i); product != found_.gated.end())
        write(product->second, node.outputs[0]);
      else if (const auto silu = found_.activated.find(i); silu != found_.activated.end())
        write_activated(at(silu->second), node.outputs[0]);
      else if (!done_.count(i))
        rewriter_.keep(node);
    }
    return rewriter_.finish();
  }

 private:
  const Node& at(int i) const { return graph_.nodes()[static_cast<std::size_t>(i)]; }
  ValueId& mapped(ValueId id) { return rewriter_.map[static_cast<std::size_t>(id)]; }

  // Which nodes the chain replaces, and where.
  void plan(const Chain& chain) {
    const auto early = steps_in_epilogue(graph_, chain), late = chain.pre.size() - early;
    for (std::size_t s = 0; s < early; ++s) done_.insert(chain.pre[s].node);
    if (early) {
      done_.insert(graph_.value(chain.start).node);
      epilogues_[chain.pre[early - 1].node] = {&chain, early};
    }
    // A step that stands alone between light nodes is best as it is, and so is a norm.
    const auto real = std::count_if(chain.pre.begin() + static_cast<std::ptrdiff_t>(early), chain.pre.end(), [](const Step& s) { return s.name != "cast"; });
    if (chain.norm >= 0 ? late + chain.post.size() == 0 && chain.start == chain.normed
                        : real == 0 || (late == 1 && !is_heavy(graph_, chain.start) && chain.start == chain.pre[0].from)) return;
    for (std::size_t s = early; s < chain.pre.size(); ++s) done_.insert(chain.pre[s].node);
    for (const auto& step : chain.post) done_.insert(step.node);
    done_.insert(chain.views.begin(), chain.views.begin() + static_cast<std::ptrdiff_t>(chain.views_used()));
    done_.insert(chain.absorbed.begin(), chain.absorbed.end());
    if (chain.norm >= 0) done_.insert(chain.norm);
    passes_[chain.last_node()] = &chain;
  }

  // A bias whose dimension the pass finds split.
  static bool is_sum(const Chain& chain, const Step& step) { return step.split && *step.split < chain.views_used(); }
  static std::string list(const Chain& chain, const std::vector<Step>& steps, std::size_t from = 0) {
    std::string names;
    for (std::size_t s = from; s < steps.size(); ++s)
      if (steps[s].name != "cast") names.append(names.empty() ? "" : ",").append(is_sum(chain, steps[s]) ? "add" : steps[s].name);
    return names;
  }

  void write_epilogue(const Chain& chain, std::size_t count, ValueId result) {
    const Node& linear = graph_.producer(chain.start);
    auto inputs = rewriter_.mapped(linear.inputs);
    std::vector<Step> steps(chain.pre.begin(), chain.pre.begin() + static_cast<std::ptrdiff_t>(count));
    for (const auto& step : steps)
      if (step.operand >= 0) inputs.push_back(as_dtype(g_, bias(step), graph_.type(chain.start).dtype));
    auto attrs = linear.attrs;
    attrs.set("epilogue", list(Chain(), steps));
    mapped(result) = g_.add("linear", inputs, attrs, linear.name);
  }

  // Where what stands behind the norm begins, but for casts, with a product with one vector for all rows, the product's number; else nothing. So do
  // models that multiply in another dtype than they norm in.
  std::optional<std::size_t> weight_step(const std::vector<Step>& post) const {
    const auto first = std::find_if(post.begin(), post.end(), [](const Step& step) { return step.name != "cast"; });
    if (first == post.end() || first->name != "mul") return {};
    const Shape &shape = graph_.type(first->operand).shape, &value = graph_.type(first->from).shape;
    if (shape.empty() || shape.back() != value.back() || numel(shape) != shape.back()) return {};
    return static_cast<std::size_t>(first - post.begin());
  }

  // The step's operand as the pass takes it, behind the views that it does first.
  ValueId operand(const Chain& chain, const Step& step) { return operand(chain, step, step.operand); }
  ValueId operand(const Chain& chain, const Step& step, ValueId id) {
    const ValueId value = mapped(id);
    const auto rank = graph_.type(at(step.node).outputs[0]).shape.size();
    if (step.name == "bias" && !is_sum(chain, step)) return bias(step);
    ValueId seen = widened(g_, value, rank);
    for (std::size_t v = step.views; v < chain.views_used(); ++v) {
      const Node& view = at(chain.views[v]);
      seen = g_.add_node(*view.op, {seen}, *view_of_operand(view, graph_.type(view.inputs[0]).shape, g_.type(seen).shape), view.name)[0];
    }
    return seen;
  }

  ValueId bias(const Step& step) {
    const ValueId value = mapped(step.operand);
    return vector(value, step.dim + g_.type(value).shape.size() - graph_.type(at(step.node).outputs[0]).shape.size());
  }

  // flat(), once for each value.
  ValueId vector(ValueId value, std::size_t channel) {
    const auto [it, first] = vectors_.emplace(value, -1);
    if (first) it->second = flat(g_, value, channel);
    return it->second;
  }

  void write(const Chain& chain, ValueId result) {
    const auto early = steps_in_epilogue(graph_, chain);
    ValueId x = mapped(early ? at(chain.pre[early - 1].node).outputs[0] : chain.start);
    for (std::size_t v = 0; v < chain.views_used(); ++v) {
      const Node& view = at(chain.views[v]);
      x = g_.add_node(*view.op, {x}, view.attrs, view.name)[0];
    }
    std::vector<ValueId> inputs = {x};
    const auto append = [&](const Step& step) {
      if (step.operand >= 0) inputs.push_back(operand(chain, step));
      if (step.second >= 0) inputs.push_back(operand(chain, step, step.second));
    };
    const auto dtype_of = [&](ValueId id) { return std::string(name_of(graph_.type(id).dtype)); };
    const std::string given(name_of(g_.type(x).dtype));
    const auto set_dtype = [&](Attrs& attrs, const char* attribute, const std::string& dtype) {
      if (dtype != given) attrs.set(attribute, dtype);
    };
    for (std::size_t s = early; s < chain.pre.size(); ++s) append(chain.pre[s]);
    if (chain.norm < 0) {
      Attrs attrs = {{"steps", list(chain, chain.pre, early)}};
      for (std::size_t s = early; s < chain.pre.size(); ++s) {
        if (chain.pre[s].name != "bias" || is_sum(chain, chain.pre[s])) continue;
        auto dim = chain.pre[s].dim;
        for (std::size_t v = chain.pre[s].views; v < chain.views_used(); ++v) dim = *dim_behind(at(chain.views[v]), dim);
        attrs.set("channel", static_cast<std::int64_t>(dim));
      }
      set_dtype(attrs, "dtype", dtype_of(result));
      mapped(result) = g_.add("pointwise", inputs, attrs, name_of_heavy(chain.start));
      return;
    }
    const Node& norm = at(chain.norm);
    std::string affine;
    const bool shifted = norm.inputs.size() == 3 && !is_constant(graph_, norm.inputs[2], 0);
    if (shifted || !is_constant(graph_, norm.inputs[1], 1)) {
      affine = shifted ? "weight,bias" : "weight";
      inputs.push_back(mapped(norm.inputs[1]));
      if (shifted) inputs.push_back(mapped(norm.inputs[2]));
    }
    std::size_t behind = 0;
    if (const auto weight = weight_step(chain.post); weight && affine.empty()) {
      const ValueId operand = chain.post[*weight].operand;
      affine = "weight";
      inputs.push_back(vector(mapped(operand), graph_.type(operand).shape.size() - 1));
      behind = *weight + 1;
    }
    for (std::size_t s = behind; s < chain.post.size(); ++s) append(chain.post[s]);
    Attrs attrs = {{"pre", list(chain, chain.pre, early)},
                   {"norm", std::string(norm.op->name())},
                   {"epsilon", norm.attrs.real("epsilon")},
                   {"affine", affine},
                   {"post", list(chain, chain.post, behind)}};
    set_dtype(attrs, "dtype", dtype_of(result));
    const auto& by = readers_[static_cast<std::size_t>(chain.normed)];
    const bool alone = std::all_of(by.begin(), by.end(), [&](int reader) { return chain.reads_normed(reader); });
    if (!attrs.text("pre").empty() && alone) attrs.set("alone", std::int64_t{1});
    if (!attrs.text("pre").empty() && !alone) set_dtype(attrs, "y_dtype", dtype_of(chain.normed));
    const auto outputs = g_.add_node(find_op("fused_norm"), inputs, attrs, norm.name);
    if (outputs.size() == 2) mapped(chain.normed) = outputs[0];
    mapped(result) = outputs.back();
  }

  void write(const Gated& gated, ValueId result) {
    std::vector<ValueId> inputs = {mapped(gated.value), mapped(gated.gate)};
    std::string biases;
    for (const auto& [bias, of] : {std::pair(gated.value_bias, "value"), std::pair(gated.gate_bias, "gate")}) {
      if (bias < 0) continue;
      biases.append(biases.empty() ? "" : ",").append(of);
      inputs.push_back(as_dtype(g_, vector(mapped(bias), graph_.type(bias).shape.size() - 1), graph_.type(gated.value).dtype));
    }
    mapped(result) = g_.add("glu", inputs, {{"activation", gated.activation}, {"biases", biases}}, name_of_heavy(gated.value));
  }

  void write_activated(const Node& norm, ValueId result) {
    Attrs attrs = norm.attrs;
    attrs.set("activation", "silu");
    mapped(result) = g_.add("group_norm", rewriter_.mapped(norm.inputs), attrs, norm.name);
  }

  std::string name_of_heavy(ValueId id) const {
    const Node* node = &graph_.producer(id);
    while (is_view(*node) || node->op->collective()) node = &graph_.producer(node->inputs[0]);
    return node->name;
  }

  const Graph& graph_;
  const Chains& found_;
  const std::vector<std::vector<int>> readers_;
  Rewriter rewriter_;
  Graph& g_;
  std::map<ValueId, ValueId> vectors_;
  std::set<int> done_;  // nodes that something else does
  std::map<int, std::pair<const Chain*, std::size_t>> epilogues_;
  std::map<int, const Chain*> passes_;
};

}  // namespace

// Again while that helps: what a pass delays may have stood in the way of another.
Graph fuse_into_passes(const Graph& graph) {
  Graph result = find_ropes(graph).value_or(graph);
  result = own_casts(result).value_or(result);
  for (std::size_t before = 0; before == 0 || result.nodes().size() < before;) {
    before = result.nodes().size();
    const Graph plain = expand_epilogues(result).value_or(result);
    result = PassWriter(plain, find_chains(plain)).run();
  }
  result = share_equal_nodes(result).value_or(result);
  result = gate_linears(result).value_or(result);
  return join_linears(result).value_or(result);
}

}  // namespace comfytp::graph
