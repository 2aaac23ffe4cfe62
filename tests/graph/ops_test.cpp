// Every op's reference against values worked out by hand. The references are the oracle of all other tests.
#include <gtest/gtest.h>

#include <cmath>
#include <set>

#include "base/error.h"
#include "graph/evaluate.h"
#include "graph/text.h"

namespace comfytp::graph {
namespace {

struct Case {
  const char* name;
  const char* text;  // reads kOperands; %9 is the result
  Shape shape;
  Doubles expected;
};
void PrintTo(const Case& c, std::ostream* out) { *out << c.name; }

// Six numbers, a row of three, six truths, and the six numbers as an image.
const std::string kOperands = R"(
  %1 = constant() {shape=[2,3], values=[1.0,2.0,3.0,4.0,5.0,6.0], dtype="f32"}
  %2 = constant() {shape=[3], values=[1.0,-1.0,2.0], dtype="f32"}
  %3 = constant() {shape=[2,3], values=[1.0,0.0,1.0,0.0,0.0,1.0], dtype="bool"}
  %4 = constant() {shape=[1,1,2,3], values=[1.0,2.0,3.0,4.0,5.0,6.0], dtype="f32"}
)";

double silu(double x) { return x / (1 + std::exp(-x)); }
double gelu(double x) { return 0.5 * x * std::erfc(-x / std::sqrt(2.0)); }

const Case kCases[] = {
    {"Constant", R"(%9 = constant() {shape=[2,2], values=[3.0], dtype="f32"})", {2, 2}, {3, 3, 3, 3}},
    {"Add", "%9 = add(%1, %2)", {2, 3}, {2, 1, 5, 5, 4, 8}},
    {"Sub", "%9 = sub(%2, %1)", {2, 3}, {0, -3, -1, -3, -6, -4}},
    {"Mul", "%9 = mul(%1, %2)", {2, 3}, {1, -2, 6, 4, -5, 12}},
    {"Div", "%9 = div(%1, %2)", {2, 3}, {1, -2, 1.5, 4, -5, 3}},
    {"Pow", "%9 = pow(%1, %2)", {2, 3}, {1, 0.5, 9, 4, 0.2, 36}},
    {"Maximum", "%9 = maximum(%1, %2)", {2, 3}, {1, 2, 3, 4, 5, 6}},
    {"Minimum", "%9 = minimum(%1, %2)", {2, 3}, {1, -1, 2, 1, -1, 2}},
    {"Equal", "%9 = equal(%1, %2)", {2, 3}, {1, 0, 0, 0, 0, 0}},
    {"NotEqual", "%9 = not_equal(%1, %2)", {2, 3}, {0, 1, 1, 1, 1, 1}},
    {"Less", "%9 = less(%2, %1)", {2, 3}, {0, 1, 1, 1, 1, 1}},
    {"LessEqual", "%9 = less_equal(%1, %2)", {2, 3}, {1, 0, 0, 0, 0, 0}},
    {"Greater", "%9 = greater(%1, %2)", {2, 3}, {0, 1, 1, 1, 1, 1}},
    {"GreaterEqual", "%9 = greater_equal(%2, %1)", {2, 3}, {1, 0, 0, 0, 0, 0}},
    {"Where", "%9 = where(%3, %1, %2)", {2, 3}, {1, -1, 3, 1, -1, 6}},
    {"BroadcastBothWays",
     R"(
       %5 = split_dim(%2) {dim=0, sizes=[3,1]}
       %9 = add(%5, %2))",
     {3, 3},
     {2, 0, 3, 0, -2, 1, 3, 1, 4}},

