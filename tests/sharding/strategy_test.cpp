// A small denoiser cut by the strategy, along every axis and combination, with both placements: equal to the whole, with
// the work and the weights divided.
#include <gtest/gtest.h>

#include "base/error.h"
#include "graph/builder.h"
#include "graph/rewrites.h"
#include "parity.h"
#include "sharding/strategy.h"
#include "totals.h"

namespace comfytp::test {
namespace {

using graph::Builder;
using graph::Ints;
using graph::ValueId;
using sharding::Mesh;
using sharding::Placement;

// One of everything that a UNet is made of, narrow: two resolutions of odd sizes, a skip, self and cross attention.
struct SmallUNet {
  Graph graph;
  Builder b{graph, DType::f32};
  static constexpr std::int64_t kBatch = 3, kHeads = 3, kHeadDim = 4, kGroups = 4, kText = 5;

  ValueId vector(const std::string& key, std::int64_t size) { return b.weight(key, {size}); }
  ValueId linear(ValueId x, const std::string& key, std::int64_t out, bool bias = true) {
    const ValueId w = b.weight(key + ".weight", {out, b.shape(x).back()});
    return b.linear(x, w, bias ? vector(key + ".bias", out) : -1, key);
  }
  ValueId conv(ValueId x, const std::string& key, std::int64_t out, std::int64_t size, std::int64_t stride = 1) {
    const ValueId k = b.weight(key + ".weight", {out, b.shape(x)[1], size, size});
    return b.conv2d(x, k, b.weight(key + ".bias", {out, 1, 1}), stride, size / 2, key);
  }
  ValueId norm(ValueId x, const std::string& key) {
    const auto c = b.shape(x)[1];
    return b.group_norm(x, vector(key + ".weight", c), vector(key + ".bias", c), kGroups, 1e-5, key);
  }
  ValueId resblock(ValueId x, ValueId emb, const std::string& key, std::int64_t out) {
    ValueId h = conv(b.unary("silu", norm(x, key + ".norm1")), key + ".conv1", out, 3);
    h = b.add(h, b.split_dim(linear(b.unary("silu", emb), key + ".emb", out), 1, {out, 1, 1}));
    h = conv(b.unary("silu", norm(h, key + ".norm2")), key + ".conv2", out, 3);
    return b.add(b.shape(x)[1] == out ? x : conv(x, key + ".skip", out, 1), h);
  }
  ValueId attention(ValueId x, ValueId context, const std::string& key) {
    const auto c = b.shape(x).back();
    const auto heads = [&](ValueId v, const char* name) {
      return b.transpose(b.split_dim(linear(v, key + name, kHeads * kHeadDim, false), 2, {kHeads, kHeadDim}), {0, 2, 1, 3});
    };
    const ValueId a = b.attention(heads(x, ".q"), heads(context, ".k"), heads(context, ".v"), 0.5, key);
    return linear(b.merge_dims(b.transpose(a, {0, 2, 1, 3}), 2, 2), key + ".out", c);
  }
  ValueId transformer(ValueId x, ValueId context, const std::string& key) {
    const auto s = b.shape(x);
    const auto layer_norm = [&](ValueId v, const std::string& name) {
      return b.layer_norm(v, vector(name + ".weight", s[1]), vector(name + ".bias", s[1]), 1e-5, name);
    };
    ValueId t = linear(b.transpose(b.merge_dims(norm(x, key + ".norm"), 2, 2), {0, 2, 1}), key + ".proj_in", s[1]);
    ValueId n = layer_norm(t, key + ".norm1");
    t = b.add(t, attention(n, n, key + ".attn1"));
    t = b.add(t, attention(layer_norm(t, key + ".norm2"), context, key + ".attn2"));
    const ValueId merged = linear(layer_norm(t, key + ".norm3"), key + ".ff1", 8 * s[1]);
    const ValueId geglu = b.mul(b.slice(merged, 2, 0, 4 * s[1]), b.unary("gelu", b.slice(merged, 2, 4 * s[1], 8 * s[1])));
    t = b.add(t, linear(geglu, key + ".ff2", s[1]));
    t = b.split_dim(b.transpose(linear(t, key + ".proj_out", s[1]), {0, 2, 1}), 2, {s[2], s[3]});
    return b.add(t, x);
  }

