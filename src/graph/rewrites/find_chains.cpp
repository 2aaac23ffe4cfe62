#include <algorithm>
#include <set>
#include <tuple>

#include "graph/ops/epilogue.h"
#include "graph/ops/steps.h"
#include "graph/rewrites.h"
#include "graph/rewrites/chains.h"
#include "graph/rewrites/passes.h"

namespace comfytp::graph {
namespace {

constexpr std::int64_t kFewRows = 32;  // of a linear whose result is nothing next to its weight

bool has_few_rows(const Graph& graph, ValueId id) {
  const Shape& shape = graph.type(id).shape;
  return numel(Shape(shape.begin(), shape.end() - 1)) <= kFewRows;
}

bool only_bias(const Chain& chain) {
  return chain.norm < 0 && chain.views.empty() && chain.pre.size() == 1 && chain.pre[0].name == "bias" && chain.pre[0].from == chain.start;
}

// Nodes join chains as they come, in the order of the graph.
class Finder {
 public:
  explicit Finder(const Graph& graph) : graph_(graph), readers_(readers(graph)), varies_(varies_per_call(graph)) {}

  Chains run() {
    for (std::size_t i = 0; i < graph_.nodes().size(); ++i) {
      const int node = static_cast<int>(i);
      if (is_view(at(node)))
        pass_view(node);
      else if (is(at(node), "cast"))
        pass_cast(node);
      else if (is(at(node), "layer_norm") || is(at(node), "rms_norm"))
        pass_norm(node);
      else if (!activates_norm(node) && !gates(node) && !continues(node))
        begins(node);
    }
    return std::move(found_);
  }

 private:
  const Node& at(int i) const { return graph_.nodes()[static_cast<std::size_t>(i)]; }
  const std::vector<int>& readers_of(ValueId id) const { return readers_[static_cast<std::size_t>(id)]; }
  bool varies(int i) const { return varies_[static_cast<std::size_t>(i)]; }

  // The chain that has come to this value; null where there is none.
  Chain* chain_at(ValueId id) {
    const auto it = chain_at_.find(id);
    return it == chain_at_.end() ? nullptr : &found_.chains[it->second];
  }
  // The same, where the value's only reader, node i, may join it: nothing moves between prologue and call.
  Chain* open_at(ValueId id, int i) {
    Chain* chain = chain_at(id);
    return chain && readers_of(id).size() == 1 && varies(chain->last_node()) == varies(i) ? chain : nullptr;
  }
  Chain& add(Chain chain) {
    found_.chains.push_back(std::move(chain));
    return found_.chains.back();
  }
  void move(Chain& chain, ValueId to) {
    if (const auto it = chain_at_.find(chain.value); it != chain_at_.end() && &found_.chains[it->second] == &chain) chain_at_.erase(it);
    chain_at_[to] = static_cast<std::size_t>(&chain - found_.chains.data());
    chain.value = to;
  }
  // Gives its last step back.
  void retreat(Chain& chain) {
    const Step step = chain.steps().back();
    chain.steps().pop_back();
    inner_.erase(step.node);
    if (chain.norm < 0 && chain.pre.empty()) return drop(chain);
    move(chain, step.from);
  }
  void drop(Chain& chain) {
    chain_at_.erase(chain.value);
    chain.gone = true;
  }

  // The chain may have values of this dtype too.
  static bool takes(const Chain& chain, DType dtype) {
    return is_working(dtype) && is_working(chain.narrow) && (dtype == DType::f32 || chain.narrow == DType::f32 || chain.narrow == dtype);
  }
  static void note(Chain& chain, DType dtype) {
    if (dtype != DType::f32) chain.narrow = dtype;
  }
  // An operand as it was before it was widened.
  void take_narrow(const Chain& chain, ValueId& operand) const {
    if (operand < 0) return;
    const ValueId source = before_cast(operand);
    if (takes(chain, graph_.type(source).dtype)) operand = source;
  }
  // The same as widened_from() where that is a value of its own, and not within a chain.
  ValueId before_cast(ValueId id) const { return inner_.count(graph_.value(id).node) ? id : widened_from(graph_, id); }
  void begin_at(Chain& chain, ValueId id) {
    chain.start = before_cast(id);
    chain.narrow = DType::f32;
    note(chain, graph_.type(chain.start).dtype);
  }
  void add_cast(Chain& chain, int i) {
    Step step;
    step.name = "cast";
    step.node = i;
    step.from = at(i).inputs[0];
    step.views = chain.views.size();
    note(chain, graph_.type(at(i).outputs[0]).dtype);
    chain.steps().push_back(step);
    inner_.insert(i);
    move(chain, at(i).outputs[0]);
  }