    {"Silu", "%9 = silu(%2)", {3}, {silu(1), silu(-1), silu(2)}},
    {"Gelu", "%9 = gelu(%2)", {3}, {gelu(1), gelu(-1), gelu(2)}},
    {"GeluTanh", "%9 = gelu_tanh(%2)", {3}, {0.8411919906082768, -0.15880800939172324, 1.9545976940877750}},
    {"Sin", "%9 = sin(%2)", {3}, {std::sin(1), -std::sin(1), std::sin(2)}},
    {"Cos", "%9 = cos(%2)", {3}, {std::cos(1), std::cos(1), std::cos(2)}},
    {"Tanh", "%9 = tanh(%2)", {3}, {std::tanh(1), -std::tanh(1), std::tanh(2)}},
    {"Sigmoid", "%9 = sigmoid(%2)", {3}, {silu(1), -silu(-1), silu(2) / 2}},
    {"Relu", "%9 = relu(%2)", {3}, {1, 0, 2}},
    {"Exp", "%9 = exp(%2)", {3}, {M_E, 1 / M_E, M_E* M_E}},
    {"Log", "%8 = exp(%2)\n%9 = log(%8)", {3}, {1, -1, 2}},
    {"Sqrt", "%8 = mul(%2, %2)\n%9 = sqrt(%8)", {3}, {1, 1, 2}},
    {"Rsqrt", "%8 = mul(%2, %2)\n%9 = rsqrt(%8)", {3}, {1, 1, 0.5}},
    {"Abs", "%9 = abs(%2)", {3}, {1, 1, 2}},
    {"Neg", "%9 = neg(%2)", {3}, {-1, 1, -2}},
    {"LogicalNot", "%9 = logical_not(%3)", {2, 3}, {0, 1, 0, 1, 1, 0}},
    {"Cast", "%9 = cast(%2) {dtype=\"f16\"}", {3}, {1, -1, 2}},

