#include "runtime/lowering.h"

#include <algorithm>
#include <map>
#include <optional>
#include <set>
#include <tuple>
#include <utility>

#include "base/error.h"
#include "graph/rewrites.h"
#include "runtime/assembly.h"
#include "runtime/memory_plan.h"

namespace comfytp::runtime {
namespace {

using backend::Operand;
using backend::WeightBuffer;
using graph::Graph;
using graph::Node;
using graph::Order;
using graph::Type;
using graph::ValueId;

std::string label_of(const Node& node) {
  return node.name.empty() ? std::string(node.op->name()) : fmt::format("{} '{}'", node.op->name(), node.name);
}

std::string shape_text(const Operand& operand) {
  return fmt::format("{}{}", name_of(operand.weight ? operand.weight->stored : operand.type.dtype), to_string(operand.type.shape));
}

Work work_of(const Node& node, const std::vector<Operand>& in, const std::vector<Operand>& out) {
  Work work{std::string(node.op->name()), {}, 0, 0};
  graph::OpContext op{node.attrs, {}, {}};
  for (const auto& operand : in) {
    work.shapes += (work.shapes.empty() ? "" : " ") + shape_text(operand);
    work.bytes += operand.weight ? operand.weight->bytes() : operand.type.bytes();
    op.in.push_back(operand.type);
  }
  work.shapes += " ->";
  for (const auto& operand : out) {
    work.shapes += " " + shape_text(operand);
    work.bytes += operand.type.bytes();
    op.out.push_back(operand.type);
  }
  work.flops = node.op->flops(op);
  return work;
}

// A value as it lies on the device.
struct Value {
  Type type;                       // as the graph sees it
  DType stored = DType::f32;       // as it lies in memory; differs from the type for weights only
  Order order;
  Home home;
  WeightBuffer* weight = nullptr;  // where it is a weight and no view of one
  Phase phase = Phase::prologue;   // from when on it is there

  Operand operand() const { return {weight ? type : Type{stored, type.shape}, order, weight}; }
};

class Lowering {
 public:
  Lowering(const Graph& local, backend::Device& device, WeightStore& weights) : device_(device), weights_(weights) {
    program_.graph = graph::fuse(local, device.fusion());
    values_.resize(program_.graph.value_count());
  }

  Program run() {
    const Graph& g = program_.graph;
    const auto varies = graph::varies_per_call(g);
    plan_weights();
    for (std::size_t i = 0; i < g.nodes().size(); ++i) place(g.nodes()[i], varies[i] ? Phase::step : Phase::prologue);
    for (const auto& output : g.outputs()) hand_over(output);
    assembly_.finish(program_);
    return std::move(program_);
  }

 private:
  Value& value(ValueId id) { return values_[static_cast<std::size_t>(id)]; }
  using Part = std::tuple<std::string, graph::Ints, graph::Ints>;
  static Part part_of(const graph::Attrs& weight) { return {weight.text("key"), weight.ints("offset"), weight.ints("shape")}; }

  // A weight node's attributes on the device that stores what this node fetches.
  graph::Attrs stored_elsewhere(const Node& fetch) const {
    graph::Attrs attrs = program_.graph.producer(fetch.inputs[0]).attrs;
    auto offset = attrs.ints("offset");
    offset[static_cast<std::size_t>(fetch.attrs.integer("dim"))] -= fetch.attrs.ints("bounds")[static_cast<std::size_t>(fetch.attrs.integer("rank"))];
    attrs.set("offset", offset);
    attrs.set("shape", program_.graph.type(fetch.outputs[0]).shape);
    return attrs;
  }

  // The weight that a node is, stored here or fetched.
  std::optional<Part> weight_of(const Node& node) const {
    if (graph::is(node, "weight")) return part_of(node.attrs);
    if (!device_.formats_agree() || !is_fetch(node)) return std::nullopt;
    return part_of(stored_elsewhere(node));
  }
  bool is_fetch(const Node& node) const { return graph::is(node, "fetch_weight") && graph::is(program_.graph.producer(node.inputs[0]), "weight"); }

