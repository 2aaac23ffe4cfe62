// Graphs, weights and inputs to run engines with, and the oracle to hold them against.
#pragma once

#include <gtest/gtest.h>

#include <mutex>

#include "../sharding/parity.h"
#include "graph/builder.h"
#include "reference_device.h"
#include "runtime/engine.h"

namespace comfytp::test {

/// What is stored of a graph's weights: the tensors of leaves_of, rounded to the stored dtype.
class TestWeights final : public weights::Source {
 public:
  TestWeights(const Graph& graph, DType stored) {
    const auto leaves = leaves_of(graph);
    for (const auto* node : graph.all("weight")) {
      const auto& key = node->attrs.text("key");
      Tensor& tensor = tensors_[key];
      tensor.values = leaves(*node);
      // A vector keeps its dimensions of size 1 in the graph only, a matrix in the file only.
      Shape shape = node->attrs.ints("full");
      shape.size() > 2 ? static_cast<void>(std::erase(shape, 1)) : static_cast<void>(shape.push_back(1));
      infos_[key] = {stored, shape};
      tensor.bytes.resize(tensor.values.data.size() * static_cast<std::size_t>(size_of(stored)));
      for (std::size_t i = 0; i < tensor.values.data.size(); ++i) {
        store_element(tensor.bytes.data(), stored, static_cast<std::int64_t>(i), tensor.values.data[i]);
        tensor.values.data[i] = load_element(tensor.bytes.data(), stored, static_cast<std::int64_t>(i));
      }
    }
  }
  std::string name() const override { return "test weights"; }
  const std::map<std::string, weights::TensorInfo, std::less<>>& tensors() const override { return infos_; }
  void read(std::string_view key, const Box& box, void* out) const override {
    if (before_read) before_read(std::string(key));
    const auto& info = infos_.find(key)->second;
    auto& bytes = tensors_.find(key)->second.bytes;
    copy(part_of(TensorView::dense(const_cast<std::byte*>(bytes.data()), info.dtype, info.shape), box), TensorView::dense(out, info.dtype, shape_of(box)));
  }
  const RefTensor& values(const std::string& key) const { return tensors_.find(key)->second.values; }
  std::int64_t bytes() const {
    std::int64_t total = 0;
    for (const auto& [key, info] : infos_) total += info.bytes();
    return total;
  }
  void multiply(const std::string& key, double factor) {
    Tensor& tensor = tensors_.find(key)->second;
    const DType stored = infos_.at(key).dtype;
    for (std::size_t i = 0; i < tensor.values.data.size(); ++i) {
      store_element(tensor.bytes.data(), stored, static_cast<std::int64_t>(i), tensor.values.data[i] * factor);
      tensor.values.data[i] = load_element(tensor.bytes.data(), stored, static_cast<std::int64_t>(i));
    }
  }
  void rename(const std::string& from, const std::string& to) {
    infos_[to] = infos_.at(from);
    infos_.erase(from);
  }
  void reshape(const std::string& key, Shape shape) { infos_.at(key).shape = std::move(shape); }

  std::function<void(const std::string&)> before_read;  ///< may throw

 private:
  struct Tensor {
    RefTensor values;
    std::vector<std::byte> bytes;
  };
  std::map<std::string, weights::TensorInfo, std::less<>> infos_;
  std::map<std::string, Tensor, std::less<>> tensors_;
};

/// Inputs of a graph as float arrays.
struct HostInputs {
  std::map<std::string, std::vector<float>> values;
  std::map<std::string, TensorView> views;
  explicit HostInputs(const Graph& graph, std::uint64_t seed = 0) {
    for (const auto* node : graph.all("input")) {
      const auto& name = node->attrs.text("name");
      const auto t = random_tensor(node->attrs.ints("shape"), std::hash<std::string>()(name) + seed);
      auto& v = values[name];
      v.assign(t.data.begin(), t.data.end());
      views[name] = TensorView::dense(v.data(), DType::f32, t.shape);
    }
  }
};

struct HostOutputs {
  std::map<std::string, std::vector<float>> values;
  std::map<std::string, TensorView> views;
  explicit HostOutputs(const Graph& graph) {
    for (const auto& output : graph.outputs()) {
      const auto& shape = graph.type(output.value).shape;
      auto& v = values[output.name];
      v.assign(static_cast<std::size_t>(numel(shape)), NAN);
      views[output.name] = TensorView::dense(v.data(), DType::f32, shape);
    }
  }
};

inline graph::Results oracle(const Graph& graph, const TestWeights& weights, const HostInputs& inputs) {
  return graph::evaluate(graph, [&](const graph::Node& node) -> RefTensor {
    if (graph::is(node, "weight")) return weights.values(node.attrs.text("key"));
    const auto& name = node.attrs.text("name");
    RefTensor t(inputs.views.at(name).shape);
    std::copy(inputs.values.at(name).begin(), inputs.values.at(name).end(), t.data.begin());
    return t;
  });
}

/// The largest relative error over the outputs.
inline double error_of(const graph::Results& expected, const HostOutputs& outputs) {
  double worst = 0;
  for (const auto& [name, value] : expected) {
    RefTensor got(value.shape);
    std::copy(outputs.values.at(name).begin(), outputs.values.at(name).end(), got.data.begin());
    const double e = value.data.empty() ? 0 : difference(got, value);
    worst = std::isnan(e) ? INFINITY : std::max(worst, e);
  }
  return worst;
}

inline std::vector<backend::DeviceSpec> cpu_devices(int count) {
  std::vector<backend::DeviceSpec> specs;
  for (int i = 0; i < count; ++i) specs.push_back({"cpu", i, 0});
  return specs;
}

inline runtime::EngineOptions options_for(const std::string& mesh, sharding::Placement placement = sharding::Placement::resident) {
  runtime::EngineOptions options;
  options.plan.mesh = sharding::Mesh::parse(mesh);
  options.plan.devices = cpu_devices(options.plan.mesh.size());
  options.plan.placement = placement;
  return options;
}

/// An engine over reference devices.
struct Fixture {
  Watch watch;
  std::shared_ptr<TestWeights> weights;
  std::unique_ptr<runtime::Engine> engine;

