#include "fixture.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <list>
#include <random>

#include "base/error.h"

namespace comfytp::test {

using backend::Operand;
using graph::Order;

std::unique_ptr<backend::Device> open(const std::string& name) {
  auto device = backend::open_device(backend::parse_devices(name)[0], 0, 1);
  device->attach();
  return device;
}

std::vector<std::pair<std::string, DType>> devices_here() {
  std::vector<std::pair<std::string, DType>> found;
  for (const auto* name : {"cpu:0", "cuda:0"})
    for (auto dtype : {DType::f32, DType::bf16, DType::f16}) {
      try {
        open(name)->expect_compute(dtype);
        found.emplace_back(name, dtype);
      } catch (const Error&) {  // not here, or not in this dtype
      }
    }
  return found;
}

namespace {

constexpr std::int64_t kGuard = 256;
constexpr unsigned char kGarbage = 0xff;  // NaN in every dtype

// fp8 is only ever read, so its values are drawn as bits: both signs, exponents around 0, every mantissa.
std::uint8_t random_f8(std::mt19937& random, DType dtype) {
  const int mantissa_bits = dtype == DType::f8_e4m3 ? 3 : 2, bias = dtype == DType::f8_e4m3 ? 7 : 15;
  const auto mantissa = random() % (1u << mantissa_bits), exponent = static_cast<unsigned>(bias - 3) + random() % 4;
  return static_cast<std::uint8_t>((random() % 2) << 7 | exponent << mantissa_bits | mantissa);
}

// The elements as `dtype` holds them, row-major.
std::vector<char> bytes_of(const std::string& name, const Shape& shape, DType dtype) {
  std::mt19937 random(static_cast<unsigned>(std::hash<std::string>()(name)));
  std::normal_distribution<double> normal;
  std::vector<char> bytes(static_cast<std::size_t>(numel(shape) * size_of(dtype)));
  const double offset = name.starts_with("offset") ? 1000 : 0;
  for (std::int64_t i = 0; i < numel(shape); ++i) {
    if (dtype == DType::f8_e4m3 || dtype == DType::f8_e5m2)
      bytes[static_cast<std::size_t>(i)] = static_cast<char>(random_f8(random, dtype));
    else
      store_element(bytes.data(), dtype, i, is_float(dtype) ? offset + normal(random) : static_cast<double>(random() % 100));
  }
  return bytes;
}

void put(backend::Device& device, void* place, const std::string& bytes) {
  const graph::Type type{DType::u8, {static_cast<std::int64_t>(bytes.size())}};
  if (!bytes.empty()) device.read(TensorView::dense(const_cast<char*>(bytes.data()), DType::u8, type.shape), place, type, {0});
}

std::string get(backend::Device& device, const void* place, std::int64_t count) {
  std::string bytes(static_cast<std::size_t>(count), '\0');
  const graph::Type type{DType::u8, {count}};
  if (count) device.write(place, type, {0}, TensorView::dense(bytes.data(), DType::u8, type.shape));
  device.synchronize();
  return bytes;
}

/// Device memory with a guard behind it.
class Memory {
 public:
  Memory(backend::Device& device, std::int64_t bytes) : device_(device), bytes_(bytes), data_(static_cast<char*>(device.allocate(bytes + kGuard))) {
    put(device, data_, std::string(static_cast<std::size_t>(bytes + kGuard), static_cast<char>(kGarbage)));
  }
  ~Memory() {
    EXPECT_EQ(get(device_, data_ + bytes_, kGuard), std::string(kGuard, static_cast<char>(kGarbage))) << "written behind the memory";
    device_.release(data_, bytes_ + kGuard);
  }
  Memory(const Memory&) = delete;
  void* data() const { return data_; }

 private:
  backend::Device& device_;
  std::int64_t bytes_;
  char* data_;
};

struct Run {
  backend::Device& device;
  const graph::Graph& graph;
  const Placement& placement;
  std::list<Memory> memories;
  std::list<backend::WeightBuffer> weights;
  std::vector<Operand> operands;  // by value
  std::vector<void*> places;