  // A part of a weight may be packed if all its readers are the same input of the same kind of op and take it as it lies.
  void plan_weights() {
    const Graph& g = program_.graph;
    std::map<Part, std::set<std::pair<const graph::Op*, std::size_t>>> readers;
    for (const auto& node : g.nodes()) {
      const auto op = g.context(node);
      std::vector<Order> produced;
      for (const auto& t : op.in) produced.push_back(graph::row_major(t.shape.size()));
      const auto layout = node.op->layout(op, produced);
      for (std::size_t i = 0; i < node.inputs.size(); ++i) {
        const auto part = weight_of(g.producer(node.inputs[i]));
        if (!part || (is_fetch(node) && device_.formats_agree())) continue;  // the latter hands it on as it lies
        readers[*part].insert({node.op, i});
        if (node.op->collective() || layout.view || !graph::same_memory(op.in[i].shape, produced[i], layout.in[i]) ||
            !device_.decodes(node, i))
          plain_.insert(*part);
      }
    }
    for (const auto& output : g.outputs())
      if (const auto part = weight_of(g.producer(output.value))) plain_.insert(*part);
    for (const auto& [part, by] : readers)
      if (by.size() > 1) plain_.insert(part);
  }

  void place(const Node& node, Phase phase) {
    if (graph::is(node, "input")) return bind_input(node, phase);
    if (graph::is(node, "weight")) return bind_weight(node);
    const auto op = program_.graph.context(node);
    std::vector<Order> produced;
    for (ValueId id : node.inputs) produced.push_back(value(id).order);
    const auto layout = node.op->layout(op, produced);
    if (layout.view) {
      Value v = value(node.inputs[0]);
      if (!graph::same_memory(op.in[0].shape, v.order, layout.in[0])) v = as_wanted(node.inputs[0], layout.in[0], false, phase);
      value(node.outputs[0]) = {op.out[0], v.stored, layout.out[0], v.home, nullptr, v.phase};
      return;
    }
    if (graph::is(node, "slice") && see_slice(node)) return;
    if (graph::is(node, "concat") && lay_together(node, phase)) return;
    if (node.op->collective()) return collective(node, phase, layout);
    if (phase == Phase::step) program_.step_flops += node.op->flops(op);
    if (node.op->flops(op) > 0 && is_float(op.out[0].dtype) && computes_in_.insert(op.out[0].dtype).second)
      device_.expect_compute(op.out[0].dtype);

    std::vector<Value> in, out;
    for (std::size_t i = 0; i < node.inputs.size(); ++i)
      in.push_back(as_wanted(node.inputs[i], layout.in[i], device_.decodes(node, i), phase));
    bool empty = true;
    for (std::size_t i = 0; i < node.outputs.size(); ++i) {
      out.push_back(fresh(op.out[i], layout.out[i], phase));
      value(node.outputs[i]) = out.back();
      empty = empty && numel(op.out[i].shape) == 0;
    }
    if (empty) {
      // Nothing runs, but where others fetch a weight that lies here they take it as their kernels like it: so must this device.
      const bool fetched = std::any_of(node.inputs.begin(), node.inputs.end(), [&](ValueId id) { return is_fetch(program_.graph.producer(id)); });
      if (fetched && device_.formats_agree()) kernel(node, in, out);
      return;
    }
    if (graph::is(node, "linears")) lay_side_by_side(out);
    PendingLaunch launch = kernel(node, in, out);
    for (std::size_t i = 0; i < in.size(); ++i)
      if (!in[i].weight && in[i].type == op.out[0] && graph::same_memory(op.out[0].shape, in[i].order, out[0].order) && node.op->in_place(op, i))
        launch.may_overwrite.push_back(i);
    assembly_.add(phase, std::move(launch));
  }

  // In one piece, each at a multiple of kAlignment, as weights that are loaded together lie: so one matmul can write them all.
  void lay_side_by_side(const std::vector<Value>& values) {
    std::vector<std::int64_t> offsets;
    std::int64_t end = 0;
    for (const Value& v : values) {
      offsets.push_back(aligned(end));
      end = offsets.back() + v.type.bytes();
    }
    const int whole = assembly_.add_block(end);
    for (std::size_t i = 0; i < values.size(); ++i) assembly_.lay_within(values[i].home.block, whole, offsets[i]);
  }

  // Bytes of a step along dimension `dim` of a value that lies in `order` with nothing outside of that dimension, so that its parts lie
  // in one piece each; -1 where it does not. Kernels count on places at multiples of kAlignment: so the parts must begin there.
  static std::int64_t step_of(const Type& type, const Order& order, std::size_t dim) {
    for (int d : order) {
      if (static_cast<std::size_t>(d) == dim) return graph::strides_of(type.shape, order)[dim] * size_of(type.dtype);
      if (type.shape[static_cast<std::size_t>(d)] != 1) return -1;
    }
    return -1;
  }