    {"Transpose", "%9 = transpose(%1) {order=[1,0]}", {3, 2}, {1, 4, 2, 5, 3, 6}},
    {"SplitDim", "%9 = split_dim(%1) {dim=1, sizes=[3,1]}", {2, 3, 1}, {1, 2, 3, 4, 5, 6}},
    {"MergeDims", "%9 = merge_dims(%1) {dim=0, count=2}", {6}, {1, 2, 3, 4, 5, 6}},
    {"Slice", "%9 = slice(%1) {dim=1, start=1, stop=3}", {2, 2}, {2, 3, 5, 6}},
    {"Concat",
     R"(
       %5 = slice(%1) {dim=1, start=2, stop=3}
       %9 = concat(%1, %5) {dim=1})",
     {2, 4},
     {1, 2, 3, 3, 4, 5, 6, 6}},
    {"PadConstant",
     R"(%9 = pad(%1) {before=[0,1], after=[1,0], mode="constant", value=7.0})",
     {3, 4},
     {7, 1, 2, 3, 7, 4, 5, 6, 7, 7, 7, 7}},
    {"PadReplicate", R"(%9 = pad(%2) {before=[2], after=[1], mode="replicate"})", {6}, {1, 1, 1, -1, 2, 2}},
    {"PadCircular", R"(%9 = pad(%2) {before=[2], after=[1], mode="circular"})", {6}, {-1, 2, 1, -1, 2, 1}},
    {"Expand",
     R"(
       %5 = split_dim(%2) {dim=0, sizes=[3,1]}
       %9 = expand(%5) {shape=[3,2]})",
     {3, 2},
     {1, 1, -1, -1, 2, 2}},
    {"Gather",
     R"(
       %5 = constant() {shape=[2,1], values=[2.0,-3.0], dtype="i64"}
       %9 = gather(%1, %5) {dim=1})",
     {2, 2, 1},
     {3, 1, 6, 4}},
    {"Upsample",
     "%9 = upsample_nearest(%4) {from=[2,3], to=[2,5], size=[2,5], from_offset=[0,0], to_offset=[0,0]}",
     {1, 1, 2, 5},
     {1, 1, 2, 2, 3, 4, 4, 5, 5, 6}},
    {"UpsampleOfAPart",
     "%9 = upsample_nearest(%4) {from=[4,3], to=[6,3], size=[2,3], from_offset=[1,0], to_offset=[3,0]}",
     {1, 1, 2, 3},
     {4, 5, 6, 4, 5, 6}},

    {"Sum", "%9 = sum(%1) {dims=[0]}", {1, 3}, {5, 7, 9}},
    {"SumOfAll", "%9 = sum(%1) {dims=[1,0]}", {1, 1}, {21}},
    {"Amax", "%9 = amax(%1) {dims=[1]}", {2, 1}, {3, 6}},
    {"Softmax", "%8 = log(%1)\n%9 = softmax(%8) {dim=0}", {2, 3}, {0.2, 2 / 7., 1 / 3., 0.8, 5 / 7., 2 / 3.}},
    {"Matmul", "%8 = transpose(%1) {order=[1,0]}\n%9 = matmul(%1, %8)", {2, 2}, {14, 32, 32, 77}},

    {"Linear", "%9 = linear(%2, %1)", {2}, {5, 11}},
    {"LinearEpilogue",
     R"(
       %5 = constant() {shape=[2], values=[-5.0,-12.0], dtype="f32"}
       %9 = linear(%2, %1, %5, %5, %5) {epilogue="bias,gelu,mul,add"})",
     {2},
     {-5, -12 * gelu(-1) - 12}},
    {"Conv1d",
     R"(
       %5 = split_dim(%1) {dim=0, sizes=[1,2]}
       %6 = constant() {shape=[1,2,2], values=[1.0,10.0,100.0,1000.0], dtype="f32"}
       %9 = conv1d(%5, %6) {stride=[1], padding=[1,0]})",
     {1, 1, 3},
     {4010, 5421, 6532}},
    {"Conv2d",
     R"(
       %5 = constant() {shape=[1,1,2,2], values=[1.0,10.0,100.0,1000.0], dtype="f32"}
       %9 = conv2d(%4, %5) {stride=[1,2], padding=[0,1,1,0]})",
     {1, 1, 2, 2},
     {4010, 6532, 40, 65}},
    {"Conv2dOfTwoGroups",
     R"(
       %5 = concat(%4, %4) {dim=1}
       %6 = constant() {shape=[2,1,1,1], values=[1.0,-1.0], dtype="f32"}
       %9 = conv2d(%5, %6) {stride=[2,2], padding=[0,0,0,0], groups=2})",
     {1, 2, 1, 2},
     {1, 3, -1, -3}},
    {"Conv2dBias",
     R"(
       %5 = constant() {shape=[2,1,1,1], values=[1.0,2.0], dtype="f32"}
       %6 = constant() {shape=[2], values=[0.5,-0.5], dtype="f32"}
       %9 = conv2d(%4, %5, %6) {stride=[2,2], padding=[0,0,0,0], epilogue="bias"})",
     {1, 2, 1, 2},
     {1.5, 3.5, 1.5, 5.5}},
    {"Conv3d",
     R"(
       %5 = split_dim(%1) {dim=0, sizes=[1,1,2,1]}
       %6 = constant() {shape=[1,1,2,1,1], values=[1.0,-1.0], dtype="f32"}
       %9 = conv3d(%5, %6) {stride=[1,1,1], padding=[0,0,0,0,0,0]})",
     {1, 1, 1, 1, 3},
     {-3, -3, -3}},
    // Two keys; the first query sees both alike, the second e^(ln 3) = 3 times as much of the second.
    {"Attention",
     R"(
       %5 = constant() {shape=[1,1,2,1], values=[0.0,2.0], dtype="f32"}
       %6 = constant() {shape=[1,1,2,1], values=[0.0,1.0986122886681098], dtype="f32"}
       %9 = attention(%5, %6, %4) {scale=0.5})",
     {1, 1, 2, 3},
     {2.5, 3.5, 4.5, 3.25, 4.25, 5.25}},
    {"AttentionMasked",
     R"(
       %5 = constant() {shape=[1,2,2,1], values=[1.0], dtype="f32"}
       %6 = constant() {shape=[1,1,2,1], values=[1.0], dtype="f32"}
       %7 = constant() {shape=[1,1,2,2], values=[1.0,0.0,1.0,1.0], dtype="bool"}
       %9 = attention(%5, %6, %4, %7) {scale=1.0})",
     {1, 2, 2, 3},
     {1, 2, 3, 2.5, 3.5, 4.5, 1, 2, 3, 2.5, 3.5, 4.5}},
    {"AttentionWithoutKeys",
     R"(
       %5 = constant() {shape=[1,1,2,1], values=[1.0], dtype="f32"}
       %7 = constant() {shape=[1,1,2,2], values=[1.0,1.0,0.0,0.0], dtype="bool"}
       %9 = attention(%5, %5, %4, %7) {scale=1.0})",
     {1, 1, 2, 3},
     {2.5, 3.5, 4.5, 0, 0, 0}},
    // (1 2 3) has mean 2 and variance 2/3; epsilon 1/3 makes the deviation 1.
    {"LayerNorm", "%9 = layer_norm(%1, %2, %2) {epsilon=0.3333333333333333}", {2, 3}, {0, -1, 4, 0, -1, 4}},
    {"RmsNorm", "%9 = rms_norm(%2, %2) {epsilon=2.0}", {3}, {0.5, 0.5, 2}},
    {"RowMoments", "%9 = row_moments(%1)", {1, 2, 3}, {3, 2, 2, 3, 5, 2}},
    {"PointwiseInOrder",
     R"(
       %5 = split_dim(%2) {dim=0, sizes=[1,3]}
       %9 = pointwise(%1, %2, %1, %5) {steps="bias,mul,relu,add_one_mul", channel=1})",
     {2, 3},
     {4, 0, 45, 40, 0, 144}},
    {"PointwiseBroadcasts",
     R"(
       %5 = split_dim(%1) {dim=0, sizes=[1,2]}
       %6 = transpose(%5) {order=[0,2,1]}
       %7 = constant() {shape=[1,1,2], values=[10.0,0.0], dtype="f32"}
       %9 = pointwise(%6, %2, %7, %6) {steps="bias,add,mul", channel=1})",
     {1, 3, 2},
     {12, 20, 22, 20, 45, 48}},
    {"PointwiseTurns",
     R"(
       %5 = constant() {shape=[1,1,1], values=[2.0], dtype="f32"}
       %6 = constant() {shape=[1,1,1], values=[3.0], dtype="f32"}
       %7 = constant() {shape=[1,2,2], values=[1.0,2.0,3.0,4.0], dtype="f32"}
       %9 = pointwise(%7, %5, %6) {steps="rope"})",
     {1, 2, 2},
     {-4, 7, -6, 17}},
    {"FusedNorm",
     R"(
       %5 = constant() {shape=[2,1], values=[0.0,-3.0], dtype="f32"}
       %6, %7 = fused_norm(%1, %5, %2, %2, %1) {pre="add", norm="layer_norm", epsilon=0.3333333333333333, affine="weight,bias", post="add"}
       %9 = concat(%6, %7) {dim=0})",
     {4, 3},
     {1, 2, 3, 1, 2, 3, 1, 1, 7, 4, 4, 10}},
    {"FusedNormAlone",
     "%9 = fused_norm(%2, %2, %2) {pre=\"\", norm=\"rms_norm\", epsilon=2.0, affine=\"weight\", post=\"add_one_mul\"}",
     {3},
     {1, 0, 6}},
    {"Glu", "%9 = glu(%2, %2, %2) {activation=\"gelu\", biases=\"gate\"}", {3}, {gelu(2), -gelu(-2), 2 * gelu(4)}},
    {"GluWithoutBiases", "%9 = glu(%2, %2) {activation=\"silu\", biases=\"\"}", {3}, {silu(1), -silu(-1), 2 * silu(2)}},
    {"GluOfTwoBiases",
     "%9 = glu(%2, %2, %2, %2) {activation=\"sigmoid\", biases=\"value,gate\"}",
     {3},
     {silu(2), silu(-2), silu(4)}},
    {"GatedLinear", "%9 = gated_linear(%2, %1, %1) {activation=\"silu\", biases=\"\"}", {2}, {5 * silu(5), 11 * silu(11)}},
    {"Linears",
     R"(
       %5 = constant() {shape=[1,3], values=[1.0,0.0,-1.0], dtype="f32"}
       %6 = constant() {shape=[1], values=[10.0], dtype="f32"}
       %7, %8 = linears(%2, %1, %5, %6) {biased=[0,1], product="fp8"}
       %9 = concat(%7, %8) {dim=0})",
     {3},
     {5, 11, 9}},
    {"GroupNorm",
     R"(
       %5 = constant() {shape=[1,4,1], values=[1.0,3.0,2.0,2.0], dtype="f32"}
       %6 = constant() {shape=[4], values=[1.0,1.0,1.0,2.0], dtype="f32"}
       %9 = group_norm(%5, %6, %6) {groups=2, epsilon=0.0625, activation="silu"})",
     {1, 4, 1},
     {silu(1 - 1 / std::sqrt(1.0625)), silu(1 + 1 / std::sqrt(1.0625)), silu(1), silu(2)}},
    {"GroupMoments",
     "%8 = split_dim(%1) {dim=1, sizes=[3,1]}\n%9 = group_moments(%8) {groups=3}",
     {1, 2, 3, 3},
     {1, 1, 0, 1, 2, 0, 1, 3, 0, 1, 4, 0, 1, 5, 0, 1, 6, 0}},
};