  struct Launch {
    const graph::Node* node;  // null: a copy into another order
    std::unique_ptr<backend::Kernel> kernel;
    std::vector<void*> in, out;
    std::vector<Operand> in_operands, out_operands;
  };
  std::list<graph::Graph> copies;
  std::vector<Launch> launches;

  Run(backend::Device& d, const graph::Graph& g, const Placement& p)
      : device(d), graph(g), placement(p), operands(g.value_count()), places(g.value_count()) {}

  void* allocate(std::int64_t bytes) { return memories.emplace_back(device, bytes).data(); }

  void lower() {
    for (const auto& node : graph.nodes()) {
      const auto op = graph.context(node);
      const auto out = node.outputs[0];
      if (is(node, "input"))
        input(node, out);
      else if (is(node, "weight"))
        weight(node, out);
      else
        launch(node, op);
    }
    for (auto& w : weights) load(w);
  }

  void input(const graph::Node& node, graph::ValueId out) {
    const auto& type = graph.type(out);
    Order order = graph::row_major(type.shape.size());
    if (placement.reversed) std::reverse(order.begin(), order.end());
    operands[out] = {type, order};
    places[out] = allocate(type.bytes());
    auto bytes = bytes_of(node.attrs.text("name"), type.shape, type.dtype);
    device.read(TensorView::dense(bytes.data(), type.dtype, type.shape), places[out], type, order);
  }

  void weight(const graph::Node& node, graph::ValueId out) {
    const auto& type = graph.type(out);
    auto& w = weights.emplace_back();
    w.key = node.attrs.text("key");
    w.shape = type.shape;
    w.stored = placement.stored;
    w.packable = placement.packable;
    operands[out] = {type, graph::row_major(type.shape.size()), &w};
  }

  void load(backend::WeightBuffer& w) {
    w.data = allocate(w.bytes());
    const auto bytes = bytes_of(w.key, w.shape, w.stored);
    const auto writer = device.weight_writer();
    if (!bytes.empty()) writer->write(w, [&](void* host) { std::memcpy(host, bytes.data(), bytes.size()); });
    writer->finish();
    EXPECT_TRUE(placement.packable || !w.format) << w.key << " was given a format though it must stay row-major";
  }

  void launch(const graph::Node& node, const graph::OpContext& op) {
    std::vector<Order> produced;
    for (auto id : node.inputs) produced.push_back(operands[id].order);
    const auto layout = node.op->layout(op, produced);
    Launch launch{&node, nullptr, {}, {}, {}, {}};
    for (std::size_t i = 0; i < node.inputs.size(); ++i) {
      auto operand = operands[node.inputs[i]];
      void* place = places[node.inputs[i]];
      const bool decodes = !operand.weight || operand.weight->stored == operand.type.dtype || device.decodes(node, i);
      if (operand.weight && !decodes) operand.weight->packable = false;
      if (!decodes || !graph::same_memory(operand.type.shape, operand.order, layout.in[i])) {
        Operand wanted{operand.type, layout.in[i]};
        place = reorder(operand, place, wanted);
        operand = wanted;
      }
      operand.order = layout.in[i];
      launch.in_operands.push_back(operand);
      launch.in.push_back(place);
    }
    for (std::size_t i = 0; i < node.outputs.size(); ++i) {
      const auto id = node.outputs[i];
      operands[id] = {graph.type(id), layout.out[i]};
      launch.out_operands.push_back(operands[id]);
      places[id] = allocate(graph.type(id).bytes());
      launch.out.push_back(places[id]);
    }
    launch.kernel = device.compile(node, launch.in_operands, launch.out_operands);
    launches.push_back(std::move(launch));
  }