  // A slice that lies in one piece is read where it lies.
  bool see_slice(const Node& node) {
    const Value& v = value(node.inputs[0]);
    if (v.type == program_.graph.type(node.outputs[0])) {  // of a part that is all that there is here
      value(node.outputs[0]) = v;
      return true;
    }
    const auto step = step_of(v.type, v.order, static_cast<std::size_t>(node.attrs.integer("dim")));
    const auto offset = step * node.attrs.integer("start");
    if (v.home.block < 0 || v.weight || v.stored != v.type.dtype) return false;
    if (node.attrs.integer_or("step", 1) != 1 || step < 0 || offset % kAlignment != 0) return false;
    Value part = v;
    part.type = program_.graph.type(node.outputs[0]);
    part.home.offset += offset;
    value(node.outputs[0]) = part;
    return true;
  }

  // What a concat takes in one piece is written where it will lie, and only the rest is copied; what lies as it will already is the concat.
  bool lay_together(const Node& node, Phase phase) {
    const auto dim = static_cast<std::size_t>(node.attrs.integer("dim"));
    const Type& type = program_.graph.type(node.outputs[0]);
    Order order = value(node.inputs[0]).order;
    const auto stacked = [&](ValueId id) { return value(id).type.shape[dim] == 1; };
    if (std::all_of(node.inputs.begin(), node.inputs.end(), stacked)) {  // what is one behind the other lies so, however each of them lies
      const auto own = std::find(order.begin(), order.end(), static_cast<int>(dim));
      std::rotate(order.begin(), own, own + 1);
    }
    const auto step = step_of(type, order, dim);
    if (step < 0 || numel(type.shape) == 0) return false;
    std::vector<std::int64_t> offsets;
    std::int64_t end = 0;
    for (ValueId id : node.inputs) {
      offsets.push_back(end);
      end += value(id).type.shape[dim] * step;
      if (offsets.back() % kAlignment != 0) return false;
    }
    const auto fits = [&](const Value& v) {  // it is as the concat has it, wherever it lies
      return v.home.block >= 0 && !v.weight && v.phase == phase && v.stored == v.type.dtype && graph::same_memory(v.type.shape, v.order, order);
    };
    const Value& first = value(node.inputs[0]);
    bool lies = true;
    for (std::size_t i = 0; lies && i < node.inputs.size(); ++i) {
      const Value& v = value(node.inputs[i]);
      lies = fits(v) && assembly_.lies_behind(v.home, first.home, offsets[i]);
    }
    if (lies) {
      value(node.outputs[0]) = {type, type.dtype, order, first.home, nullptr, phase};
      return true;
    }
    const Value whole = fresh(type, order, phase);
    bool any = false;
    std::vector<std::size_t> rest;
    for (std::size_t i = 0; i < node.inputs.size(); ++i) {
      const Value& v = value(node.inputs[i]);
      const auto bytes = v.type.bytes();
      if (bytes == 0) continue;
      const bool alone = fits(v) && v.home.offset == 0 && assembly_.bytes_of(v.home.block) == bytes;
      if (alone && assembly_.lay_within(v.home.block, whole.home.block, offsets[i])) any = true;
      else rest.push_back(i);
    }
    if (!any) return false;
    for (std::size_t i : rest) {
      Value part = whole;
      part.type = value(node.inputs[i]).type;
      part.home.offset = offsets[i];
      copy(value(node.inputs[i]), part, phase, node.name);
    }
    value(node.outputs[0]) = whole;
    return true;
  }

  void bind_input(const Node& node, Phase phase) {
    const Type& type = program_.graph.type(node.outputs[0]);
    const auto offset = node.attrs.has("offset") ? node.attrs.ints("offset") : graph::Ints(type.shape.size(), 0);
    Box box;
    for (std::size_t d = 0; d < type.shape.size(); ++d) box.push_back({offset[d], offset[d] + type.shape[d]});
    value(node.outputs[0]) = fresh(type, graph::row_major(type.shape.size()), phase);
    const Value& v = value(node.outputs[0]);
    assembly_.add_input({node.attrs.text("name"), type, v.order, box, {}, phase == Phase::prologue}, v.home);
  }

  void bind_weight(const Node& node) {
    auto* buffer = weights_.find(node.attrs, !plain_.count(part_of(node.attrs)));
    if (std::find(program_.weights.begin(), program_.weights.end(), buffer) == program_.weights.end()) program_.weights.push_back(buffer);
    const Type& type = program_.graph.type(node.outputs[0]);
    value(node.outputs[0]) = {type, buffer->stored, graph::row_major(type.shape.size()), {-1, buffer}, buffer, Phase::prologue};
  }