  SmallUNet(std::int64_t batch = kBatch, std::int64_t height = 9, std::int64_t width = 5) {
    const ValueId x = b.input("x", {batch, 4, height, width}, DType::f32);
    const ValueId context = b.input("context", {batch, kText, 6}, DType::f32, "prompt");
    const ValueId emb = linear(b.unary("silu", linear(b.input("emb", {batch, 8}, DType::f32), "time.0", 16)), "time.2", 16);
    const ValueId top = resblock(conv(x, "in", 8, 3), emb, "res0", 8);
    ValueId h = conv(top, "down", 8, 3, 2);
    h = transformer(resblock(h, emb, "res1", 16), context, "attn");
    h = conv(b.upsample_nearest(h, height, width), "up", 16, 3);
    h = resblock(b.concat({h, top}, 1), emb, "res2", 8);
    graph.add_output("output", conv(b.unary("silu", norm(h, "out.norm")), "out", 4, 3));
    graph = graph::normalise(graph);
  }
};

class EveryMesh : public ::testing::TestWithParam<std::tuple<const char*, Placement>> {};

TEST_P(EveryMesh, EqualsTheWhole) {
  const auto [text, placement] = GetParam();
  const SmallUNet unet;
  const Mesh mesh = Mesh::parse(text);
  EXPECT_LT(error_of(unet.graph, mesh, sharding::decide(unet.graph, mesh).assignment, placement), 1e-9);
}

INSTANTIATE_TEST_SUITE_P(
    Meshes, EveryMesh,
    ::testing::Combine(::testing::Values("tensor=1", "tensor=2", "tensor=3", "tensor=4", "tensor=8", "tensor=2:1", "batch=2", "batch=3", "batch=5",
                                         "patch=2", "patch=3", "patch=4", "patch=8", "patch=1:2", "batch=2,tensor=2", "patch=2,tensor=2",
                                         "batch=2,patch=2", "batch=2,patch=2,tensor=2", "tensor=2,patch=3", "tensor=3,batch=2"),
                       ::testing::Values(Placement::resident, Placement::gathered)),
    [](const auto& info) {
      return test_name(std::string(std::get<0>(info.param)) + (std::get<1>(info.param) == Placement::gathered ? "_gathered" : "_resident"));
    });

TEST(Strategy, TensorDividesWorkAndWeightsWithOneSumABlock) {
  const SmallUNet unet(2, 8, 8);
  const Mesh mesh = Mesh::parse("tensor=2");
  const auto parts = sharding::partition(unet.graph, mesh, sharding::decide(unet.graph, mesh).assignment, Placement::resident);
  const auto whole = totals(unet.graph);
  for (const auto& device : parts.devices) {
    auto part = totals(device);
    EXPECT_LE(part.flops, 0.60 * whole.flops);
    EXPECT_LE(static_cast<double>(part.weights), 0.60 * static_cast<double>(whole.weights));
    // The time embedding, three ResBlocks (shortcuts join their sums), two attentions, one feed-forward.
    EXPECT_EQ(part.collectives["all_reduce"], 7);
    EXPECT_EQ(part.collectives["reduce_scatter"] + part.collectives["halo_exchange"], 0);
    // in, down, up, proj_in and proj_out are cut by output channels; out is too, and handed over in parts.
    EXPECT_EQ(part.collectives["all_gather"], 5);
  }
}

TEST(Strategy, WhatSavesLessThanItSendsStaysWhole) {
  const SmallUNet unet(2, 8, 8);
  const Mesh mesh = Mesh::parse("tensor=2");
  const auto decision = sharding::decide(unet.graph, mesh, 20);
  EXPECT_LT(error_of(unet.graph, mesh, decision.assignment, Placement::resident), 1e-9);
  EXPECT_LT(error_of(unet.graph, mesh, decision.assignment, Placement::gathered), 1e-9);
  const auto parts = sharding::partition(unet.graph, mesh, decision.assignment, Placement::resident);
  const auto varies = graph::varies_per_call(parts.devices[0]);
  std::map<std::string, int> step;
  for (std::size_t i = 0; i < varies.size(); ++i)
    if (const auto& node = parts.devices[0].nodes()[i]; varies[i] && node.op->collective()) ++step[std::string(node.op->name())];
  // Without the time embedding and the prompt's attention, whose q and output multiply 12 times a channel that is sent; nor are proj_in and
  // proj_out cut, 16 times. The other attention's own tokens count for it.
  EXPECT_EQ(step["all_reduce"], 5);
  EXPECT_EQ(step["all_gather"], 3);
  // The prompt's keys and values cost a step nothing.
  EXPECT_EQ(totals(parts.devices[0]).collectives["all_gather"], 5);
  ASSERT_EQ(decision.notes.size(), 2u);
  EXPECT_NE(decision.notes[0].find("attn.attn2"), std::string::npos) << decision.notes[0];
  EXPECT_NE(decision.notes[0].find("not divided: 2 groups of layers"), std::string::npos) << decision.notes[0];
  // What was decided so is followed without the bound.
  Mesh given = mesh;
  given.cuts = decision.cuts;
  EXPECT_EQ(sharding::decide(unet.graph, given).assignment.size(), decision.assignment.size());
}

TEST(Strategy, BatchNeedsNoCollective) {
  const SmallUNet unet(2);
  const Mesh mesh = Mesh::parse("batch=2");
  const auto parts = sharding::partition(unet.graph, mesh, sharding::decide(unet.graph, mesh).assignment, Placement::resident);
  for (const auto& device : parts.devices) {
    EXPECT_TRUE(totals(device).collectives.empty());
    EXPECT_NEAR(totals(device).flops, totals(unet.graph).flops / 2, 1);
  }
}

TEST(Strategy, GatheredStoresAPartOfTheWeightsOnEveryDevice) {
  const SmallUNet unet;
  for (const char* text : {"batch=3", "patch=3"}) {
    const Mesh mesh = Mesh::parse(text);
    const auto parts = sharding::partition(unet.graph, mesh, sharding::decide(unet.graph, mesh).assignment, Placement::gathered);
    for (const auto& device : parts.devices)
      EXPECT_LE(static_cast<double>(totals(device).weights), 0.45 * static_cast<double>(totals(unet.graph).weights)) << text;
  }
}

// All sizes and meshes run over weights that are loaded once.
TEST(Strategy, GatheredStoresAWeightOnTheSameDeviceWhateverTheMeshAndTheCall) {
  const auto stored = [](const SmallUNet& unet, const char* text) {
    const Mesh mesh = Mesh::parse(text);
    const auto parts = sharding::partition(unet.graph, mesh, sharding::decide(unet.graph, mesh).assignment, Placement::gathered);
    std::set<std::tuple<std::size_t, std::string, graph::Ints, graph::Ints>> all;
    for (std::size_t d = 0; d < parts.devices.size(); ++d)
      for (const auto* node : parts.devices[d].all("weight"))
        if (numel(parts.devices[d].type(node->outputs[0]).shape) > 0)
          all.emplace(d, node->attrs.text("key"), node->attrs.ints("offset"), node->attrs.ints("shape"));
    return all;
  };
  const auto once = stored(SmallUNet(2), "batch=2");
  EXPECT_EQ(stored(SmallUNet(2), "patch=2"), once);
  EXPECT_EQ(stored(SmallUNet(1), "patch=2"), once);
}

TEST(Strategy, UnevenAndImpossibleCutsAreSaid) {
  const SmallUNet unet(1);
  const auto notes_of = [&](const char* mesh) {
    std::string all;
    for (const auto& note : sharding::decide(unet.graph, Mesh::parse(mesh)).notes) all += note + "\n";
    return all;
  };
  EXPECT_NE(notes_of("batch=2").find("batch=2"), std::string::npos);
  EXPECT_NE(notes_of("tensor=2").find("3 units over 2 devices are uneven (2+1)"), std::string::npos) << notes_of("tensor=2");
  EXPECT_EQ(notes_of("tensor=2:1"), "") << "as asked";
  EXPECT_NE(notes_of("tensor=5:1").find("3 units cannot be shared out as 5:1, and are"), std::string::npos) << notes_of("tensor=5:1");
  EXPECT_NE(notes_of("tensor=8").find("(1+1+1+0+0+0+0+0)"), std::string::npos) << notes_of("tensor=8");
}

TEST(Mesh, ParsesAndPrints) {
  for (const char* text : {"tensor=2", "batch=2,tensor=3", "tensor=2:1", "batch=2,patch=2,tensor=2"}) EXPECT_EQ(Mesh::parse(text).to_string(), text);
  const Mesh mesh = Mesh::parse("batch=2,tensor=3");
  EXPECT_EQ(mesh.size(), 6);
  EXPECT_EQ(mesh.group(4, 1), (std::vector<std::int64_t>{3, 4, 5}));
  EXPECT_EQ(mesh.group(4, 0), (std::vector<std::int64_t>{1, 4}));
  EXPECT_EQ(mesh.coordinate(4, 1), 1);
}

class BadMesh : public ::testing::TestWithParam<const char*> {};
TEST_P(BadMesh, IsRefusedWithTheItem) {
  try {
    Mesh::parse(GetParam());
    FAIL() << GetParam();
  } catch (const Error& e) {
    EXPECT_EQ(std::string(e.what()).rfind("[mesh] expected", 0), 0u) << e.what();
  }
}
INSTANTIATE_TEST_SUITE_P(Texts, BadMesh,
                         ::testing::Values("", "tensor", "tensor=", "tensor=0", "tensor=-2", "tensor=2,tensor=2", "channel=2", "tensor=2x", "tensor=2:0",
                                           "tensor=2:", "tensor=99", "batch=16,tensor=16", "tensor=2,"));

}  // namespace
}  // namespace comfytp::test
