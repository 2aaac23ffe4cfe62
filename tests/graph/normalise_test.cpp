#include <gtest/gtest.h>

#include "graph/builder.h"
#include "graph/rewrites.h"
#include "graph/text.h"
#include "random_graph.h"

namespace comfytp::graph {
namespace {

// Normalises, checks the values, and returns what the new graph consists of, leaves apart: "linear add linear".
std::string ops_after(const Graph& graph, Graph* result = nullptr) {
  const Graph normal = normalise(graph);
  EXPECT_LE(test::difference(evaluate(graph, test::seeded_leaves()), evaluate(normal, test::seeded_leaves())), 1e-12);
  std::string ops;
  for (const auto& node : normal.nodes())
    if (!node.inputs.empty()) ops.append(ops.empty() ? "" : " ").append(node.op->name());
  if (result) *result = normal;
  return ops;
}

struct Normalise : testing::Test {
  Graph g;
  Builder b{g, DType::f32};
  ValueId x = b.input("x", {2, 3, 4}, DType::f32);
  ValueId image = b.input("image", {2, 4, 5, 3}, DType::f32);
};

TEST_F(Normalise, TellsAMergedQkvApart) {
  const auto qkv = b.linear(x, b.weight("qkv.weight", {12, 4}), b.weight("qkv.bias", {12}), "qkv");
  for (int i = 0; i < 3; ++i) g.add_output("qkv"[i] + std::string(), b.slice(qkv, 2, 4 * i, 4 * i + 4));
  Graph normal;
  EXPECT_EQ(ops_after(g, &normal), "linear add linear add linear add");
  std::vector<Ints> offsets;
  for (const Node* w : normal.all("weight")) {
    offsets.push_back(w->attrs.ints("offset"));
    EXPECT_EQ(w->attrs.ints("full")[0], 12);
    EXPECT_EQ(w->attrs.ints("shape")[0], 4);
  }
  EXPECT_EQ(offsets, (std::vector<Ints>{{0, 0}, {0}, {4, 0}, {4}, {8, 0}, {8}}));
}

// As a weight in fp8 is scaled: by one number behind the sums.
TEST_F(Normalise, TellsAMergedProjectionApartThroughItsScale) {
  const auto y = b.mul(b.weight("w.scale", {1}), b.linear(x, b.weight("w", {12, 4}), "w"));
  const auto z = b.add(b.mul(b.add(y, b.weight("bias", {12})), b.weight("gain", {12})), b.constant({1}, {0.5}, DType::f32));
  g.add_output("a", b.slice(z, 2, 0, 5));
  g.add_output("b", b.slice(z, 2, 5, 12));
  Graph normal;
  EXPECT_EQ(ops_after(g, &normal), "linear mul add mul add linear mul add mul add");
  std::vector<Ints> shapes;
  for (const Node* w : normal.all("weight")) shapes.push_back(w->attrs.ints("shape"));
  EXPECT_EQ(shapes, (std::vector<Ints>{{1}, {5, 4}, {5}, {5}, {7, 4}, {7}, {7}}));
}

// As timm writes it: reshape to [n, l, 3, heads, d], permute to [3, n, heads, l, d], then index.
TEST_F(Normalise, TellsAMergedQkvApartThroughSplitAndTranspose) {
  auto qkv = b.linear(x, b.weight("qkv.weight", {12, 4}), b.weight("qkv.bias", {12}), "qkv");
  qkv = b.transpose(b.split_dim(qkv, 2, {3, 2, 2}), {2, 0, 3, 1, 4});
  ValueId part[3];
  for (int i = 0; i < 3; ++i) part[i] = b.merge_dims(b.slice(qkv, 0, i, i + 1), 0, 2);
  g.add_output("y", b.attention(part[0], part[1], part[2], 0.5));
  Graph normal;
  ops_after(g, &normal);
  EXPECT_EQ(normal.all("linear").size(), 3u);
  EXPECT_TRUE(normal.all("slice").empty());
}

// As in a block whose attention and feed-forward share their last linear.
TEST_F(Normalise, TellsTheInputsOfALinearApart) {
  const auto a = b.linear(x, b.weight("a", {5, 4}), "a"), f = b.unary("silu", b.linear(x, b.weight("f", {7, 4}), "f"));
  g.add_output("y", b.linear(b.concat({a, f}, 2), b.weight("out", {3, 12}), b.weight("bias", {3}), "out"));
  Graph normal;
  EXPECT_EQ(ops_after(g, &normal), "linear linear silu linear linear add add");
  std::vector<Ints> offsets;
  for (const Node* w : normal.all("weight"))
    if (w->attrs.text("key") == "out") offsets.push_back(w->attrs.ints("offset"));
  EXPECT_EQ(offsets, (std::vector<Ints>{{0, 0}, {0, 5}}));
}

TEST_F(Normalise, LeavesALinearOverConcatenatedInputs) {
  g.add_output("y", b.linear(b.concat({b.unary("sin", x), b.unary("cos", x)}, 2), b.weight("out", {3, 8}), "out"));
  EXPECT_EQ(ops_after(g), "sin cos concat linear");
}

TEST_F(Normalise, TellsSlicesApartThatOverlapOrLeaveGaps) {
  const auto y = b.linear(x, b.weight("w", {12, 4}), "y");
  g.add_output("a", b.slice(y, 2, 0, 5));
  g.add_output("b", b.slice(y, 2, 3, 7));
  g.add_output("c", b.slice(y, 2, 3, 7));
  EXPECT_EQ(ops_after(g), "linear linear");
}

TEST_F(Normalise, TellsAMergedConvolutionApart) {
  const auto y = b.conv2d(image, b.weight("k", {6, 4, 3, 3}), b.weight("b", {6, 1, 1}), 2, 1, "conv");
  g.add_output("a", b.slice(y, 1, 0, 2));
  g.add_output("b", b.slice(y, 1, 2, 6));
  EXPECT_EQ(ops_after(g), "conv2d add conv2d add");
}

TEST_F(Normalise, LeavesAGroupedConvolutionWhole) {
  const auto y = g.add("conv2d", {image, b.weight("k", {6, 2, 1, 1})}, {{"stride", Ints{1, 1}}, {"padding", Ints(4, 0)}, {"groups", 2}});
  g.add_output("a", b.slice(y, 1, 0, 3));
  EXPECT_EQ(ops_after(g), "conv2d slice");
}

TEST_F(Normalise, LeavesAProjectionWholeThatIsReadWhole) {
  const auto y = b.linear(x, b.weight("w", {12, 4}), b.weight("b", {12}), "y");
  g.add_output("part", b.slice(y, 2, 0, 4));
  g.add_output("whole", y);
  EXPECT_EQ(ops_after(g), "linear add slice");
}

TEST_F(Normalise, LeavesAProjectionWholeThatIsSlicedAlongItsRows) {
  const auto y = b.linear(x, b.weight("w", {12, 4}), "y");
  g.add_output("part", b.slice(y, 2, 0, 4));
  g.add_output("rows", b.slice(y, 1, 0, 1));
  EXPECT_EQ(ops_after(g), "linear slice slice");
}

TEST_F(Normalise, GivesEpiloguesNodesOfTheirOwn) {
  const auto other = b.weight("other", {2, 3, 6});
  const auto y = g.add("linear", {x, b.weight("w", {6, 4}), b.weight("b", {6}), other}, {{"epilogue", "bias,gelu,mul"}});
  const auto c = g.add("conv2d", {image, b.weight("k", {6, 4, 1, 1}), b.weight("kb", {6})},
                       {{"stride", Ints{1, 1}}, {"padding", Ints(4, 0)}, {"epilogue", "bias,silu"}});
  const auto n =
      g.add("group_norm", {c, b.weight("nw", {6}), b.weight("nb", {6})}, {{"groups", 2}, {"epsilon", 0.1}, {"activation", "silu"}});
  g.add_output("y", y);
  g.add_output("n", n);
  EXPECT_EQ(ops_after(g), "linear add gelu mul conv2d add silu group_norm silu");
}

TEST_F(Normalise, TakesWhatIsBuiltAndWhatIsFusedForTheSame) {
  const auto w = b.weight("w", {6, 4});
  g.add_output("y", b.unary("silu", b.linear(x, w, b.weight("b", {6}), "y")));
  Graph fused;
  Builder f(fused, DType::f32);
  const auto fx = f.input("x", {2, 3, 4}, DType::f32);
  f.input("image", {2, 4, 5, 3}, DType::f32);
  fused.add_output("y", fused.add("linear", {fx, f.weight("w", {6, 4}), f.weight("b", {6})}, {{"epilogue", "bias,silu"}}));
  EXPECT_EQ(ops_after(g), ops_after(fused));
  EXPECT_EQ(ops_after(fuse(g)), ops_after(g));
}

TEST_F(Normalise, ComputesEqualNodesOnce) {
  const auto twice = [&] { return b.unary("silu", b.linear(x, b.weight("w", {4, 4}), "y")); };
  const auto a = twice(), c = twice();
  g.add_output("y", b.add(a, c));
  EXPECT_EQ(ops_after(g), "linear silu add");
}

TEST_F(Normalise, KeepsConstantsApartThatDifferInTheSignOfZero) {
  g.add_output("a", b.constant({1}, {0.0}, DType::f32));
  g.add_output("b", b.constant({1}, {-0.0}, DType::f32));
  EXPECT_EQ(normalise(g).all("constant").size(), 2u);
}

TEST_F(Normalise, KeepsEveryCollective) {
  const Attrs group{{"group", Ints{0, 1}}, {"rank", 0}};
  g.add_output("a", g.add("all_reduce", {x}, group));
  g.add_output("b", g.add("all_reduce", {x}, group));
  g.add("all_reduce", {x}, group);
  EXPECT_EQ(normalise(g).all("all_reduce").size(), 3u);
}

struct Undone {
  const char* name;
  ValueId (*make)(Builder&, ValueId x);  // of x [2,3,4]
  const char* left;                      // of the ops
};
void PrintTo(const Undone& undone, std::ostream* out) { *out << undone.name; }
class NormaliseUndone : public testing::TestWithParam<Undone> {};
TEST_P(NormaliseUndone, LeavesTheRest) {
  Graph g;
  Builder b(g, DType::f32);
  g.add_output("y", GetParam().make(b, b.input("x", {2, 3, 4}, DType::f32)));
  EXPECT_EQ(ops_after(g), GetParam().left);
}
const Undone kUndone[] = {
    {"DoubleTranspose",
     [](Builder& b, ValueId x) {
       return b.transpose(b.transpose(x, {1, 2, 0}), {2, 0, 1});
     },
     ""},
    {"ThreeTransposes",
     [](Builder& b, ValueId x) {
       return b.transpose(b.transpose(b.transpose(x, {1, 0, 2}), {2, 1, 0}), {0, 2, 1});
     },
     "transpose"},
    {"IdentityTranspose",
     [](Builder& b, ValueId x) {
       return b.transpose(x, {0, 1, 2});
     },
     ""},
    {"SameCast",
     [](Builder& b, ValueId x) {
       return b.graph.add("cast", {x}, {{"dtype", "f32"}});
     },
     ""},
    {"RoundTripCast", [](Builder& b, ValueId x) { return b.cast(b.cast(x, DType::bf16), DType::f32); }, "cast cast"},
    {"SplitThenMerge",
     [](Builder& b, ValueId x) {
       return b.merge_dims(b.split_dim(x, 2, {2, 2}), 2, 2);
     },
     ""},
    {"SplitThenMergeOther",
     [](Builder& b, ValueId x) {
       return b.merge_dims(b.split_dim(x, 2, {2, 2}), 1, 2);
     },
     "split_dim merge_dims"},
    {"SplitThenMergeSome",
     [](Builder& b, ValueId x) {
       return b.merge_dims(b.split_dim(x, 2, {1, 2, 2}), 2, 2);
     },
     "split_dim"},
    {"MergeThenSplit",
     [](Builder& b, ValueId x) {
       return b.split_dim(b.merge_dims(x, 0, 2), 0, {2, 3});
     },
     ""},
    {"MergeThenSplitOther",
     [](Builder& b, ValueId x) {
       return b.split_dim(b.merge_dims(x, 0, 2), 0, {3, 2});
     },
     "merge_dims split_dim"},
    {"TwoMerges", [](Builder& b, ValueId x) { return b.merge_dims(b.merge_dims(x, 1, 2), 0, 2); }, "merge_dims"},
    {"TwoSplits",
     [](Builder& b, ValueId x) {
       return b.split_dim(b.split_dim(x, 2, {1, 4}), 3, {2, 2});
     },
     "split_dim"},
    {"WholeSlice", [](Builder& b, ValueId x) { return b.slice(x, 1, 0, 3); }, ""},
    {"TwoSlices", [](Builder& b, ValueId x) { return b.slice(b.slice(x, 2, 1, 4), 2, 1, 2); }, "slice"},
    {"SliceBehindSplit",
     [](Builder& b, ValueId x) {
       return b.slice(b.split_dim(x, 2, {2, 2}), 2, 1, 2);
     },
     "slice split_dim"},
    {"SliceInsideSplit",
     [](Builder& b, ValueId x) {
       return b.slice(b.split_dim(x, 2, {2, 2}), 3, 1, 2);
     },
     "split_dim slice"},
    {"SliceBehindOtherSplit",
     [](Builder& b, ValueId x) {
       return b.slice(b.split_dim(x, 0, {2, 1}), 3, 1, 2);
     },
     "slice split_dim"},
    {"SliceBehindTranspose",
     [](Builder& b, ValueId x) {
       return b.slice(b.transpose(x, {2, 0, 1}), 0, 1, 2);
     },
     "slice transpose"},
    {"NoPadding",
     [](Builder& b, ValueId x) {
       return b.graph.add("pad", {x}, {{"before", Ints(3, 0)}, {"after", Ints(3, 0)}, {"mode", "replicate"}});
     },
     ""},
    {"NoExpansion",
     [](Builder& b, ValueId x) {
       return b.graph.add("expand", {x}, {{"shape", Ints{2, 3, 4}}});
     },
     ""},
    {"ConcatOfOne", [](Builder& b, ValueId x) { return b.concat({x}, 1); }, ""},
    {"ConcatOfAllSlices", [](Builder& b, ValueId x) { return b.concat({b.slice(x, 1, 0, 1), b.slice(x, 1, 1, 3)}, 1); }, ""},
    {"ConcatOfNeighbours", [](Builder& b, ValueId x) { return b.concat({b.slice(x, 2, 1, 2), b.slice(x, 2, 2, 4)}, 2); }, "slice"},
    {"ConcatOfSomeNeighbours",
     [](Builder& b, ValueId x) {
       return b.concat({b.unary("silu", x), b.slice(x, 1, 0, 2), b.slice(x, 1, 2, 3), x}, 1);
     },
     "silu concat"},
    {"ConcatOfSlicesThatOthersRead",
     [](Builder& b, ValueId x) {
       const auto first = b.slice(x, 1, 0, 1);
       return b.concat({b.concat({first, b.slice(x, 1, 1, 3)}, 1), b.unary("silu", first)}, 1);
     },
     "slice slice concat silu concat"},
    {"ConcatInAnotherOrder", [](Builder& b, ValueId x) { return b.concat({b.slice(x, 1, 1, 3), b.slice(x, 1, 0, 1)}, 1); }, "slice slice concat"},
    {"ConcatAlongAnotherDimension", [](Builder& b, ValueId x) { return b.concat({b.slice(x, 2, 0, 2), b.slice(x, 2, 2, 4)}, 1); }, "slice slice concat"},
    {"Unused",
     [](Builder& b, ValueId x) {
       b.unary("gelu", x);
       return b.unary("silu", x);
     },
     "silu"},
    {"Constants",
     [](Builder& b, ValueId x) {
       const auto table = b.unary("sin", b.mul(b.constant({4}, {1, 2, 3, 4}, DType::f32), b.constant({1}, {0.5}, DType::f32)));
       return b.add(x, b.cast(table, DType::f32));
     },
     "add"},
    {"IntegerConstants",
     [](Builder& b, ValueId x) { return b.add(x, b.cast(b.cast(b.constant({1}, {1.5}, DType::f32), DType::i32), DType::f32)); },
     "cast cast add"},
    {"LargeConstants",
     [](Builder& b, ValueId x) { return b.add(x, b.slice(b.unary("sin", b.constant({5000}, {0.5}, DType::f32)), 0, 0, 4)); },
     "sin slice add"},
};
INSTANTIATE_TEST_SUITE_P(Cases, NormaliseUndone, testing::ValuesIn(kUndone), [](const auto& info) { return std::string(info.param.name); });

}  // namespace
}  // namespace comfytp::graph