  Value fresh(const Type& type, const Order& order, Phase phase) {
    return {type, type.dtype, order, {assembly_.add_block(type.bytes()), nullptr}, nullptr, phase};
  }

  // The value as a reader wants it. What is copied of an activation is copied once, as soon as it is there; a weight is
  // decoded by its reader, or else for each reader anew, so that it stays in its stored form.
  Value as_wanted(ValueId id, const Order& order, bool decodes, Phase reader) {
    Value v = value(id);
    const bool is_stored = v.stored != v.type.dtype || v.home.weight;
    const bool cast = v.stored != v.type.dtype && !(v.weight && decodes);
    if (!cast && graph::same_memory(v.type.shape, v.order, order)) {
      v.order = order;
      return v;
    }
    const auto known = copies_.find({id, order});
    if (!is_stored && known != copies_.end()) return known->second;
    const Phase phase = is_stored ? reader : v.phase;
    const Value wanted = fresh(v.type, order, phase);
    if (numel(v.type.shape) > 0) copy(v, wanted, phase, program_.graph.producer(id).name);
    if (!is_stored) copies_[{id, order}] = wanted;
    return wanted;
  }

  // Into another place, order or dtype.
  void copy(Value from, const Value& to, Phase phase, const std::string& name) {
    const Node node{&graph::find_op("cast"), {{"dtype", std::string(name_of(to.type.dtype))}}, {}, {}, name};
    from.type.dtype = from.stored;
    assembly_.add(phase, kernel(node, {from}, {to}));
  }

  PendingLaunch kernel(const Node& node, const std::vector<Value>& in, const std::vector<Value>& out) {
    PendingLaunch launch;
    std::vector<Operand> inputs, outputs;
    for (const auto& v : in) inputs.push_back(v.operand()), launch.in.push_back(v.home);
    for (const auto& v : out) outputs.push_back(v.operand()), launch.out.push_back(v.home);
    launch.label = label_of(node);
    launch.work = work_of(node, inputs, outputs);
    try {
      launch.kernel = device_.compile(node, inputs, outputs);
    } catch (const std::exception&) {
      rethrow_from(launch.label);
    }
    return launch;
  }

  void collective(const Node& node, Phase phase, const graph::Layout& layout) {
    const Type& type = program_.graph.type(node.outputs[0]);
    PendingLaunch launch;
    Value in = value(node.inputs[0]);
    const bool fetch = is_fetch(node);
    if (!fetch) in = as_wanted(node.inputs[0], layout.in[0], false, phase);
    Value out = fresh({in.stored, type.shape}, layout.out[0], phase);
    out.type = type;
    if (fetch && in.weight->shape == type.shape) {
      out = in;  // which is used where it lies
    } else if (fetch && device_.formats_agree()) {
      const auto attrs = stored_elsewhere(node);
      out.weight = weights_.find(attrs, !plain_.count(part_of(attrs)));  // is not loaded here, but gets the format that it has there
    } else if (fetch) {
      program_.fetched.push_back(std::make_unique<WeightBuffer>());
      out.weight = program_.fetched.back().get();
      *out.weight = {in.weight->key, type.shape, in.stored, std::nullopt, false, nullptr};
    }
    value(node.outputs[0]) = out;
    launch.collective = CollectiveCall{&node, view(in), view(out), nullptr};
    launch.in = {in.home};
    launch.out = {out.home};
    launch.label = label_of(node);
    launch.work = work_of(node, {in.operand()}, {out.operand()});
    launch.aside = fetch && device_.side_queue();
    if (fetch) launch.whole_bytes = numel(program_.graph.producer(node.inputs[0]).attrs.ints("full")) * size_of(in.stored);
    assembly_.add(phase, std::move(launch));
  }

  static TensorView view(const Value& v) { return {nullptr, v.stored, v.type.shape, graph::strides_of(v.type.shape, v.order)}; }

  void hand_over(const graph::Output& output) {
    const Value v = as_wanted(output.value, value(output.value).order, false, Phase::step);
    assembly_.add_output({output.name, v.type, v.order, whole_box(v.type.shape), {}, false}, v.home);
  }

  backend::Device& device_;
  WeightStore& weights_;
  Program program_;
  Assembly assembly_;
  std::vector<Value> values_;
  std::set<Part> plain_;
  std::set<DType> computes_in_;
  std::map<std::pair<ValueId, Order>, Value> copies_;
};

}  // namespace

Program lower(const Graph& local, backend::Device& device, WeightStore& weights) { return Lowering(local, device, weights).run(); }

}  // namespace comfytp::runtime