  void* reorder(const Operand& from, void* place, const Operand& to) {
    auto& copy = copies.emplace_back();
    copy.add("cast", {graph::Builder(copy, from.type.dtype).input("x", from.type.shape, from.type.dtype)},
             {{"dtype", std::string(name_of(from.type.dtype))}});
    Launch launch{nullptr, nullptr, {place}, {allocate(to.type.bytes())}, {from}, {to}};
    launch.kernel = device.compile(copy.nodes().back(), launch.in_operands, launch.out_operands);
    launches.push_back(std::move(launch));
    return launches.back().out[0];
  }

  void execute(Launch& l) {
    const auto run = [&](const std::vector<void*>& in) {
      std::vector<const void*> inputs(in.begin(), in.end());
      for (std::size_t i = 0; i < inputs.size(); ++i)
        if (l.in_operands[i].weight) inputs[i] = l.in_operands[i].weight->data;
      Memory workspace(device, l.kernel->workspace_bytes());
      l.kernel->run(inputs, l.out, workspace.data());
    };
    const auto result = [&] {
      return get(device, l.out[0], l.out_operands[0].type.bytes());
    };
    run(l.in);
    const auto first = result();
    run(l.in);
    EXPECT_EQ(first, result()) << "the second run gave other bits";
    if (!l.node) return;
    const auto op = graph.context(*l.node);
    for (std::size_t i = 0; i < l.in.size(); ++i) {
      const auto &in = l.in_operands[i], &out = l.out_operands[0];
      if (in.weight || !l.node->op->in_place(op, i) || !graph::same_memory(in.type.shape, in.order, out.order)) continue;
      auto inputs = l.in;
      inputs[i] = l.out[0];
      put(device, l.out[0], get(device, l.in[i], in.type.bytes()));
      run(inputs);
      EXPECT_EQ(first, result()) << "in place over input " << i;
    }
  }
};

graph::RefTensor as_reference(const std::vector<char>& bytes, const Shape& shape, DType dtype) {
  graph::RefTensor tensor(shape);
  for (std::size_t i = 0; i < tensor.data.size(); ++i) tensor.data[i] = load_element(bytes.data(), dtype, static_cast<std::int64_t>(i));
  return tensor;
}

double relative_error(const graph::RefTensor& a, const graph::RefTensor& b) {
  double difference = 0, norm = 0;
  for (std::size_t i = 0; i < a.data.size(); ++i) {
    if (std::isnan(a.data[i]) && std::isnan(b.data[i])) continue;
    difference += (a.data[i] - b.data[i]) * (a.data[i] - b.data[i]);
    norm += b.data[i] * b.data[i];
  }
  return difference == 0 ? 0 : std::sqrt(difference / norm);
}

}  // namespace

graph::RefTensor values_of(const std::string& name, const Shape& shape, DType dtype) {
  return as_reference(bytes_of(name, shape, dtype), shape, dtype);
}

void expect_reference(backend::Device& device, const graph::Graph& graph, const Placement& placement, double tolerance) {
  const auto expected = graph::evaluate(graph, [&](const graph::Node& node) {
    const auto dtype = dtype_from_name(node.attrs.text("dtype"));
    if (is(node, "input")) return values_of(node.attrs.text("name"), node.attrs.ints("shape"), dtype);
    auto tensor = values_of(node.attrs.text("key"), node.attrs.ints("full"), placement.stored);
    std::vector<char> rounded(8);  // what is stored finer than it is computed with is rounded when it is decoded
    for (auto& v : tensor.data) {
      store_element(rounded.data(), dtype, 0, v);
      v = load_element(rounded.data(), dtype, 0);
    }
    return tensor;
  });
  Run run(device, graph, placement);
  run.lower();
  for (auto& launch : run.launches) run.execute(launch);
  for (const auto& output : graph.outputs()) {
    const auto& type = graph.type(output.value);
    graph::RefTensor actual(type.shape);
    device.write(run.places[output.value], type, run.operands[output.value].order,
                 TensorView::dense(actual.data.data(), DType::f64, type.shape));
    device.synchronize();
    const double error = relative_error(actual, expected.at(output.name));
    EXPECT_LE(error, tolerance) << output.name << " " << graph::to_string(type);  // false for NaN too
  }
}

}  // namespace comfytp::test
