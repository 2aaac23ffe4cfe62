// What is cut of the weights depends on the model and the mesh alone: so they are loaded once for calls of all shapes.
#include <gtest/gtest.h>

#include <set>

#include "graph/builder.h"
#include "graph/rewrites.h"
#include "models/shapes_only.h"
#include "models/unet.h"
#include "sharding/strategy.h"

namespace comfytp::test {
namespace {

using graph::Builder;
using graph::Graph;
using graph::Ints;
using graph::ValueId;
using sharding::Mesh;
using sharding::Placement;

struct Call {
  std::int64_t batch, height, width, tokens;  // of the latent
};
const std::vector<Call> kCalls = {{1, 64, 64, 77}, {2, 64, 64, 77}, {2, 128, 128, 231}, {1, 9, 13, 77}, {3, 128, 96, 1}, {16, 8, 8, 154}};

models::UNet unet_of(const std::string& family) { return models::detect_unet(*shapes_only(models::unet_tensors(family, DType::f16))); }

// A transformer as a capture gives it: merged projections, modulation by the timestep's embedding, a learned matrix added.
struct Transformer {
  static constexpr std::int64_t kWidth = 96, kHeads = 6, kText = 40;
  Graph graph;
  Builder b{graph, DType::f32};
  ValueId embedding = -1;

  ValueId linear(ValueId x, const std::string& key, std::int64_t out) {
    return b.linear(x, b.weight(key + ".weight", {out, b.shape(x).back()}), b.weight(key + ".bias", {out}), key);
  }
  ValueId norm(ValueId x, const std::string& key) {
    return b.layer_norm(x, b.weight(key + ".weight", {kWidth}), b.weight(key + ".bias", {kWidth}), 1e-6, key);
  }
  // Slice i of n along the channels.
  ValueId slice(ValueId x, std::int64_t i) { return b.slice(x, 2, i * kWidth, (i + 1) * kWidth); }
  ValueId heads(ValueId x) { return b.transpose(b.split_dim(x, 2, {kHeads, kWidth / kHeads}), {0, 2, 1, 3}); }
  ValueId attend(ValueId q, ValueId k, ValueId v) { return b.merge_dims(b.transpose(b.attention(q, k, v, 0.25), {0, 2, 1, 3}), 2, 2); }
  ValueId modulation(const std::string& key) {
    const ValueId m = linear(b.unary("silu", embedding), key, 6 * kWidth);
    return b.split_dim(m, 0, {b.shape(m)[0], 1});
  }
  ValueId feed_forward(ValueId x, const std::string& key) { return linear(b.unary("gelu_tanh", linear(x, key + ".0", 4 * kWidth)), key + ".2", kWidth); }
  ValueId gated(ValueId x, ValueId y, ValueId m, std::int64_t i) { return b.add(x, b.mul(y, slice(m, i))); }
  ValueId modulated(ValueId x, ValueId m, std::int64_t i) { return b.add(b.add(x, b.mul(x, slice(m, i))), slice(m, i + 1)); }

  // Image tokens and text tokens attend to each other, each with weights of their own (Flux, SD3).
  void joint_block(ValueId& image, ValueId& text, const std::string& key) {
    std::vector<ValueId> q, k, v, modulations;
    for (auto [stream, name] : {std::pair{text, ".text"}, {image, ".image"}}) {
      modulations.push_back(modulation(key + name + ".mod"));
      const ValueId qkv = linear(modulated(norm(stream, key + name + ".norm1"), modulations.back(), 0), key + name + ".qkv", 3 * kWidth);
      const auto normed = [&](std::int64_t i, const std::string& scale) {
        return graph.add("rms_norm", {heads(slice(qkv, i)), b.weight(key + name + scale, {kWidth / kHeads})}, {{"epsilon", 1e-6}});
      };
      q.push_back(normed(0, ".q_norm")), k.push_back(normed(1, ".k_norm")), v.push_back(heads(slice(qkv, 2)));
    }
    const auto tokens = b.shape(text)[1], all = tokens + b.shape(image)[1];
    const ValueId joint = attend(b.concat(q, 2), b.concat(k, 2), b.concat(v, 2));
    std::int64_t from = 0;
    for (auto [stream, name, m] : {std::tuple{&text, ".text", modulations[0]}, {&image, ".image", modulations[1]}}) {
      const auto to = from == 0 ? tokens : all;
      *stream = gated(*stream, linear(b.slice(joint, 1, from, to), key + name + ".proj", kWidth), m, 2);
      *stream = gated(*stream, feed_forward(modulated(norm(*stream, key + name + ".norm2"), m, 3), key + name + ".mlp"), m, 5);
      from = tokens;
    }
  }
  // Image tokens attend to each other, then to the text (PixArt, Wan).
  void cross_block(ValueId& image, ValueId text, const std::string& key) {
    const ValueId table = b.weight(key + ".table", {1, 6 * kWidth});
    const ValueId m = b.add(modulation(key + ".mod"), table);
    const ValueId qkv = linear(modulated(norm(image, key + ".norm1"), m, 0), key + ".qkv", 3 * kWidth);
    image = gated(image, linear(attend(heads(slice(qkv, 0)), heads(slice(qkv, 1)), heads(slice(qkv, 2))), key + ".proj", kWidth), m, 2);
    const ValueId q = heads(linear(image, key + ".q", kWidth)), kv = linear(text, key + ".kv", 2 * kWidth);
    image = b.add(image, linear(attend(q, heads(slice(kv, 0)), heads(slice(kv, 1))), key + ".out", kWidth));
    image = gated(image, feed_forward(modulated(norm(image, key + ".norm2"), m, 3), key + ".mlp"), m, 5);
  }

