#include <gtest/gtest.h>

#include "graph/builder.h"
#include "graph/rewrites.h"
#include "random_graph.h"

namespace comfytp::graph {
namespace {

// Fuses, checks the values, and returns the new graph's nodes, leaves apart: "linear(bias,gelu) linear(bias,mul)".
std::string fused(const Graph& graph, Graph* result = nullptr) {
  const Graph after = fuse(graph);
  EXPECT_LE(test::difference(evaluate(graph, test::seeded_leaves()), evaluate(after, test::seeded_leaves())), 1e-12);
  std::string ops;
  for (const auto& node : after.nodes()) {
    if (node.inputs.empty()) continue;
    ops.append(ops.empty() ? "" : " ").append(node.op->name());
    const auto with = node.attrs.text_or("epilogue", node.attrs.text_or("activation", ""));
    if (!with.empty()) ops.append("(").append(with).append(")");
  }
  if (result) *result = after;
  return ops;
}

struct Fuse : testing::Test {
  Graph g;
  Builder b{g, DType::f32};
  ValueId x = b.input("x", {2, 3, 4}, DType::f32);
  ValueId image = b.input("image", {2, 4, 5, 3}, DType::f32);

  ValueId linear(ValueId in, std::int64_t o, const std::string& name) {
    return b.linear(in, b.weight(name + ".weight", {o, b.shape(in).back()}), b.weight(name + ".bias", {o}), name);
  }
  ValueId conv(ValueId in, std::int64_t o, std::int64_t extent, const std::string& name) {
    return b.conv2d(in, b.weight(name + ".weight", {o, b.shape(in)[1], extent, extent}), b.weight(name + ".bias", {o, 1, 1}), 1, extent / 2,
                    name);
  }
  ValueId norm_silu(ValueId in, const std::string& name) {
    const auto c = b.shape(in)[1];
    return b.unary("silu", b.group_norm(in, b.weight(name + ".weight", {c}), b.weight(name + ".bias", {c}), 2, 1e-5, name));
  }
};

TEST_F(Fuse, LeavesNormConvolutionAndSumOfAResBlock) {
  const auto emb = b.input("emb", {2, 4}, DType::f32);
  auto h = conv(norm_silu(image, "in"), 6, 3, "in_conv");
  h = b.add(h, b.split_dim(linear(b.unary("silu", emb), 6, "emb"), 1, {6, 1, 1}));
  h = conv(norm_silu(h, "out"), 6, 3, "out_conv");
  g.add_output("y", b.add(conv(image, 6, 1, "skip"), h));
  Graph after;
  EXPECT_EQ(fused(g, &after),
            "group_norm(silu) conv2d(bias) silu linear(bias) split_dim add group_norm(silu) conv2d(bias) conv2d(bias,add)");
  for (const Node* w : after.all("weight"))
    if (w->name.ends_with(".bias")) {
      EXPECT_EQ(w->attrs.ints("full").size(), 1u) << w->name;
    }
}

TEST_F(Fuse, LeavesThreeLinearsOfAGegluFeedForward) {
  const auto gate = linear(x, 8, "gate"), hidden = linear(x, 8, "hidden");
  const auto y = linear(b.mul(hidden, b.unary("gelu", gate)), 4, "out");
  g.add_output("y", b.add(y, x));
  EXPECT_EQ(fused(g), "linear(bias,gelu) linear(bias,mul) linear(bias,add)");
}

TEST_F(Fuse, GivesTheProductToTheHiddenLinearWhereverItStands) {
  const auto hidden = linear(x, 8, "hidden"), gate = linear(x, 8, "gate");
  g.add_output("y", b.mul(b.unary("gelu", gate), hidden));
  Graph after;
  EXPECT_EQ(fused(g, &after), "linear(bias,gelu) linear(bias,mul)");
  EXPECT_EQ(after.nodes().back().name, "hidden");
}

TEST_F(Fuse, TakesAResidualOnEitherSide) {
  g.add_output("a", b.add(x, linear(x, 4, "a")));
  g.add_output("b", b.add(linear(x, 4, "b"), x));
  EXPECT_EQ(fused(g), "linear(bias,add) linear(bias,add)");
}

TEST_F(Fuse, ChainsStepsInTheirOrder) {
  g.add_output("y", b.mul(b.unary("silu", b.add(b.unary("gelu", linear(x, 4, "a")), x)), x));
  EXPECT_EQ(fused(g), "linear(bias,gelu,add,silu,mul)");
}

TEST_F(Fuse, StopsAtEightInputs) {
  auto y = b.linear(x, b.weight("w", {4, 4}), "y");
  for (int i = 0; i < 8; ++i) y = b.add(y, x);
  g.add_output("y", y);
  EXPECT_EQ(fused(g), "linear(add,add,add,add,add,add) add add");
}

TEST_F(Fuse, ContinuesAnEpilogue) {
  const auto y = g.add("linear", {x, b.weight("w", {4, 4}), b.weight("b", {4})}, {{"epilogue", "bias"}});
  g.add_output("y", b.mul(b.unary("gelu", y), x));
  EXPECT_EQ(fused(g), "linear(bias,gelu,mul)");
}

TEST_F(Fuse, TakesABiasThatIsComputed) {
  const auto bias = b.unary("sin", b.weight("b", {6, 1, 1}));
  g.add_output("y", b.add(b.conv2d(image, b.weight("k", {6, 4, 1, 1}), -1, 1, 0), bias));
  EXPECT_EQ(fused(g), "sin merge_dims conv2d(bias)");
}

TEST_F(Fuse, KeepsWhatIsReadTwice) {
  const auto y = linear(x, 4, "a");
  g.add_output("y", b.unary("silu", y));
  g.add_output("z", y);
  EXPECT_EQ(fused(g), "linear(bias) silu");
}

TEST_F(Fuse, KeepsOperandsThatBroadcast) {
  g.add_output("a", b.add(linear(x, 4, "a"), b.weight("row", {1, 3, 1})));
  g.add_output("b", b.mul(linear(x, 4, "b"), b.weight("scale", {4})));
  g.add_output("c", b.add(linear(b.weight("one", {1, 4}), 4, "c"), x));
  EXPECT_EQ(fused(g), "linear(bias) add linear(bias) mul linear(bias) add");
}

TEST_F(Fuse, StopsAtACollective) {
  const auto sum = g.add("all_reduce", {b.linear(x, b.weight("w", {4, 4}), "a")}, {{"group", Ints{0}}, {"rank", 0}});
  g.add_output("y", b.add(sum, b.weight("b", {4})));
  EXPECT_EQ(fused(g), "linear all_reduce add");
}

TEST_F(Fuse, MovesNothingFromThePrologueIntoTheCall) {
  const auto time = linear(x, 4, "time"), label = linear(b.input("y", {2, 3, 4}, DType::f32, "prompt"), 4, "label");
  g.add_output("y", b.add(time, label));
  Graph after;
  EXPECT_EQ(fused(g, &after), "linear(bias) linear(bias,add)");
  EXPECT_EQ(after.nodes().back().name, "time");
}

}  // namespace
}  // namespace comfytp::graph