  void pass_cast(int i) {
    const Node& cast = at(i);
    Chain* chain = open_at(cast.inputs[0], i);
    Step step;
    step.node = i;
    if (chain && takes(*chain, graph_.type(cast.outputs[0]).dtype) && is_working(graph_.type(cast.inputs[0]).dtype) &&
        chain->steps().size() < kMostSteps && may_follow(*chain, step))
      add_cast(*chain, i);
  }

  void pass_view(int i) {
    const Node& view = at(i);
    Chain* chain = open_at(view.inputs[0], i);
    if (!chain || chain->norm >= 0) return;
    const auto channel = chain->channel ? dim_behind(view, *chain->channel) : std::nullopt;
    std::vector<Step> pre = chain->pre;
    for (auto& step : pre) {
      if (step.name != "bias" || !chain->channel || channel || step.split) continue;
      step.split = chain->views.size();
      step.shape = Shape(graph_.type(chain->value).shape.size(), 1);
      step.shape[*chain->channel] = graph_.type(chain->value).shape[*chain->channel];
    }
    std::vector<Shape> shapes;
    for (const auto& step : pre) {
      if (step.name == "rope") return;
      const auto attrs = step.shape.empty() ? std::optional(Attrs()) : view_of_operand(view, graph_.type(chain->value).shape, step.shape);
      if (!attrs) return;
      const Type operand{DType::f32, step.shape};
      shapes.push_back(step.shape.empty() ? Shape() : view.op->infer(*attrs, {&operand, 1})[0].shape);
    }
    for (std::size_t s = 0; s < shapes.size(); ++s) pre[s].shape = shapes[s];
    chain->pre = pre;
    chain->channel = channel;
    chain->views.push_back(i);
    move(*chain, view.outputs[0]);
  }

  void pass_norm(int i) {
    const Node& norm = at(i);
    const ValueId x = norm.inputs[0];
    // With moments it has a part of a row only.
    if (norm.inputs.size() != (is(norm, "layer_norm") ? 3u : 2u) || !is_float(graph_.type(x).dtype)) return;
    for (ValueId parameter : norm.inputs)
      if (graph_.type(parameter).dtype != graph_.type(x).dtype) return;
    const auto last = graph_.type(x).shape.size() - 1;
    // Of a value that is widened for the norm alone, the pass keeps what it was before.
    const ValueId narrow = readers_of(x).size() == 1 ? before_cast(x) : x;
    const ValueId normed = chain_at(x) ? x : narrow;
    const int cast = normed == x ? -1 : graph_.value(x).node;
    Chain* chain = chain_at(normed);
    const auto& by = readers_of(normed);
    const auto own = [&](int reader) { return reader == i || reader == cast; };
    const bool alone = std::all_of(by.begin(), by.end(), own);
    const auto has_work = [&] {  // beside casts, and what stays in an epilogue
      const auto early = static_cast<std::ptrdiff_t>(steps_in_epilogue(graph_, *chain));
      return std::any_of(chain->pre.begin() + early, chain->pre.end(), [](const Step& step) { return step.name != "cast"; });
    };
    const bool joins = chain && chain->norm < 0 && chain->channel.value_or(last) == last && varies(chain->last_node()) == varies(i) &&
                       (has_work() || (alone && !has_few_rows(graph_, chain->start))) &&
                       (cast < 0 || chain->pre.size() < kMostSteps) &&
                       std::all_of(by.begin(), by.end(), [&](int reader) { return own(reader) || reader < 0 || reader >= i; });
    if (joins) {
      if (cast >= 0) add_cast(*chain, cast);
      chain->normed = normed;
    } else {
      Chain own_chain;
      begin_at(own_chain, x);
      own_chain.normed = x;
      chain = &add(own_chain);
    }
    chain->norm = i;
    move(*chain, norm.outputs[0]);
  }