  Fixture(const Graph& graph, runtime::EngineOptions options, DType stored = DType::f32, bool queues = false)
      : weights(std::make_shared<TestWeights>(graph, stored)) {
    watch.queues = queues;
    options.open = [this](const backend::DeviceSpec& spec, int, int) { return std::make_unique<ReferenceDevice>(spec, watch); };
    engine = std::make_unique<runtime::Engine>(std::move(options), weights);
  }
  double run_and_compare(const Graph& graph, const HostInputs& inputs) {
    const auto compiled = engine->compile(graph);
    HostOutputs outputs(graph);
    engine->run(*compiled, inputs.views, outputs.views);
    return error_of(oracle(graph, *weights, inputs), outputs);
  }
  std::int64_t live_bytes() const {
    std::int64_t total = 0;
    for (const auto& bytes : watch.live_bytes) total += bytes;
    return total;
  }
};

/// An image block as the UNets have them: ResBlock with time embedding, transformer with cross-attention on a prompt.
inline Graph small_unet(std::int64_t batch = 2, std::int64_t height = 8, std::int64_t width = 6, std::int64_t tokens = 5) {
  Graph g;
  graph::Builder b(g, DType::f32);
  const std::int64_t c = 12, heads = 3;
  const auto x = b.input("x", {batch, 4, height, width}, DType::f32), t = b.input("t", {batch, c}, DType::f32);
  const auto context = b.input("context", {batch, tokens, 7}, DType::f32, "prompt");
  const auto vec = [&](const std::string& key) { return b.weight(key, {c}); };
  const auto conv = [&](graph::ValueId v, std::int64_t in, std::int64_t out, const std::string& n, std::int64_t stride = 1) {
    return b.conv2d(v, b.weight(n + ".weight", {out, in, 3, 3}), b.weight(n + ".bias", {out, 1, 1}), stride, 1, n);
  };
  const auto norm = [&](graph::ValueId v, const std::string& n) {
    return b.unary("silu", b.group_norm(v, vec(n + ".weight"), vec(n + ".bias"), 6, 1e-5, n));
  };
  const auto linear = [&](graph::ValueId v, std::int64_t in, std::int64_t out, const std::string& n, bool bias = true) {
    return b.linear(v, b.weight(n + ".weight", {out, in}), bias ? b.weight(n + ".bias", {out}) : -1, n);
  };
  const auto skip = conv(x, 4, c, "in");
  auto h = conv(norm(skip, "res.norm1"), c, c, "res.conv1");
  h = b.add(h, b.split_dim(linear(b.unary("silu", t), c, c, "res.emb"), 1, {c, 1, 1}));
  h = b.add(skip, conv(norm(h, "res.norm2"), c, c, "res.conv2"));
  const auto down = conv(h, c, c, "down", 2);
  const auto dh = b.shape(down)[2], dw = b.shape(down)[3];

  auto tokens_of = b.transpose(b.merge_dims(down, 2, 2), {0, 2, 1});
  const auto split_heads = [&](graph::ValueId v) { return b.transpose(b.split_dim(v, 2, {heads, c / heads}), {0, 2, 1, 3}); };
  const auto attend = [&](graph::ValueId v, graph::ValueId kv, std::int64_t kv_dim, const std::string& n) {
    const auto q = split_heads(linear(v, c, c, n + ".q", false));
    const auto k = split_heads(linear(kv, kv_dim, c, n + ".k", false)), w = split_heads(linear(kv, kv_dim, c, n + ".v", false));
    const auto o = b.attention(q, k, w, 0.5, n);
    return linear(b.merge_dims(b.transpose(o, {0, 2, 1, 3}), 2, 2), c, c, n + ".out");
  };
  auto n1 = b.layer_norm(tokens_of, vec("t.norm1.weight"), vec("t.norm1.bias"), 1e-5, "t.norm1");
  tokens_of = b.add(tokens_of, attend(n1, n1, c, "t.self"));
  tokens_of = b.add(tokens_of, attend(b.layer_norm(tokens_of, vec("t.norm2.weight"), vec("t.norm2.bias"), 1e-5, "t.norm2"), context, 7, "t.cross"));
  const auto ff = linear(tokens_of, c, 4 * c, "t.ff1");
  const auto gated = b.mul(b.slice(ff, 2, 0, 2 * c), b.unary("gelu", b.slice(ff, 2, 2 * c, 4 * c)));
  tokens_of = b.add(tokens_of, linear(gated, 2 * c, c, "t.ff2"));

  auto image = b.split_dim(b.transpose(tokens_of, {0, 2, 1}), 2, {dh, dw});
  image = b.concat({b.upsample_nearest(image, height, width), h}, 1);
  image = b.conv2d(image, b.weight("out.weight", {4, 2 * c, 3, 3}), b.weight("out.bias", {4, 1, 1}), 1, 1, "out");
  g.add_output("output", image);
  graph::verify(g);
  return g;
}

}  // namespace comfytp::test
