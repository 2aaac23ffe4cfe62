// Small UNets of both constructions give what diffusers gives: diffusers_reference.py made the numbers.
#include <gtest/gtest.h>

#include <cmath>

#include "graph/evaluate.h"
#include "graph/rewrites.h"
#include "models/unet.h"
#include "shapes_only.h"
#include "small_unet.h"

namespace comfytp::test {
namespace {

using graph::Node;
using graph::RefTensor;
using models::UNet;
using models::UNetCall;

/// In [-1, 1): FNV-1a of the name and a mix of it with the element's number, 32 bit.
RefTensor uniform(const std::string& name, const Shape& shape) {
  std::uint32_t seed = 2166136261u;
  for (unsigned char byte : name) seed = (seed ^ byte) * 16777619u;
  RefTensor tensor(shape);
  for (std::size_t i = 0; i < tensor.data.size(); ++i) {
    std::uint32_t h = static_cast<std::uint32_t>(i) * 2654435761u + seed;
    for (std::uint32_t multiplier : {0x7FEB352Du, 0x846CA68Bu}) h = (h ^ (h >> 16)) * multiplier;
    tensor.data[i] = (h ^ (h >> 16)) / 2147483648.0 - 1;
  }
  return tensor;
}

RefTensor weight(const std::string& name, const Shape& shape) {
  RefTensor tensor = uniform(name, shape);
  const bool matrix = shape.size() > 1, bias = name.ends_with(".bias");
  const double fan_in = static_cast<double>(numel(shape) / shape[0]);
  for (auto& v : tensor.data) v = matrix ? v * std::sqrt(3 / fan_in) : 0.2 * v + (bias ? 0 : 1);
  return tensor;
}

struct Reference {
  bool linear;
  std::vector<double> every_15th;
};

class SmallUNet : public testing::TestWithParam<Reference> {};

TEST_P(SmallUNet, GivesWhatDiffusersGivesWithAnOddSizeAndControlResiduals) {
  const UNet unet = models::detect_unet(*shapes_only(small_unet(GetParam().linear)));
  const graph::Graph graph = models::build_unet(unet, UNetCall{2, 5, 3, 3, true}, DType::f32);
  const auto leaves = [&](const Node& node) {
    if (graph::is(node, "weight")) return weight(node.attrs.text("key"), unet.tensors.at(node.attrs.text("key")).shape);
    const auto name = node.attrs.text("name");
    RefTensor tensor = uniform(name, node.attrs.ints("shape"));
    if (name == "timesteps") tensor.data = {7.0, 2.5};
    return tensor;
  };
  const auto& expected = GetParam().every_15th;
  for (const auto& form : {graph, graph::normalise(graph), graph::fuse(graph::normalise(graph)),
                           graph::fuse(graph::normalise(graph), graph::Fusion::passes)}) {
    const RefTensor output = graph::evaluate(form, leaves).at("output");
    ASSERT_EQ(output.data.size(), 15 * expected.size());
    // diffusers takes the embedding of the timestep in single precision.
    for (std::size_t i = 0; i < expected.size(); ++i) EXPECT_NEAR(output.data[15 * i], expected[i], 1e-6) << i;
  }
}

INSTANTIATE_TEST_SUITE_P(
    Constructions, SmallUNet,
    testing::Values(
        Reference{false, {0.174878869, -0.184916071, 0.556816759, 0.349972026, 0.447053548, 0.093931667, 0.368842973, 0.538416005}},
        Reference{true, {0.309560928, -0.115013453, -0.079367639, -0.238226003, -0.053423289, 0.191111996, 0.963577444, -0.442580286}}),
    [](const auto& info) { return std::string(info.param.linear ? "SDXL" : "SD1"); });

}  // namespace
}  // namespace comfytp::test