  bool activates_norm(int i) {
    const Node& silu = at(i);
    if (!is(silu, "silu")) return false;
    const int norm = graph_.value(silu.inputs[0]).node;
    if (!is(at(norm), "group_norm") || at(norm).attrs.has("activation") || readers_of(silu.inputs[0]).size() != 1 ||
        varies(norm) != varies(i))
      return false;
    found_.activated[i] = norm;
    return true;
  }

  bool gates(int i) {
    const Node& product = at(i);
    if (!is(product, "mul")) return false;
    const Type& type = graph_.type(product.outputs[0]);
    for (int g : {1, 0}) {
      const ValueId activated = product.inputs[g], value = product.inputs[1 - g];
      Chain* chain = open_at(activated, i);
      if (!chain || chain->steps().empty() || chain->views_used() != chain->views.size() || type.shape.empty() ||
          graph_.type(value) != type || graph_.type(activated) != type)
        continue;
      const Step step = chain->steps().back();
      if (step.name != "gelu" && step.name != "gelu_tanh" && step.name != "silu" && step.name != "sigmoid") continue;
      Gated gated;
      gated.activation = step.name;
      gated.absorbed = {step.node};
      retreat(*chain);
      const ValueId gate = at(step.node).inputs[0];
      std::tie(gated.gate, gated.gate_bias) = without_bias(gate, i, gated.absorbed);
      std::tie(gated.value, gated.value_bias) = without_bias(value, i, gated.absorbed);
      found_.gated[i] = gated;
      return true;
    }
    return false;
  }

  // What stands before the bias along the last dimension, and the bias; -1 where nothing but a bias is added.
  std::pair<ValueId, ValueId> without_bias(ValueId id, int i, std::vector<int>& absorbed) {
    Chain* chain = open_at(id, i);
    if (!chain || !only_bias(*chain) || *chain->channel + 1 != graph_.type(id).shape.size()) return {id, -1};
    absorbed.push_back(chain->pre[0].node);
    drop(*chain);
    return {chain->start, chain->pre[0].operand};
  }

  // Of two chains, not the gate's but the gated one's, else the one that began later.
  bool continues(int i) {
    const auto rank = [](const Chain& chain) {
      return std::pair(chain.steps().empty() || !is_activation(chain.steps().back().name), chain.start);
    };
    Chain* best = nullptr;
    Step step;
    for (ValueId id : at(i).inputs) {
      Chain* chain = open_at(id, i);
      if (!chain || chain->steps().size() >= kMostSteps || (best && rank(*chain) <= rank(*best))) continue;
      const auto candidate = step_of(graph_, i, id, chain->norm < 0 ? chain->channel : graph_.type(id).shape.size() - 1);
      if (!candidate || !may_follow(*chain, *candidate)) continue;
      best = chain;
      step = *candidate;
    }
    if (!best) return false;
    step.views = best->views.size();
    best->steps().push_back(step);
    take_operands(*best);
    inner_.insert(i);
    move(*best, at(i).outputs[0]);
    settle(*best);
    return true;
  }

  // A step behind a norm delays what the norm reads: nobody else may want that by then. And what is written over an operand
  // from before the norm must not be one behind it.
  bool may_follow(const Chain& chain, const Step& step) const {
    if (chain.norm < 0) return true;
    for (int reader : readers_of(chain.normed))
      if (!chain.pre.empty() && reader >= 0 && reader <= step.node && !chain.reads_normed(reader)) return false;
    const ValueId operand = step.operand < 0 ? -1 : widened_from(graph_, step.operand);
    const auto same = [&](ValueId id) { return id >= 0 && widened_from(graph_, id) == operand; };
    return operand < 0 || (!same(chain.start) && !same(chain.normed) &&
                           std::none_of(chain.pre.begin(), chain.pre.end(), [&](const Step& other) { return same(other.operand); }));
  }

