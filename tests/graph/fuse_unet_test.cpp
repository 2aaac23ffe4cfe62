// fuse() with passes on the UNets, whole and partitioned.
#include <gtest/gtest.h>

#include <map>

#include "graph/rewrites.h"
#include "models/small_unet.h"
#include "models/unet.h"
#include "random_graph.h"
#include "sharding/parity.h"
#include "sharding/strategy.h"

namespace comfytp::graph {
namespace {

Graph built(comfytp::test::Tensors tensors, std::int64_t batch, std::int64_t height, std::int64_t width, bool control = false) {
  const auto unet = models::detect_unet(*comfytp::test::shapes_only(std::move(tensors)));
  return normalise(models::build_unet(unet, {batch, height, width, 3, control}, DType::f32));
}
Graph narrow(const std::string& family) { return built(models::unet_tensors(family, DType::f32, 32), 2, 16, 16); }

std::map<std::string, int> counts(const Graph& graph) {
  std::map<std::string, int> result;
  for (const auto& node : graph.nodes()) ++result[std::string(node.op->name())];
  return result;
}

std::vector<Graph> fused(std::vector<Graph> devices) {
  for (auto& device : devices) device = fuse(device, Fusion::passes);
  return devices;
}

// A published family, narrow; its numbers of transformer blocks, transformers, ….
struct Family {
  const char* name;
  int blocks, transformers, res_blocks, resamplings;
};
class UNetPasses : public testing::TestWithParam<Family> {};

TEST_P(UNetPasses, LeaveNoLoneStepBehindAHeavyOp) {
  const auto& f = GetParam();
  auto after = counts(fuse(narrow(f.name), Fusion::passes));
  // The first norm of a transformer reads what proj_in's epilogue gives; the last block's sum goes to proj_out.
  EXPECT_EQ(after["fused_norm"], 3 * f.blocks - f.transformers);
  EXPECT_EQ(after["layer_norm"], f.transformers);
  EXPECT_EQ(after["gated_linear"], f.blocks);
  // Two in a transformer, two in a ResBlock, the first and the last convolution, and where the label is added to the time.
  const bool label = std::string(f.name) != "sd1" && std::string(f.name) != "sd2";
  EXPECT_EQ(after["pointwise"], 2 * f.transformers + 2 * f.res_blocks + f.resamplings + 2 + label);
  // The timestep times the frequencies.
  EXPECT_EQ(after["mul"], 1);
  for (const char* op : {"add", "gelu"}) EXPECT_EQ(after[op], 0) << op;
}

// Behind the sum of the devices' parts nothing is left but one pass.
TEST_P(UNetPasses, BeginAtCollectives) {
  const auto& f = GetParam();
  const Graph whole = narrow(f.name);
  const auto mesh = sharding::Mesh::parse("tensor=2");
  const auto parts = sharding::partition(whole, mesh, sharding::decide(whole, mesh).assignment, sharding::Placement::resident);
  for (const auto& device : fused(parts.devices)) {
    auto after = counts(device);
    EXPECT_EQ(after["fused_norm"], 3 * f.blocks - f.transformers);
    EXPECT_EQ(after["gated_linear"], f.blocks);
    EXPECT_EQ(after["add"] + after["gelu"], 0);
  }
}

INSTANTIATE_TEST_SUITE_P(Families, UNetPasses, testing::Values(Family{"sd1", 16, 16, 22, 6}, Family{"sdxl", 70, 11, 17, 4}),
                         [](const auto& info) { return std::string(info.param.name); });

class SmallUNetPasses : public testing::TestWithParam<bool> {};

TEST_P(SmallUNetPasses, KeepTheValues) {
  for (const auto& [batch, height, width] : {std::tuple{1, 3, 5}, {2, 4, 1}}) {
    const Graph before = built(comfytp::test::small_unet(GetParam()), batch, height, width, true);
    const auto expected = evaluate(before, test::seeded_leaves());
    EXPECT_LE(test::difference(expected, evaluate(fuse(before, Fusion::passes), test::seeded_leaves())), 1e-9) << batch;
  }
}

TEST_P(SmallUNetPasses, KeepTheValuesOfTwoDevices) {
  const Graph whole = built(comfytp::test::small_unet(GetParam()), 2, 3, 2, true);
  const auto leaves = comfytp::test::leaves_of(whole);
  for (const char* axes : {"tensor=2", "patch=2", "batch=2"}) {
    const auto mesh = sharding::Mesh::parse(axes);
    for (auto placement : {sharding::Placement::resident, sharding::Placement::gathered}) {
      const auto parts = sharding::partition(whole, mesh, sharding::decide(whole, mesh).assignment, placement);
      const auto expected = evaluate(parts.devices, leaves), results = evaluate(fused(parts.devices), leaves);
      for (std::size_t d = 0; d < results.size(); ++d) EXPECT_LE(test::difference(expected[d], results[d]), 1e-9) << axes << " " << d;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Constructions, SmallUNetPasses, testing::Bool(),
                         [](const auto& info) { return std::string(info.param ? "SDXL" : "SD1"); });

}  // namespace
}  // namespace comfytp::graph
