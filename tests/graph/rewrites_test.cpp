// Properties of all rewrites on random graphs.
#include "graph/rewrites.h"

#include <gtest/gtest.h>

#include "base/error.h"

#include "graph/text.h"
#include "random_graph.h"

namespace comfytp::graph {
namespace {

struct Rewrite {
  const char* name;
  Graph (*run)(const Graph&);
};
void PrintTo(const Rewrite& rewrite, std::ostream* out) { *out << rewrite.name; }

class RewriteOf : public testing::TestWithParam<std::tuple<Rewrite, int>> {
 protected:
  template <typename Check>
  void each(Check check) const {
    for (int i = 0; i < 25; ++i) {
      const Graph graph = test::random_graph(static_cast<std::uint32_t>(std::get<1>(GetParam()) * 1000 + i), 60);
      const Graph rewritten = std::get<0>(GetParam()).run(graph);
      check(graph, rewritten);
      if (HasFatalFailure()) FAIL() << to_text(graph) << "\nrewritten\n" << to_text(rewritten);
    }
  }
};

TEST_P(RewriteOf, KeepsTheValues) {
  const auto leaves = test::seeded_leaves();
  each([&](const Graph& graph, const Graph& rewritten) {
    ASSERT_NO_THROW(verify(rewritten));
    ASSERT_LE(test::difference(evaluate(graph, leaves), evaluate(rewritten, leaves)), 1e-12);
  });
}

TEST_P(RewriteOf, KeepsInputsAndOutputs) {
  each([&](const Graph& graph, const Graph& rewritten) {
    ASSERT_EQ(graph.all("input").size(), rewritten.all("input").size());
    ASSERT_EQ(graph.outputs().size(), rewritten.outputs().size());
    for (std::size_t i = 0; i < graph.outputs().size(); ++i) {
      ASSERT_EQ(graph.outputs()[i].name, rewritten.outputs()[i].name);
      ASSERT_EQ(graph.type(graph.outputs()[i].value), rewritten.type(rewritten.outputs()[i].value));
    }
  });
}

TEST_P(RewriteOf, FindsNothingMoreInItsOwnResult) {
  each([&](const Graph&, const Graph& rewritten) { ASSERT_EQ(to_text(std::get<0>(GetParam()).run(rewritten)), to_text(rewritten)); });
}

const Rewrite kRewrites[] = {
    {"normalise", normalise},
    {"fuse", [](const Graph& g) { return fuse(g); }},
    {"fuse_into_passes", [](const Graph& g) { return fuse(g, Fusion::passes); }},
    {"fuse_normalised", [](const Graph& g) { return fuse(normalise(g)); }},
    {"fuse_normalised_into_passes", [](const Graph& g) { return fuse(normalise(g), Fusion::passes); }},
    {"prune", prune}};
INSTANTIATE_TEST_SUITE_P(Random, RewriteOf, testing::Combine(testing::ValuesIn(kRewrites), testing::Range(0, 6)), [](const auto& info) {
  return std::string(std::get<0>(info.param).name) + std::to_string(std::get<1>(info.param));
});

// The prologue is closed: what runs once per prompt reads nothing that changes with the call.
TEST(VariesPerCall, GrowsAlongTheGraph) {
  for (std::uint32_t seed = 0; seed < 50; ++seed) {
    const Graph g = test::random_graph(seed, 60);
    const auto varies = varies_per_call(g);
    for (std::size_t i = 0; i < g.nodes().size(); ++i)
      for (ValueId id : g.nodes()[i].inputs) EXPECT_LE(varies[static_cast<std::size_t>(g.value(id).node)], varies[i]);
  }
}

TEST(VariesPerCall, FollowsTheInputsThatVary) {
  const Graph g = parse(R"(
    %0 = input() {name="x", shape=[2,4], dtype="f32"}
    %1 = input() {name="context", shape=[2,4], dtype="f32", varies="prompt"}
    %2 = weight() {key="w", dtype="f32", full=[4,4], offset=[0,0], shape=[4,4]}
    %3 = linear(%1, %2)
    %4 = all_reduce(%3) {group=[0,1], rank=0}
    %5 = all_reduce(%0) {group=[0,1], rank=0}
    %6 = add(%4, %5)
    output y = %6)");
  EXPECT_EQ(varies_per_call(g), (std::vector<bool>{true, false, false, false, false, true, true}));
}

TEST(VariesPerCall, FetchesAWeightInTheCallThatUsesIt) {
  const Graph g = parse(R"(
    %0 = input() {name="x", shape=[2,4], dtype="f32"}
    %1 = input() {name="context", shape=[2,4], dtype="f32", varies="prompt"}
    %2 = weight() {key="w", dtype="f32", full=[4,4], offset=[0,0], shape=[2,4]}
    %3 = fetch_weight(%2) {group=[0,1], rank=0, dim=0, bounds=[0,2,4]}
    %4 = linear(%0, %3)
    %5 = weight() {key="b", dtype="f32", full=[4,1], offset=[0,0], shape=[2,1]}
    %6 = fetch_weight(%5) {group=[0,1], rank=0, dim=0, bounds=[0,2,4]}
    %7 = merge_dims(%6) {dim=0, count=2}
    %8 = add(%4, %7)
    %9 = weight() {key="v", dtype="f32", full=[4,4], offset=[0,0], shape=[2,4]}
    %10 = fetch_weight(%9) {group=[0,1], rank=0, dim=0, bounds=[0,2,4]}
    %11 = linear(%1, %10)
    %12 = mul(%11, %8)
    output y = %12)");
  const auto varies = varies_per_call(g);
  for (int i : {3, 6, 7}) EXPECT_TRUE(varies[i]) << i;
  for (int i : {2, 5, 9, 10, 11}) EXPECT_FALSE(varies[i]) << i;
}

TEST(MultiplyInFp8, AsksOfLinearsOverSuchWeightsAndIsKept) {
  const Graph g = multiply_in_fp8(parse(R"(
    %0 = input() {name="x", shape=[64,32], dtype="f32"}
    %1 = weight() {key="w", dtype="f32", full=[48,32], offset=[0,0], shape=[48,32]}
    %2 = weight() {key="v", dtype="f32", full=[48,32], offset=[0,0], shape=[48,32]}
    %3 = linear(%0, %1)
    %4 = linear(%0, %2)
    %5 = gelu(%4)
    %6 = mul(%3, %5)
    %7 = weight() {key="u", dtype="f32", full=[16,48], offset=[0,0], shape=[16,48]}
    %8 = weight() {key="b", dtype="f32", full=[16], offset=[0], shape=[16]}
    %9 = linear(%6, %7)
    %10 = add(%9, %8)
    %11 = weight() {key="wide", dtype="f32", full=[16,16], offset=[0,0], shape=[16,16]}
    %12 = linear(%10, %11)
    output y = %10
    output z = %12)"), [](const std::string& key) { return key != "wide"; });
  for (auto fusion : {Fusion::epilogues, Fusion::passes}) {
    const Graph fused = fuse(g, fusion);
    std::size_t linears = 0, joined = 0;
    for (const auto& node : fused.nodes()) {
      EXPECT_FALSE(is(node, "gated_linear")) << "which has no product in fp8";
      const bool asks = is(node, "linears") || (is(node, "linear") && fused.producer(node.inputs[1]).attrs.text_or("key", "") != "wide");
      EXPECT_EQ(node.attrs.text_or("product", ""), asks ? "fp8" : "") << node.op->name();
      linears += is(node, "linear") && asks;
      joined += is(node, "linears");
    }
    EXPECT_EQ(linears, fusion == Fusion::passes ? 1u : 3u);
    EXPECT_EQ(joined, fusion == Fusion::passes ? 1u : 0u);
    EXPECT_EQ(fused.producer(fused.outputs()[0].value).attrs.text_or("epilogue", ""), "bias");
  }
  const std::string text = R"(%0 = input() {name="x", shape=[2,2], dtype="f32"}
    %1 = linear(%0, %0) {product="int4"}
    output y = %1)";
  EXPECT_THROW(parse(text), Error);
}

}  // namespace
}  // namespace comfytp::graph