class OpReference : public testing::TestWithParam<Case> {};
TEST_P(OpReference, GivesTheValuesWorkedOutByHand) {
  const auto& c = GetParam();
  const Graph g = parse(kOperands + c.text + "\noutput y = %9");
  const auto y = evaluate(g, nullptr).at("y");
  EXPECT_EQ(g.type(g.outputs()[0].value).shape, c.shape);
  ASSERT_EQ(y.data.size(), c.expected.size());
  for (std::size_t i = 0; i < y.data.size(); ++i) EXPECT_NEAR(y.data[i], c.expected[i], 1e-12) << i;
}
INSTANTIATE_TEST_SUITE_P(Hand, OpReference, testing::ValuesIn(kCases), [](const auto& info) { return std::string(info.param.name); });

// Two ranks; rank r's input is the column r, r+1, r+2, … of the size given.
std::vector<Results> on_two(std::string text, std::vector<std::int64_t> rows) {
  std::vector<Graph> devices;
  for (std::size_t r = 0; r < 2; ++r) {
    std::string local =
        "%0 = input() {name=\"x" + std::to_string(r) + "\", dtype=\"f32\", shape=[" + std::to_string(rows[r]) + ",1]}\n" + text;
    local.replace(local.find("RANK"), 4, std::to_string(r));
    devices.push_back(parse(local + "\noutput y = %1"));
  }
  return evaluate(devices, [](const Node& node) {
    RefTensor whole(node.attrs.ints("shape"));
    for (std::size_t i = 0; i < whole.data.size(); ++i) whole.data[i] = static_cast<double>(i) + (node.attrs.text("name") == "x1");
    return whole;
  });
}