  Transformer(const std::string& kind, const Call& call) {
    const auto h = call.height / 2, w = call.width / 2;
    const ValueId x = b.input("x", {call.batch, 4, 2 * h, 2 * w}, DType::f32);
    const ValueId patches = b.conv2d(x, b.weight("patch.weight", {kWidth, 4, 2, 2}), b.weight("patch.bias", {kWidth, 1, 1}), 2, 0, "patch");
    ValueId image = b.transpose(b.merge_dims(patches, 2, 2), {0, 2, 1});
    image = b.add(image, b.slice(b.weight("positions", {1, 64 * 64, kWidth}), 1, 0, h * w));
    ValueId text = linear(b.input("context", {call.batch, call.tokens, kText}, DType::f32, "prompt"), "text", kWidth);
    const ValueId time = b.input("time", {call.batch, 32}, DType::f32);
    embedding = linear(b.unary("silu", linear(time, "time.0", kWidth)), "time.2", kWidth);
    for (int i = 0; i < 2; ++i) {
      const auto key = fmt::format("blocks.{}", i);
      if (kind == "joint") joint_block(image, text, key);
      else cross_block(image, text, key);
    }
    graph.add_output("output", linear(norm(image, "out.norm"), "out", 16));
    graph = graph::normalise(graph);
  }
};

Graph graph_of(const std::string& model, const Call& call) {
  if (model == "joint" || model == "cross") return Transformer(model, call).graph;
  static const std::map<std::string, models::UNet> unets = {{"sd1", unet_of("sd1")}, {"sdxl", unet_of("sdxl")}};
  return graph::normalise(models::build_unet(unets.at(model), {call.batch, call.height, call.width, call.tokens, false}, DType::f32));
}

// The parts of weights that each device holds.
using Parts = std::vector<std::set<std::string>>;
Parts parts_of(const sharding::Partition& partition) {
  Parts parts;
  for (const auto& device : partition.devices) {
    parts.emplace_back();
    for (const auto* weight : device.all("weight"))
      if (weight->attrs.text("key") != "positions")  // of which a call of few tokens reads the first
        parts.back().insert(weight->attrs.text("key") + to_string(weight->attrs.ints("offset")) + to_string(weight->attrs.ints("shape")));
  }
  return parts;
}

Parts parts_of(const Graph& graph, const Mesh& mesh, Placement placement) {
  return parts_of(sharding::partition(graph, mesh, sharding::decide(graph, mesh).assignment, placement));
}

class WeightsOfAllShapes : public ::testing::TestWithParam<std::tuple<const char*, const char*, Placement>> {};

TEST_P(WeightsOfAllShapes, AreCutAlike) {
  const auto [model, text, placement] = GetParam();
  const Mesh mesh = Mesh::parse(text);
  std::optional<Parts> first;
  for (const auto& call : kCalls) {
    const auto parts = parts_of(graph_of(model, call), mesh, placement);
    if (!first) first = parts;
    for (std::size_t d = 0; d < parts.size(); ++d) {
      std::vector<std::string> others;
      std::set_symmetric_difference(parts[d].begin(), parts[d].end(), (*first)[d].begin(), (*first)[d].end(), std::back_inserter(others));
      EXPECT_TRUE(others.empty()) << fmt::format("batch {} latent {}x{} tokens {}, device {}: {} parts, as {}", call.batch, call.height, call.width,
                                                 call.tokens, d, others.size(), others.empty() ? "" : others[0]);
    }
  }
}

std::string test_name(std::string name) {
  for (char& c : name)
    if (!std::isalnum(static_cast<unsigned char>(c))) c = '_';
  return name;
}

INSTANTIATE_TEST_SUITE_P(Models, WeightsOfAllShapes,
                         ::testing::Combine(::testing::Values("sd1", "joint", "cross"),
                                            ::testing::Values("tensor=2", "tensor=3", "batch=2,tensor=2", "patch=2,tensor=2"),
                                            ::testing::Values(Placement::resident)),
                         [](const auto& info) { return test_name(fmt::format("{}_{}", std::get<0>(info.param), std::get<1>(info.param))); });
INSTANTIATE_TEST_SUITE_P(LargeModels, WeightsOfAllShapes,
                         ::testing::Combine(::testing::Values("sdxl"), ::testing::Values("tensor=2"), ::testing::Values(Placement::resident)),
                         [](const auto& info) { return test_name(fmt::format("{}_{}", std::get<0>(info.param), std::get<1>(info.param))); });
INSTANTIATE_TEST_SUITE_P(Gathered, WeightsOfAllShapes,
                         ::testing::Combine(::testing::Values("sd1", "joint", "cross"), ::testing::Values("tensor=2", "batch=2", "patch=2,tensor=2"),
                                            ::testing::Values(Placement::gathered)),
                         [](const auto& info) { return test_name(fmt::format("{}_{}", std::get<0>(info.param), std::get<1>(info.param))); });

class Balance : public ::testing::TestWithParam<std::tuple<const char*, int>> {};

TEST_P(Balance, OfTwoDevicesIsNearHalf) {
  const auto [model, at] = GetParam();
  const auto sums = [](const Graph& graph) {
    std::pair<double, double> sum;
    for (const auto& node : graph.nodes()) {
      sum.first += node.op->flops(graph.context(node));
      if (graph::is(node, "weight")) sum.second += static_cast<double>(numel(graph.type(node.outputs[0]).shape));
    }
    return sum;
  };
  const auto graph = graph_of(model, kCalls[static_cast<std::size_t>(at)]);
  const Mesh mesh = Mesh::parse("tensor=2");
  const auto [flops, weights] = sums(graph);
  for (const auto& device : sharding::partition(graph, mesh, sharding::decide(graph, mesh).assignment, Placement::resident).devices) {
    EXPECT_LE(sums(device).first, 0.65 * flops);
    EXPECT_LE(sums(device).second, 0.60 * weights);
  }
}
INSTANTIATE_TEST_SUITE_P(Models, Balance, ::testing::Combine(::testing::Values("sd1", "sdxl"), ::testing::Values(0, 2, 3)),
                         [](const auto& info) { return fmt::format("{}_{}", std::get<0>(info.param), std::get<1>(info.param)); });

class GivenCuts : public ::testing::TestWithParam<const char*> {};

TEST_P(GivenCuts, OfOneShapeHoldForAnother) {
  const auto one = graph_of(GetParam(), kCalls[1]), other = graph_of(GetParam(), kCalls[3]);
  Mesh mesh = Mesh::parse("tensor=2");
  mesh.cuts = sharding::decide(one, mesh).cuts;
  ASSERT_FALSE(mesh.cuts.at("tensor").groups.empty());
  ASSERT_FALSE(mesh.cuts.at("tensor").alone.empty());
  EXPECT_EQ(sharding::decide(other, mesh).assignment, sharding::decide(other, Mesh::parse("tensor=2")).assignment);
}

TEST_P(GivenCuts, AreFollowed) {
  const auto graph = graph_of(GetParam(), kCalls[3]);
  Mesh mesh = Mesh::parse("tensor=2");
  const auto chosen = sharding::decide(graph, mesh).cuts.at("tensor");
  mesh.cuts["tensor"] = {{chosen.groups.begin(), chosen.groups.begin() + 1}, {}};
  const auto decision = sharding::decide(graph, mesh);
  ASSERT_EQ(decision.groups.size(), 1u);
  EXPECT_NE(decision.groups[0].find(chosen.groups[0]), std::string::npos);
  mesh.cuts["tensor"] = {};
  EXPECT_TRUE(sharding::decide(graph, mesh).assignment.empty());
}

TEST_P(GivenCuts, ThatTheModelLacksAreNamed) {
  const auto graph = graph_of(GetParam(), kCalls[3]);
  Mesh mesh = Mesh::parse("tensor=2");
  const auto group = sharding::decide(graph, mesh).cuts.at("tensor").groups[0];
  for (const auto& [cuts, name] : std::vector<std::pair<sharding::Cuts, std::string>>{
           {{{"nothing[0]"}, {}}, "nothing[0]"}, {{{}, {"nothing[0]"}}, "nothing[0]"}, {{{group, group}, {}}, group}}) {
    mesh.cuts["tensor"] = cuts;
    EXPECT_NE(error_of([&] { sharding::decide(graph, mesh); }).find("'" + name + "'"), std::string::npos);
  }
}

INSTANTIATE_TEST_SUITE_P(Models, GivenCuts, ::testing::Values("sd1", "joint", "cross"));

}  // namespace
}  // namespace comfytp::test
