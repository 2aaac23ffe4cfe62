// patch: tokens and rows are divided wherever a model has them, with nothing exchanged but what attention needs.
#include <gtest/gtest.h>

#include <algorithm>

#include "graph/text.h"
#include "parity.h"
#include "sharding/strategy.h"
#include "totals.h"
#include "transformer.h"

namespace comfytp::test {
namespace {

using sharding::Mesh;
using sharding::Placement;

// Text tokens, fewer and more than a device's share, and rows of the image that divide evenly or not.
class Tokens : public ::testing::TestWithParam<std::tuple<const char*, const char*, std::tuple<int, int, int>>> {};

TEST_P(Tokens, OfTextAndImageAreDividedTogether) {
  const auto [kind, text, sizes] = GetParam();
  const auto [tokens, height, width] = sizes;
  const Graph graph = Transformer(kind, {2, 2 * height, 2 * width, tokens}).graph;
  const Mesh mesh = Mesh::parse(text);
  const auto decision = sharding::decide(graph, mesh);
  EXPECT_LT(error_of(graph, mesh, decision.assignment, Placement::resident, graph::Fusion::passes), 1e-9);
  for (const auto& note : decision.notes) EXPECT_EQ(note.find("arithmetic"), std::string::npos) << note;

  const auto parts = sharding::partition(graph, mesh, decision.assignment, Placement::resident);
  const int attentions = static_cast<int>(graph.all("attention").size());
  const int of_prompt = std::string(kind) == "cross" ? 2 : 0;  // whose keys and values all have
  for (const auto& device : parts.devices) {
    auto exchanged = totals(device).collectives;
    EXPECT_EQ(exchanged["all_gather"], attentions - of_prompt);  // keys and values at once
    exchanged.erase("all_gather");
    if (tokens == 1) exchanged.erase("halo_exchange");  // one token is not cut: all have it, and get its attention's row
    EXPECT_TRUE(exchanged.empty()) << exchanged.begin()->first;
    // Turning by angles is a step of a pass as it is where nothing is divided.
    EXPECT_EQ(graph::to_text(graph::fuse(device, graph::Fusion::passes)).find("rope") != std::string::npos, of_prompt == 0);
  }
}

INSTANTIATE_TEST_SUITE_P(Meshes, Tokens,
                         ::testing::Combine(::testing::Values("single", "cross"), ::testing::Values("patch=2", "patch=3", "patch=2:1"),
                                            ::testing::Values(std::tuple{4, 6, 2}, std::tuple{15, 3, 2}, std::tuple{1, 5, 3})),
                         [](const auto& info) {
                           const auto& sizes = std::get<2>(info.param);
                           return test_name(fmt::format("{}_{}_{}_{}x{}", std::get<0>(info.param), std::get<1>(info.param), std::get<0>(sizes),
                                                        std::get<1>(sizes), std::get<2>(sizes)));
                         });

TEST(TokensOfBoth, ShareTheWorkEvenly) {
  for (const char* kind : {"joint", "single", "cross"}) {
    const Graph graph = Transformer(kind, {1, 64, 64, 64}).graph;
    for (const int n : {2, 4}) {
      const Mesh mesh = Mesh::parse(fmt::format("patch={}", n));
      const auto parts = sharding::partition(graph, mesh, sharding::decide(graph, mesh).assignment, Placement::resident);
      for (const auto& device : parts.devices) EXPECT_LT(totals(device).flops, 1.12 * totals(graph).flops / n) << kind << " " << n;
    }
  }
}

// The longest sequence is not the one to divide evenly where it is read as keys alone.
TEST(TokensOfBoth, AreDividedByWhatTheyCost) {
  Graph g;
  Builder b(g, DType::f32);
  const auto linear = [&](ValueId x, const char* key) { return b.linear(x, b.weight(key, {16, 16})); };
  const auto heads = [&](ValueId x) { return b.transpose(b.split_dim(x, 2, {2, 8}), {0, 2, 1, 3}); };
  const ValueId x = linear(b.input("x", {1, 64, 16}, DType::f32), "in"), text = b.unary("silu", b.input("text", {1, 64, 16}, DType::f32));
  const ValueId keys = heads(b.concat({text, linear(x, "k")}, 1));
  const ValueId seen = b.merge_dims(b.transpose(b.attention(heads(linear(x, "q")), keys, keys, 0.3), {0, 2, 1, 3}), 2, 2);
  g.add_output("y", linear(b.add(x, seen), "out"));
  const Mesh mesh = Mesh::parse("patch=2");
  const auto decision = sharding::decide(g, mesh);
  EXPECT_LT(error_of(g, mesh, decision.assignment, Placement::gathered), 1e-9);
  for (const auto& device : sharding::partition(g, mesh, decision.assignment, Placement::resident).devices)
    EXPECT_LT(totals(device).flops, 0.55 * totals(g).flops);
}

// Frames, rows and channels in any order, and one frame alone.
class Films : public ::testing::TestWithParam<std::tuple<std::vector<std::size_t>, std::int64_t>> {};

TEST_P(Films, AreDividedAlongTheDimensionOfTheirTokens) {
  const auto& [order, frames] = GetParam();
  constexpr std::int64_t kChannels = 4, kRows = 6, kColumns = 2, kWidth = 8;
  const Shape plain = {1, frames, kRows, kColumns, kChannels};
  Shape film;
  graph::Ints there, back(order.size());
  for (std::size_t i = 0; i < order.size(); ++i) {
    film.push_back(plain[order[i]]);
    there.push_back(static_cast<std::int64_t>(std::find(order.begin(), order.end(), i) - order.begin()));
    back[i] = static_cast<std::int64_t>(order[i]);
  }
  Graph g;
  Builder b(g, DType::f32);
  const ValueId tokens = b.merge_dims(b.transpose(b.input("x", film, DType::f32), there), 1, 3);
  const ValueId x = b.linear(tokens, b.weight("in", {kWidth, kChannels}));
  const ValueId heads = b.transpose(b.split_dim(x, 2, {2, kWidth / 2}), {0, 2, 1, 3});
  const ValueId mixed = b.merge_dims(b.transpose(b.attention(heads, heads, heads, 0.5), {0, 2, 1, 3}), 2, 2);
  const ValueId y = b.split_dim(b.linear(mixed, b.weight("out", {kChannels, kWidth})), 1, {frames, kRows, kColumns});
  g.add_output("y", b.transpose(y, back));

  const Mesh mesh = Mesh::parse("patch=2");
  const auto decision = sharding::decide(g, mesh);
  EXPECT_TRUE(decision.notes.empty()) << decision.notes[0];
  EXPECT_LT(error_of(g, mesh, decision.assignment, Placement::resident), 1e-9);
  for (const auto& device : sharding::partition(g, mesh, decision.assignment, Placement::resident).devices)
    EXPECT_NEAR(totals(device).flops, totals(g).flops / 2, 1);
}

INSTANTIATE_TEST_SUITE_P(Orders, Films,
                         ::testing::Combine(::testing::Values(std::vector<std::size_t>{0, 4, 1, 2, 3}, std::vector<std::size_t>{0, 1, 4, 2, 3},
                                                              std::vector<std::size_t>{0, 1, 2, 3, 4}),
                                            ::testing::Values(4, 1)));

TEST(Rows, WorkThatTheyDoNotDivideIsSaid) {
  Graph g;
  Builder b(g, DType::f32);
  const ValueId x = b.linear(b.input("x", {1, 16, 8}, DType::f32), b.weight("w", {8, 8}));  // 2048 operations
  const ValueId time = b.linear(b.input("time", {1, 1, 128}, DType::f32), b.weight("t", {8, 128}));  // as many
  g.add_output("y", b.add(x, time));
  const auto notes = sharding::decide(g, Mesh::parse("patch=2")).notes;
  ASSERT_EQ(notes.size(), 1u);
  EXPECT_EQ(notes[0], "patch=2: 48 % of a step's arithmetic cannot be divided by rows, so every device of the axis does all of it");
}

}  // namespace
}  // namespace comfytp::test
