// What is cut of the weights depends on the model and the mesh alone: so they are loaded once for calls of all shapes.
#include <gtest/gtest.h>

#include <set>

#include "graph/rewrites.h"
#include "models/shapes_only.h"
#include "models/unet.h"
#include "sharding/strategy.h"
#include "totals.h"
#include "transformer.h"

namespace comfytp::test {
namespace {

using graph::Graph;
using graph::Ints;
using sharding::Mesh;
using sharding::Placement;

const std::vector<Call> kCalls = {{1, 64, 64, 77}, {2, 64, 64, 77}, {2, 128, 128, 231}, {1, 9, 13, 77}, {3, 128, 96, 1}, {16, 8, 8, 154}};

models::UNet unet_of(const std::string& family) { return models::detect_unet(*shapes_only(models::unet_tensors(family, DType::f16))); }

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
  const auto graph = graph_of(model, kCalls[static_cast<std::size_t>(at)]);
  const Mesh mesh = Mesh::parse("tensor=2");
  const auto whole = totals(graph);
  for (const auto& device : sharding::partition(graph, mesh, sharding::decide(graph, mesh).assignment, Placement::resident).devices) {
    const auto part = totals(device);
    EXPECT_LE(part.flops, 0.65 * whole.flops);
    EXPECT_LE(static_cast<double>(part.weights), 0.60 * static_cast<double>(whole.weights));
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
