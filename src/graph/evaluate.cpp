#include "graph/evaluate.h"

#include "base/error.h"

namespace comfytp::graph {

RefTensor part_of(const RefTensor& whole, const Ints& full, const Ints& offset, const Ints& shape) {
  require(numel(full) == numel(whole.shape), "[evaluate] expected a tensor of {} but got {}", comfytp::to_string(full),
          comfytp::to_string(whole.shape));
  RefTensor part(shape);
  const auto to = row_major_strides(shape), from = row_major_strides(full);
  for (std::size_t i = 0; i < part.data.size(); ++i) {
    std::int64_t j = 0;
    for (std::size_t d = 0; d < shape.size(); ++d) j += (static_cast<std::int64_t>(i) / to[d] % shape[d] + offset[d]) * from[d];
    part.data[i] = whole.data[static_cast<std::size_t>(j)];
  }
  return part;
}

namespace {

struct Device {
  const Graph* graph;
  std::vector<RefTensor> values;
  std::size_t next = 0;

  explicit Device(const Graph& g) : graph(&g), values(g.value_count()) {}
  bool done() const { return next == graph->nodes().size(); }
  const Node& node() const { return graph->nodes()[next]; }

  RefTensor& value(ValueId id) { return values[static_cast<std::size_t>(id)]; }

  // Runs until the end or the next collective.
  void advance(const Leaves& leaves) {
    for (; !done() && !node().op->collective(); ++next) {
      const auto op = graph->context(node());
      if (is(node(), "input") || is(node(), "weight")) {
        RefTensor whole = leaves(node());
        const Ints full = node().attrs.has("full") ? node().attrs.ints("full") : Ints(whole.shape);
        const Ints offset = node().attrs.has("offset") ? node().attrs.ints("offset") : Ints(full.size(), 0);
        value(node().outputs[0]) = part_of(whole, full, offset, op.out[0].shape);
        continue;
      }
      std::vector<RefTensor> in, out;
      for (ValueId id : node().inputs) in.push_back(value(id));
      for (const auto& t : op.out) out.emplace_back(t.shape);
      bool empty = true;
      for (const auto& t : out) empty = empty && t.data.empty();
      if (!empty) node().op->reference(op, in, out);
      for (std::size_t i = 0; i < out.size(); ++i) value(node().outputs[i]) = std::move(out[i]);
    }
  }
};

// Runs the collective that the first rank of its group stands at, if all its ranks stand at the same.
bool meet(std::vector<Device>& devices, std::size_t first) {
  const Node& node = devices[first].node();
  const auto& group = node.attrs.ints("group");
  std::vector<OpContext> ops;
  std::vector<RefTensor> in, out;
  for (auto d : group) {
    auto& device = devices[static_cast<std::size_t>(d)];
    if (device.done() || device.node().op != node.op || device.node().attrs.ints("group") != group) return false;
    ops.push_back(device.graph->context(device.node()));
    in.push_back(device.value(device.node().inputs[0]));
    out.emplace_back(ops.back().out[0].shape);
  }
  node.op->collective_reference(ops, in, out);
  for (std::size_t r = 0; r < group.size(); ++r) {
    auto& device = devices[static_cast<std::size_t>(group[r])];
    device.value(device.node().outputs[0]) = std::move(out[r]);
    ++device.next;
  }
  return true;
}

}  // namespace

std::vector<Results> evaluate(const std::vector<Graph>& graphs, const Leaves& leaves) {
  std::vector<Device> devices(graphs.begin(), graphs.end());
  for (;;) {
    bool done = true, moved = false;
    for (auto& device : devices) {
      device.advance(leaves);
      done = done && device.done();
    }
    if (done) break;
    for (std::size_t d = 0; d < devices.size(); ++d)
      if (!devices[d].done() && devices[d].node().op->collective()) moved = meet(devices, d) || moved;
    require(moved, "[evaluate] the devices' collectives do not meet");
  }
  std::vector<Results> results(devices.size());
  for (std::size_t d = 0; d < devices.size(); ++d)
    for (const auto& output : graphs[d].outputs()) results[d][output.name] = devices[d].value(output.value);
  return results;
}

Results evaluate(const Graph& graph, const Leaves& leaves) { return evaluate(std::vector<Graph>{graph}, leaves)[0]; }

}  // namespace comfytp::graph