TEST(Collective, AllReduceSums) {
  for (auto& y : on_two("%1 = all_reduce(%0) {group=[0,1], rank=RANK}", {3, 3})) EXPECT_EQ(y.at("y").data, (Doubles{1, 3, 5}));
}

TEST(Collective, ReduceScatterGivesEachItsPartOfTheSum) {
  const auto y = on_two("%1 = reduce_scatter(%0) {group=[0,1], rank=RANK, dim=0, bounds=[0,1,3]}", {3, 3});
  EXPECT_EQ(y[0].at("y").data, (Doubles{1}));
  EXPECT_EQ(y[1].at("y").data, (Doubles{3, 5}));
}

TEST(Collective, AllGatherPutsUnevenPartsTogether) {
  for (const char* op : {"all_gather", "fetch_weight"})
    for (auto& y : on_two(std::string("%1 = ") + op + "(%0) {group=[0,1], rank=RANK, dim=0, bounds=[0,1,3]}", {1, 2}))
      EXPECT_EQ(y.at("y").data, (Doubles{0, 1, 2})) << op;
}

TEST(Collective, HaloExchangeFetchesTheNeighboursRows) {
  const auto y = on_two("%1 = halo_exchange(%0) {group=[0,1], rank=RANK, dim=0, bounds=[0,2,4], need_lo=[0,1], need_hi=[3,4]}", {2, 2});
  EXPECT_EQ(y[0].at("y").data, (Doubles{0, 1, 1}));
  EXPECT_EQ(y[1].at("y").data, (Doubles{1, 1, 2}));
}