  // From what a heavy op has made rather than from another operand, from the later rather than from the earlier.
  void begins(int i) {
    const auto rank = [&](const Chain& chain) {
      const bool heavy = is_heavy(graph_, chain.start);
      return std::tuple(heavy && readers_of(chain.start).size() == 1, heavy, chain.start);
    };
    std::optional<Chain> best;
    for (ValueId id : at(i).inputs) {
      const auto step = step_of(graph_, i, id, {});
      Chain chain;
      begin_at(chain, id);
      if (!step || (best && rank(chain) <= rank(*best))) continue;
      chain.pre = {*step};
      best = chain;
    }
    if (!best) return;
    best->owns_start = best->start == best->pre[0].from && readers_of(best->start).size() == 1 && varies(graph_.value(best->start).node) == varies(i);
    take_operands(*best);
    Chain& chain = add(*best);
    move(chain, at(i).outputs[0]);
    settle(chain);
  }

  void take_operands(Chain& chain) const {
    Step& step = chain.steps().back();
    for (ValueId* operand : {&step.operand, &step.second}) {
      if (*operand < 0) continue;
      take_narrow(chain, *operand);
      note(chain, graph_.type(*operand).dtype);
    }
  }

  // What follows from a chain's newest step.
  void settle(Chain& chain) {
    const Step step = chain.steps().back();
    if (step.name == "bias" && chain.norm < 0) chain.channel = step.dim;
    if (step.name == "mul") take_modulation(chain);
    if (step.name == "add" && chain.norm < 0) take_biased(chain);
  }

  // A product with 1 + s needs s alone.
  void take_modulation(Chain& chain) {
    Step& product = chain.steps().back();
    const ValueId scale = behind_one_plus(graph_, product.operand);
    Step step = product;
    step.operand = scale;
    const int sum = graph_.value(product.operand).node;
    if (scale < 0 || !may_follow(chain, step) || varies(sum) != varies(step.node)) return;
    if (inner_.count(sum)) {  // s stands within a chain: that ends there
      if (readers_of(product.operand).size() != 1) return;
      retreat(*chain_at(product.operand));
    }
    step.name = "add_one_mul";
    product = step;
    take_operands(chain);
  }

  // A sum with a value that has only been biased is one with the value, and with its bias: so that needs no pass of its own.
  void take_biased(Chain& chain) {
    const Step step = chain.pre.back();
    Chain* other = open_at(step.operand, step.node);
    if (!other || !only_bias(*other) || steps_in_epilogue(graph_, *other) || chain.pre.size() >= kMostSteps ||
        graph_.type(step.operand) != graph_.type(chain.value) || chain.channel.value_or(*other->channel) != *other->channel)
      return;
    Step bias = other->pre[0];
    chain.absorbed.push_back(bias.node);
    chain.channel = other->channel;
    chain.pre.back().operand = other->start;
    bias.views = step.views;
    bias.node = step.node;
    chain.pre.push_back(bias);
    drop(*other);
  }

  const Graph& graph_;
  std::vector<std::vector<int>> readers_;
  std::vector<bool> varies_;
  Chains found_;
  std::map<ValueId, std::size_t> chain_at_;
  std::set<int> inner_;  // nodes that continue a chain: what they read of it has no other reader
};

}  // namespace

std::size_t steps_in_epilogue(const Graph& graph, const Chain& chain) {
  const Node& linear = graph.producer(chain.start);
  if (!is(linear, "linear") || chain.pre.empty() || !chain.owns_start) return 0;
  const auto last = graph.type(chain.start).shape.size() - 1;
  const auto stays = [&](const Step& step) {
    return step.views == 0 && (activates_epilogue(step.name) || (step.name == "bias" && step.dim == last));  // behind an activation it may be along another
  };
  if (!has_few_rows(graph, chain.start)) {  // all or nothing
    const std::size_t bias = chain.pre[0].name == "bias" && stays(chain.pre[0]);
    const bool activated = chain.pre.size() == bias + 1 && chain.pre.back().name == "gelu_tanh" && stays(chain.pre.back()) && !linear.attrs.has("product");
    return chain.norm < 0 && (activated || chain.pre.size() == bias) ? chain.pre.size() : 0;
  }
  return static_cast<std::size_t>(std::find_if_not(chain.pre.begin(), chain.pre.end(), stays) - chain.pre.begin());
}

Chains find_chains(const Graph& graph) { return Finder(graph).run(); }

}  // namespace comfytp::graph
