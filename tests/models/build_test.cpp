// The graphs of the families: inputs, outputs, tensors read, and work.
#include <gtest/gtest.h>

#include <algorithm>

#include "graph/rewrites.h"
#include "models/unet.h"
#include "shapes_only.h"

namespace comfytp::test {
namespace {

using graph::Graph;
using models::build_unet;
using models::detect_unet;
using models::UNet;
using models::unet_tensors;
using models::UNetCall;
using testing::Bool;
using testing::Combine;
using testing::Values;

UNet small(const std::string& family) { return detect_unet(*shapes_only(unet_tensors(family, DType::f16, 64))); }

std::map<std::string, Shape> inputs_of(const Graph& graph) {
  std::map<std::string, Shape> inputs;
  for (const auto* node : graph.all("input")) inputs[node->attrs.text("name")] = graph.type(node->outputs[0]).shape;
  return inputs;
}

class FamilyGraph : public testing::TestWithParam<std::tuple<const char*, std::pair<int, int>, bool>> {};

TEST_P(FamilyGraph, HasTheDocumentedInputsAndOutput) {
  const auto& [family, size, control] = GetParam();
  const DType compute = DType::bf16;
  const UNet unet = small(family);
  const UNetCall call{3, size.first, size.second, 154, control};
  const Graph graph = build_unet(unet, call, compute);

  std::map<std::string, Shape> expected = {
      {"x", {3, 4, size.first, size.second}}, {"timesteps", {3}}, {"context", {3, 154, unet.context_dim}}};
  if (unet.label_dim) expected["y"] = {3, *unet.label_dim};
  if (control)
    for (const auto& [name, shape] : models::control_inputs(unet, call)) expected[name] = shape;
  EXPECT_EQ(inputs_of(graph), expected);
  for (const auto* node : graph.all("input")) {
    const auto name = node->attrs.text("name");
    EXPECT_EQ(graph.type(node->outputs[0]).dtype, name == "timesteps" ? DType::f32 : compute) << name;
    EXPECT_EQ(node->attrs.text("varies"), name == "context" || name == "y" ? "prompt" : "call") << name;
  }
  ASSERT_EQ(graph.outputs().size(), 1u);
  EXPECT_EQ(graph.outputs()[0].name, "output");
  EXPECT_EQ(graph.type(graph.outputs()[0].value), (graph::Type{compute, {3, 4, size.first, size.second}}));
}

TEST_P(FamilyGraph, ReadsEveryTensorOnce) {
  const auto& [family, size, control] = GetParam();
  const UNet unet = small(family);
  std::map<std::string, std::int64_t> read;
  const Graph graph = build_unet(unet, {1, size.first, size.second, 77, control}, DType::f32);
  for (const auto* node : graph.all("weight"))
    EXPECT_TRUE(read.emplace(node->attrs.text("key"), numel(node->attrs.ints("full"))).second) << node->attrs.text("key");
  EXPECT_EQ(read.size(), unet.tensors.size());
  for (const auto& [key, info] : unet.tensors) EXPECT_EQ(read[key], numel(info.shape)) << key;
}

INSTANTIATE_TEST_SUITE_P(Families, FamilyGraph,
                         Combine(Values("sd1", "sd2", "sdxl", "sdxl-refiner"), Values(std::pair{72, 40}, std::pair{9, 7}, std::pair{1, 1}),
                                 Bool()));

// 65504 is soon left by sums of numbers of up to 448.
TEST(ScaledWeights, AreScaledBehindTheSumsAndInF16BeforeThem) {
  auto tensors = unet_tensors("sd1", DType::f16, 64);
  const std::vector<std::string> owners = {"middle_block.1.transformer_blocks.0.ff.net.0.proj", "input_blocks.1.0.in_layers.2"};
  for (const auto& owner : owners) {
    tensors[owner + ".weight"].dtype = DType::f8_e4m3;
    tensors[owner + ".weight_scale"] = {DType::f32, {}};
  }
  const UNet unet = detect_unet(*shapes_only(tensors));
  for (const DType compute : {DType::f32, DType::bf16, DType::f16}) {
    const Graph graph = build_unet(unet, {1, 8, 8, 77}, compute);
    std::size_t scaled = 0;
    for (const auto& node : graph.nodes()) {
      if (!graph::is(node, "mul") || graph.producer(node.inputs[1]).attrs.text_or("key", "").find("weight_scale") == std::string::npos) continue;
      ++scaled;
      const auto& before = graph.producer(node.inputs[0]);
      const bool projected = std::find(owners.begin(), owners.end(), before.name) != owners.end();
      EXPECT_EQ(projected, compute != DType::f16) << before.op->name();
    }
    EXPECT_EQ(scaled, 2u) << name_of(compute);
  }
}

TEST(ControlInputs, FollowTheInputBlocks) {
  const auto inputs = models::control_inputs(small("sdxl"), {2, 9, 7, 77, true});
  const std::vector<std::pair<std::string, Shape>> expected = {
      {"control.0", {2, 64, 9, 7}},  {"control.1", {2, 64, 9, 7}},      {"control.2", {2, 64, 9, 7}},  {"control.3", {2, 64, 5, 4}},
      {"control.4", {2, 128, 5, 4}}, {"control.5", {2, 128, 5, 4}},     {"control.6", {2, 128, 3, 2}}, {"control.7", {2, 256, 3, 2}},
      {"control.8", {2, 256, 3, 2}}, {"control.middle", {2, 256, 3, 2}}};
  EXPECT_EQ(inputs, expected);
}

// Counted by hand from the published configuration: 401,636,720,640 multiply-adds, of which 62 G are attention's two products;
// the others are the 339 GMACs that are commonly given.
TEST(Work, OfSD15At512x512IsThePublishedOne) {
  const Graph graph = build_unet(detect_unet(*shapes_only(unet_tensors("sd1", DType::f16))), {1, 64, 64, 77, false}, DType::f32);
  double products = 0, attention = 0, all = 0;
  for (const auto& node : graph.nodes()) {
    const double flops = node.op->flops(graph.context(node));
    all += flops;
    if (graph::is(node, "attention")) attention += flops;
    if (graph::is(node, "attention") || graph::is(node, "linear") || graph::is(node, "conv2d")) products += flops;
  }
  EXPECT_EQ(products, 2 * 401636720640.0);
  EXPECT_NEAR(products - attention, 0.68e12, 0.005e12);
  EXPECT_LT(all, 1.01 * products);
}

TEST(Build, RefusesACallWithoutSize) {
  const UNet unet = small("sd1");
  EXPECT_EQ(error_of([&] {
              build_unet(unet, {1, 0, 64, 77, false}, DType::f32);
            }),
            "[models] expected a call with batch, height, width and tokens of at least 1 but got batch 1, latent 0x64 and 77 tokens");
  EXPECT_EQ(error_of([&] { build_unet(unet, {}, DType::f8_e4m3); }),
            "[models] expected to compute in f32, bf16, f16 or f64 but got f8_e4m3");
}

// The prompt's part (keys and values of the text) is what hangs on the context alone.
TEST(Build, LeavesTheTextsKeysAndValuesToThePrologue) {
  const Graph graph = build_unet(small("sd1"), {1, 8, 8, 77, false}, DType::f32);
  const auto varies = graph::varies_per_call(graph);
  for (std::size_t i = 0; i < graph.nodes().size(); ++i) {
    const auto& node = graph.nodes()[i];
    if (!graph::is(node, "linear")) continue;
    EXPECT_EQ(varies[i], !(node.name.ends_with("attn2.to_k") || node.name.ends_with("attn2.to_v"))) << node.name;
  }
}

}  // namespace
}  // namespace comfytp::test