TEST(Collective, FailsWhenTheRanksDoNotMeet) {
  const Graph g = parse("%0 = input() {name=\"x\", dtype=\"f32\", shape=[1]}\n%1 = all_reduce(%0) {group=[0,1], rank=0}\noutput y = %1");
  const Graph alone = parse("%0 = input() {name=\"x\", dtype=\"f32\", shape=[1]}\noutput y = %0");
  EXPECT_THROW(evaluate({g, alone}, [](const Node&) { return RefTensor({1}); }), Error);
}

// Parts whose moments are gathered are normalised as the whole is.
TEST(Moments, OfPartsGiveTheWholeNorm) {
  const std::string x = R"(
    %1 = constant() {shape=[1,2,5], values=[1.0,7.0,-3.0,4.0,2.0,0.5,9.0,-1.0,6.0,3.0], dtype="f32"}
    %2 = constant() {shape=[2], values=[1.5,-2.0], dtype="f32"}
    %3 = slice(%1) {dim=2, start=0, stop=2}
    %4 = slice(%1) {dim=2, start=2, stop=5}
  )";
  const auto whole = evaluate(parse(x + "%9 = group_norm(%1, %2, %2) {groups=1, epsilon=0.1}\noutput y = %9"), nullptr);
  const auto parts = evaluate(parse(x + R"(
    %5 = group_moments(%3) {groups=1}
    %6 = group_moments(%4) {groups=1}
    %7 = concat(%5, %6) {dim=0}
    %8 = group_norm(%3, %2, %2, %7) {groups=1, epsilon=0.1}
    %9 = group_norm(%4, %2, %2, %7) {groups=1, epsilon=0.1}
    %10 = concat(%8, %9) {dim=2}
    output y = %10)"),
                              nullptr);
  for (std::size_t i = 0; i < 10; ++i) EXPECT_NEAR(whole.at("y").data[i], parts.at("y").data[i], 1e-12);
}

// A new op needs a case above.
TEST(Ops, AreAllHeldAgainstHandWorkedValues) {
  std::set<std::string_view> held = {"input", "weight", "all_reduce", "reduce_scatter", "all_gather", "fetch_weight", "halo_exchange"};
  std::vector<Graph> graphs;
  for (const auto& c : kCases) graphs.push_back(parse(kOperands + c.text));
  for (const auto& g : graphs)
    for (const auto& node : g.nodes()) held.insert(node.op->name());
  for (const Op* op : all_ops()) EXPECT_TRUE(held.count(op->name())) << op->name();
}

}  // namespace
}  // namespace comfytp::graph
