// fuse() with passes of their own between plain heavy ops.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <array>
#include <random>

#include "graph/builder.h"
#include "graph/rewrites.h"
#include "graph/text.h"
#include "random_graph.h"

namespace comfytp::graph {
namespace {

// Fuses, checks the values, and returns the new graph's nodes, leaves and views apart: "linear pointwise(bias,gelu)".
std::string fused(const Graph& graph, Graph* result = nullptr) {
  const Graph after = fuse(graph, Fusion::passes);
  EXPECT_LE(test::difference(evaluate(graph, test::seeded_leaves()), evaluate(after, test::seeded_leaves())), 1e-12) << to_text(after);
  std::string ops;
  for (const auto& node : after.nodes()) {
    if (node.inputs.empty() || is(node, "transpose") || is(node, "split_dim") || is(node, "merge_dims")) continue;
    ops.append(ops.empty() ? "" : " ").append(node.op->name());
    const auto& a = node.attrs;
    if (is(node, "fused_norm")) ops.append(fmt::format("({}|{}|{})", a.text("pre"), a.text("affine"), a.text("post")));
    const bool gates = is(node, "glu") || is(node, "gated_linear");
    if (gates) ops.append(fmt::format("({}|{})", a.text("activation"), a.text("biases")));
    const auto with = a.text_or("epilogue", gates ? "" : a.text_or("activation", a.text_or("steps", "")));
    if (!with.empty()) ops.append("(").append(with).append(")");
  }
  if (result) *result = after;
  return ops;
}

// Tokens [2, 20, 6] of an image [2, 6, 4, 5]: 40 rows, too many for an activation in a linear's epilogue.
struct FusePasses : testing::Test {
  Graph g;
  Builder b{g, DType::f32};
  ValueId x = b.input("x", {2, 20, 6}, DType::f32);
  ValueId image = b.input("image", {2, 6, 4, 5}, DType::f32);
  ValueId emb = b.input("emb", {2, 6}, DType::f32);

  ValueId vector(const std::string& name, std::int64_t size = 6) { return b.weight(name, {size}); }
  ValueId plain(ValueId in, std::int64_t o, const std::string& name) {
    return b.linear(in, b.weight(name + ".weight", {o, b.shape(in).back()}), name);
  }
  ValueId linear(ValueId in, std::int64_t o, const std::string& name) { return b.add(plain(in, o, name), vector(name + ".bias", o)); }
  ValueId conv(ValueId in, std::int64_t o, std::int64_t extent, const std::string& name) {
    const auto k = b.weight(name + ".weight", {o, b.shape(in)[1], extent, extent});
    return b.conv2d(in, k, b.weight(name + ".bias", {o, 1, 1}), 1, extent / 2, name);
  }
  ValueId layer_norm(ValueId in, const std::string& name) {
    const auto c = b.shape(in).back();
    return b.layer_norm(in, vector(name + ".weight", c), vector(name + ".bias", c), 1e-5, name);
  }
  ValueId plain_norm(ValueId in) {
    const auto c = b.shape(in).back();
    return b.layer_norm(in, b.constant({c}, {1}, DType::f32), b.constant({c}, {0}, DType::f32), 1e-6);
  }
  ValueId norm_silu(ValueId in, const std::string& name) {
    const auto c = b.shape(in)[1];
    return b.unary("silu", b.group_norm(in, vector(name + ".weight", c), vector(name + ".bias", c), 2, 1e-5, name));
  }
  ValueId tokens(ValueId in) { return b.transpose(b.merge_dims(in, 2, 2), {0, 2, 1}); }
  ValueId untokens(ValueId in, std::int64_t height) {
    return b.split_dim(b.transpose(in, {0, 2, 1}), 2, {height, b.shape(in)[1] / height});
  }
  ValueId one_plus(ValueId s) { return b.add(b.constant({}, {1}, DType::f32), s); }
  ValueId attention(ValueId in, ValueId context, const std::string& name) {
    const auto heads = [&](ValueId of, const char* which) {
      return b.transpose(b.split_dim(plain(of, 6, name + which), 2, {2, 3}), {0, 2, 1, 3});
    };
    const auto a = b.attention(heads(in, ".q"), heads(context, ".k"), heads(context, ".v"), 0.5, name);
    return linear(b.merge_dims(b.transpose(a, {0, 2, 1, 3}), 2, 2), 6, name + ".out");
  }
  ValueId geglu(ValueId in, const std::string& name) {
    const auto value = linear(in, 8, name + ".value");
    return linear(b.mul(value, b.unary("gelu", linear(in, 8, name + ".gate"))), 6, name + ".out");
  }
};

TEST_F(FusePasses, DoesAResBlockInThreePasses) {
  auto h = conv(norm_silu(image, "in"), 8, 3, "in_conv");
  h = b.add(h, b.split_dim(linear(b.unary("silu", emb), 8, "emb"), 1, {8, 1, 1}));
  h = conv(norm_silu(h, "out"), 6, 3, "out_conv");
  g.add_output("y", b.add(image, h));
  EXPECT_EQ(fused(g), "group_norm(silu) conv2d silu linear(bias) pointwise(bias,add) group_norm(silu) conv2d pointwise(bias,add)");
}

// Of one x, with nothing heavy and no exchange in between.
TEST_F(FusePasses, JoinsLinearsInFp8OfOneX) {
  const auto context = b.input("context", {2, 7, 6}, DType::f32, "prompt");
  const auto gated = linear(x, 8, "gate");
  g.add_output("self", attention(x, x, "self"));
  g.add_output("cross", attention(x, context, "cross"));
  g.add_output("gated", geglu(x, "ff"));
  g.add_output("gate", gated);
  const auto joined = [](const Graph& graph) {
    std::vector<std::size_t> sizes;
    for (const auto& node : graph.nodes())
      if (is(node, "linears")) sizes.push_back(node.attrs.ints("biased").size());
    std::sort(sizes.begin(), sizes.end());
    return sizes;
  };
  Graph after;
  fused(g, &after);
  EXPECT_TRUE(joined(after).empty());
  fused(multiply_in_fp8(g, [](const auto&) { return true; }), &after);
  EXPECT_EQ(joined(after), (std::vector<std::size_t>{2, 2, 4})) << to_text(after);
  fused(multiply_in_fp8(g, [](const auto& key) { return !key.starts_with("self.k"); }), &after);
  EXPECT_EQ(joined(after).front(), 2u) << to_text(after);
}

TEST_F(FusePasses, AddsTheSkipAndItsBiasInTheSamePass) {
  const auto h = conv(image, 8, 3, "conv"), skip = conv(image, 8, 1, "skip");
  g.add_output("y", b.add(skip, h));
  EXPECT_EQ(fused(g), "conv2d conv2d pointwise(bias,add,bias)");
}

TEST_F(FusePasses, LeavesOneFusedNormBehindEachProjectionOfATransformer) {
  const auto context = b.input("context", {2, 7, 5}, DType::f32, "prompt");
  auto y = linear(tokens(image), 6, "proj_in");
  for (const std::string block : {"0", "1"}) {
    const auto self = layer_norm(y, block + ".norm1");
    y = b.add(y, attention(self, self, block + ".attn1"));
    y = b.add(y, attention(layer_norm(y, block + ".norm2"), context, block + ".attn2"));
    y = b.add(y, geglu(layer_norm(y, block + ".norm3"), block + ".ff"));
  }
  g.add_output("y", b.add(image, untokens(linear(y, 6, "proj_out"), 4)));
  const std::string norm = " linear fused_norm(bias,add|weight,bias|)", self = " linear linear linear attention" + norm, cross = self,
                    feed_forward = " gated_linear(gelu|value,gate)";
  EXPECT_EQ(fused(g), "linear(bias) layer_norm" + self + cross + feed_forward + norm + self + cross + feed_forward +
                          " linear pointwise(bias,add) linear pointwise(bias,add)");
}

TEST_F(FusePasses, ModulatesAndGatesABlockOfADiT) {
  const auto modulation = linear(b.unary("silu", emb), 36, "adaLN");
  const auto part = [&](int i) { return b.split_dim(b.slice(modulation, 1, 6 * i, 6 * i + 6), 1, {1, 6}); };
  const auto modulated = [&](ValueId in, int i) { return b.add(b.mul(plain_norm(in), one_plus(part(i + 1))), part(i)); };
  const auto before = modulated(x, 0);
  const auto q = b.transpose(b.split_dim(linear(before, 6, "q"), 2, {2, 3}), {0, 2, 1, 3});
  const auto normed = g.add("rms_norm", {q, vector("q_norm", 3)}, {{"epsilon", 1e-6}});
  const auto a = b.merge_dims(b.transpose(b.attention(normed, q, q, 0.5), {0, 2, 1, 3}), 2, 2);
  const auto gate = part(2);
  const auto y = b.add(x, b.mul(gate, linear(a, 6, "out")));
  const auto hidden = b.unary("gelu_tanh", linear(modulated(y, 3), 24, "fc1"));
  const auto last = part(5);
  g.add_output("y", b.add(y, b.mul(linear(hidden, 6, "fc2"), last)));
  Graph after;
  EXPECT_EQ(fused(g, &after),
            "silu linear(bias) slice slice fused_norm(||add_one_mul,add) linear(bias) rms_norm attention slice linear slice slice "
            "fused_norm(bias,mul,add||add_one_mul,add) linear(bias,gelu_tanh) slice linear pointwise(bias,mul,add)");
}

TEST_F(FusePasses, KeepsABiasThatStandsAlone) {
  g.add_output("a", linear(x, 6, "a"));
  g.add_output("b", layer_norm(linear(x, 6, "b"), "norm"));
  g.add_output("c", b.transpose(linear(x, 6, "c"), {1, 0, 2}));
  EXPECT_EQ(fused(g), "linear(bias) linear fused_norm(bias|weight,bias|) linear(bias)") << "but for the norm that alone reads the sum";
}

TEST_F(FusePasses, KeepsTheEpilogueOfALinearOfFewRows) {
  auto e = linear(b.unary("silu", linear(emb, 6, "a")), 6, "b");
  e = b.unary("silu", b.add(e, linear(b.unary("gelu", plain(emb, 4, "c")), 6, "d")));
  g.add_output("y", e);
  g.add_output("z", layer_norm(b.add(linear(emb, 6, "e"), e), "norm"));
  EXPECT_EQ(fused(g),
            "linear(bias,silu) linear(bias) linear(gelu) linear(bias) pointwise(add,silu) linear(bias) fused_norm(add|weight,bias|)");
}

TEST_F(FusePasses, TakesTheGateOnEitherSideAndAnyValue) {
  const auto gate = b.unary("silu", plain(x, 6, "gate")), sum = b.add(linear(x, 6, "c"), x);
  g.add_output("a", b.mul(gate, plain(x, 6, "value")));
  g.add_output("b", b.mul(sum, b.unary("sigmoid", linear(x, 6, "d"))));
  g.add_output("c", b.mul(x, b.unary("gelu_tanh", b.add(linear(x, 6, "e"), x))));
  EXPECT_EQ(fused(g),
            "linear pointwise(bias,add) gated_linear(silu|) linear glu(sigmoid|gate) linear pointwise(bias,add) glu(gelu_tanh|)");
}

TEST_F(FusePasses, ReadsTwoSlicesOfOneLinear) {
  const auto both = linear(x, 16, "both");
  g.add_output("y", b.mul(b.slice(both, 2, 0, 8), b.unary("gelu", b.slice(both, 2, 8, 16))));
  EXPECT_EQ(fused(g), "linear(bias) slice slice glu(gelu|)");
}

TEST_F(FusePasses, BeginsAtACollectivesResult) {
  const Attrs alone = {{"group", Ints{0}}, {"rank", 0}};
  auto parted = alone;
  parted.set("dim", std::int64_t{2});
  parted.set("bounds", Ints{0, 6});
  auto y = b.add(g.add("all_reduce", {plain(x, 6, "a")}, alone), vector("a.bias"));
  y = b.add(x, y);
  y = b.add(g.add("all_gather", {plain(layer_norm(y, "norm"), 6, "b")}, parted), vector("b.bias"));
  y = b.unary("relu", b.add(g.add("reduce_scatter", {y}, parted), x));
  g.add_output("y", y);
  EXPECT_EQ(fused(g),
            "linear all_reduce fused_norm(bias,add|weight,bias|) linear all_gather pointwise(bias) reduce_scatter pointwise(add,relu)");
}

TEST_F(FusePasses, KeepsWhatIsReadTwice) {
  const auto y = b.add(linear(x, 6, "a"), x);
  g.add_output("y", y);
  g.add_output("z", b.unary("gelu", y));
  const auto normed = layer_norm(b.add(plain(x, 6, "b"), x), "norm");
  g.add_output("normed", normed);
  g.add_output("tanh", b.unary("tanh", normed));
  EXPECT_EQ(fused(g), "linear pointwise(bias,add) gelu linear fused_norm(add|weight,bias|) tanh");
}

TEST_F(FusePasses, GivesTheSumToTheFirstOfTwoNorms) {
  const auto y = b.add(plain(x, 6, "a"), x);
  g.add_output("a", layer_norm(y, "first"));
  g.add_output("b", b.mul(layer_norm(y, "second"), b.weight("scale", {1, 20, 1})));
  g.add_output("y", y);
  EXPECT_EQ(fused(g), "linear fused_norm(add|weight,bias|) fused_norm(|weight,bias|mul)");
}

// What reads the sum before the norm's modulation is there must not wait for it.
TEST_F(FusePasses, DelaysNobodyWhoReadsTheSum) {
  const auto y = b.add(plain(x, 6, "a"), x);
  const auto normed = layer_norm(y, "norm");
  const auto scale = b.unary("sigmoid", plain(y, 6, "scale"));
  g.add_output("y", b.mul(normed, scale));
  const auto early = b.add(plain(x, 6, "b"), x);
  const auto factor = plain(early, 6, "factor");
  g.add_output("z", b.mul(layer_norm(early, "late"), factor));
  EXPECT_EQ(fused(g), "linear fused_norm(add|weight,bias|) linear glu(sigmoid|) linear pointwise(add) linear fused_norm(|weight,bias|mul)");
}

TEST_F(FusePasses, PutsNoOperandFromBeforeTheNormBehindIt) {
  g.add_output("y", b.add(layer_norm(b.add(plain(x, 6, "a"), x), "norm"), x));
  g.add_output("z", b.mul(layer_norm(x, "alone"), x));
  EXPECT_EQ(fused(g), "linear fused_norm(add|weight,bias|) add layer_norm mul");
}

TEST_F(FusePasses, LooksThroughViews) {
  const auto residual = b.input("residual", {4, 5, 2, 6}, DType::f32);
  const auto seen = b.split_dim(b.transpose(b.mul(linear(x, 6, "a"), b.weight("scale", {2, 1, 1})), {1, 0, 2}), 0, {4, 5});
  g.add_output("y", b.unary("gelu", b.add(seen, residual)));
  g.add_output("z", layer_norm(tokens(conv(image, 8, 1, "patches")), "norm"));
  EXPECT_EQ(fused(g), "linear pointwise(bias,mul,add,gelu) conv2d fused_norm(bias|weight,bias|)");
}

TEST_F(FusePasses, StopsAtAViewThatAnOperandDoesNotHave) {
  const auto scaled = b.mul(conv(image, 6, 1, "a"), b.weight("rows", {4, 1}));
  g.add_output("y", b.add(b.merge_dims(scaled, 2, 2), b.weight("pixels", {20})));
  EXPECT_EQ(fused(g), "conv2d pointwise(bias,mul) add");
}

TEST_F(FusePasses, CutsLongChains) {
  auto y = plain(x, 6, "a");
  for (int i = 0; i < 11; ++i) y = b.unary("tanh", y);
  g.add_output("y", y);
  EXPECT_EQ(fused(g), "linear pointwise(tanh,tanh,tanh,tanh,tanh,tanh,tanh,tanh) pointwise(tanh,tanh,tanh)");
}

TEST_F(FusePasses, TakesNothingForABiasThatStandsAlongRows) {
  const auto rows = b.input("rows", {5, 6}, DType::f32), each = b.input("each", {5, 1}, DType::f32);
  for (const char* activation : {"silu", "gelu_tanh"})
    g.add_output(activation, b.add(b.unary(activation, plain(rows, 6, activation)), each));
  const auto samples = b.input("samples", {2, 3, 6}, DType::f32);
  g.add_output("sample", b.add(b.unary("gelu", plain(samples, 6, "sample")), b.input("one", {2, 1, 1}, DType::f32)));
  fused(g);
}

TEST_F(FusePasses, TakesAVectorBehindANormAsItsWeight) {
  const auto normed = [&](const char* name) { return g.add("rms_norm", {plain(x, 6, name), b.constant({6}, {1}, DType::f32)}, {{"epsilon", 1e-5}}); };
  g.add_output("vector", b.mul(normed("a"), b.weight("w", {6})));
  g.add_output("wide", b.add(b.mul(normed("b"), b.weight("v", {1, 1, 6})), x));
  g.add_output("samples", b.mul(normed("c"), b.weight("u", {2, 1, 6})));
  g.add_output("number", b.mul(normed("d"), b.weight("t", {1})));
  EXPECT_EQ(fused(g), "linear fused_norm(|weight|) linear fused_norm(|weight|add) linear fused_norm(||mul) linear fused_norm(||mul)");
}

TEST_F(FusePasses, LeavesLoneStepsBetweenLightOpsAsTheyAre) {
  g.add_output("y", b.add(b.slice(x, 1, 0, 10), b.slice(x, 1, 10, 20)));
  EXPECT_EQ(fused(g), "slice slice add");
}

TEST_F(FusePasses, MovesNothingFromThePrologueIntoTheCall) {
  const auto label = conv(b.input("label", {2, 6, 4, 5}, DType::f32, "prompt"), 6, 1, "label");
  const auto gate = b.unary("silu", linear(b.input("text", {2, 20, 6}, DType::f32, "prompt"), 6, "text"));
  g.add_output("y", b.add(label, conv(image, 6, 1, "image")));
  g.add_output("z", b.mul(linear(x, 6, "x"), gate));
  Graph after;
  EXPECT_EQ(fused(g, &after), "conv2d pointwise(bias) linear pointwise(bias,silu) conv2d pointwise(bias,add) linear pointwise(bias,mul)");
  const auto varies = varies_per_call(after);
  for (std::size_t i = 0; i < after.nodes().size(); ++i)
    if (const auto& name = after.nodes()[i].name; name == "label" || name == "text") {
      EXPECT_FALSE(varies[i]) << name;
    }
}

// Beside a narrower dtype.
struct FuseMixed : FusePasses {
  ValueId narrow = b.input("narrow", {2, 20, 6}, DType::bf16);
  ValueId wide(ValueId in) { return b.cast(in, DType::f32); }
  ValueId narrowed(ValueId in) { return b.cast(in, DType::bf16); }
};

TEST_F(FuseMixed, KeepsANormsStartUntilItsReadersHaveIt) {
  const auto h = b.add(narrow, b.input("other", {2, 20, 6}, DType::bf16));
  const auto normed = plain_norm(wide(h));
  g.add_output("r", b.unary("tanh", h));
  g.add_output("n", narrowed(normed));
  fused(g);
}

TEST_F(FuseMixed, WritesACastThatANormAndOthersRead) {
  const auto rows = b.input("rows", {4, 6}, DType::f32);
  const auto h = narrowed(linear(rows, 6, "few"));
  g.add_output("n", b.layer_norm(h, b.cast(vector("w"), DType::bf16), b.cast(vector("v"), DType::bf16), 1e-5));
  g.add_output("r", b.unary("tanh", h));
  fused(g);
}

TEST_F(FuseMixed, AddsABiasOfTheLinearsDtype) {
  const auto shift = b.input("shift", {1, 6}, DType::bf16);
  g.add_output("few", b.add(plain(b.input("rows", {4, 6}, DType::f32), 6, "few"), wide(shift)));
  g.add_output("many", b.add(plain(x, 6, "many"), wide(shift)));
  g.add_output("gated", b.mul(plain(x, 6, "value"), b.unary("gelu", b.add(plain(x, 6, "gate"), wide(shift)))));
  fused(g);
}

TEST_F(FuseMixed, RoundsNothingThatTheGraphKeepsWide) {
  Graph after;
  g.add_output("y", narrowed(plain_norm(b.add(plain(x, 6, "a"), b.input("residual", {2, 20, 6}, DType::f32)))));
  fused(g, &after);
  for (const auto* node : after.all("fused_norm")) EXPECT_EQ(node->outputs.size(), 1u) << "what is not kept is not rounded: " << to_text(after);
}

TEST_F(FuseMixed, TakesAVectorBehindACastNormAsItsWeight) {
  const auto normed = g.add("rms_norm", {plain(x, 6, "a"), b.constant({6}, {1}, DType::f32)}, {{"epsilon", 1e-5}});
  g.add_output("y", b.mul(narrowed(normed), b.cast(b.weight("w", {6}), DType::bf16)));
  EXPECT_NE(fused(g).find("fused_norm(|weight|)"), std::string::npos);
}

// A GPU is filled by one matmul for all of them, where each alone would leave most of it idle.
TEST_F(FusePasses, SmallLinearsOfOneXAreOne) {
  const auto tokens = b.input("tokens", {2, 40, 6}, DType::f32);
  for (const char* name : {"q", "k", "v"}) g.add_output(name, plain(tokens, 8, name));
  EXPECT_EQ(fused(g), "linears");
}

TEST_F(FusePasses, LinearsThatHaveNothingInCommonStayAlone) {
  const auto tokens = b.input("tokens", {2, 40, 6}, DType::f32), others = b.input("others", {2, 40, 6}, DType::f32);
  g.add_output("wide", plain(tokens, 8, "wide"));
  g.add_output("narrow", plain(tokens, 4, "narrow"));
  g.add_output("other", plain(others, 4, "other"));
  g.add_output("biased", linear(others, 4, "biased"));
  g.add_output("few", plain(x, 4, "few"));
  g.add_output("rows", plain(x, 4, "rows"));
  EXPECT_EQ(fused(g), "linear linear linear linear(bias) linear linear");
}

// Rotary positions: pairs of neighbours along the last dimension turn by angles.
struct FuseRopes : FusePasses {
  ValueId cos = b.input("cos", {20, 6}, DType::f32), sin = b.input("sin", {20, 6}, DType::f32);
  ValueId half_cos = b.input("half_cos", {20, 3}, DType::f32), half_sin = b.input("half_sin", {20, 3}, DType::f32);

  std::array<ValueId, 2> halves(ValueId in) {
    const auto pairs = b.split_dim(in, static_cast<std::int64_t>(b.shape(in).size()) - 1, {b.shape(in).back() / 2, 2});
    const auto last = static_cast<std::int64_t>(b.shape(pairs).size()) - 1;
    return {b.slice(pairs, last, 0, 1), b.slice(pairs, last, 1, 2)};
  }
  ValueId side_by_side(ValueId first, ValueId second) {
    const auto last = static_cast<std::int64_t>(b.shape(first).size()) - 1;
    return b.merge_dims(b.concat({first, second}, last), last - 1, 2);
  }
  // x cos + (-x1, x0) sin, with an angle for each element.
  ValueId turned(ValueId in, double sign = -1) {
    const auto [x0, x1] = halves(in);
    const auto other = sign < 0 ? b.unary("neg", x1) : x1;
    return b.add(b.mul(in, cos), b.mul(side_by_side(other, x0), sin));
  }
  // (x0 cos - x1 sin, x1 cos + x0 sin), with an angle for each pair: complex numbers.
  ValueId multiplied(ValueId in) {
    const auto [x0, x1] = halves(in);
    const auto c = b.split_dim(half_cos, 1, {3, 1}), s = b.split_dim(half_sin, 1, {3, 1});
    return side_by_side(g.add("sub", {b.mul(x0, c), b.mul(x1, s)}), b.add(b.mul(x1, c), b.mul(x0, s)));
  }
  // m[..., 0] x0 + m[..., 1] x1, with a matrix for each pair.
  ValueId column0 = b.input("column0", {1, 20, 3, 2}, DType::f32), column1 = b.input("column1", {1, 20, 3, 2}, DType::f32);
  ValueId mapped(ValueId in) {
    const auto pairs = b.split_dim(in, 2, {3, 1, 2});
    const auto half = [&](std::int64_t which) { return b.merge_dims(b.slice(pairs, 4, which, which + 1), 3, 2); };
    return b.merge_dims(b.add(b.mul(column0, half(0)), b.mul(half(1), column1)), 2, 2);
  }
  ValueId rms_norm(ValueId in) { return g.add("rms_norm", {in, vector("rms", b.shape(in).back())}, {{"epsilon", 1e-6}}); }
};

TEST_F(FuseRopes, FindsBothWaysOfWritingThem) {
  g.add_output("turned", turned(x));
  g.add_output("multiplied", multiplied(b.input("y", {2, 20, 6}, DType::f32)));
  EXPECT_EQ(fused(g), "pointwise(rope) pointwise(rope)");
}

// The angles are made of the matrices once, for all that turn by them.
TEST_F(FuseRopes, FindsMatrices) {
  g.add_output("q", mapped(rms_norm(linear(x, 6, "q"))));
  g.add_output("k", mapped(rms_norm(linear(x, 6, "k"))));
  const auto ops = fused(g);
  EXPECT_EQ(ops.find("mul"), std::string::npos) << ops;
  EXPECT_EQ(ops.find("neg"), ops.rfind("neg")) << ops;
  EXPECT_NE(ops.find("concat fused_norm(bias|weight|rope) linear fused_norm(bias|weight|rope)"), std::string::npos) << ops;
}

TEST_F(FuseRopes, AreStepsBehindANorm) {
  g.add_output("y", turned(rms_norm(linear(x, 6, "q"))));
  g.add_output("z", multiplied(rms_norm(linear(x, 6, "k"))));
  EXPECT_EQ(fused(g), "linear fused_norm(bias|weight|rope) linear fused_norm(bias|weight|rope)");
}

TEST_F(FuseRopes, TurnPartsOfAConcatOneByOne) {
  const auto text = b.slice(linear(x, 6, "text"), 1, 0, 8), pixels = b.slice(linear(x, 6, "pixels"), 1, 0, 12);
  g.add_output("y", turned(b.concat({text, pixels}, 1)));
  const auto ops = fused(g);
  EXPECT_EQ(ops.find("neg"), std::string::npos) << ops;
  EXPECT_NE(ops.find("rope"), ops.rfind("rope")) << ops;
}

TEST_F(FuseRopes, LeavesWhatOnlyLooksLikeOne) {
  const auto [left, right] = halves(b.input("square", {2, 3, 3, 6}, DType::f32));  // other dimensions than the last opened and closed
  const auto c = b.split_dim(b.input("column", {3}, DType::f32), 0, {3, 1});
  g.add_output("rows", side_by_side(g.add("sub", {b.mul(left, b.split_dim(c, 1, {1, 1})), b.mul(right, b.split_dim(c, 1, {1, 1}))}),
                                    b.add(b.mul(right, b.split_dim(c, 1, {1, 1})), b.mul(left, b.split_dim(c, 1, {1, 1})))));
  g.add_output("mirrored", turned(x, 1));
  g.add_output("swapped", [&] {
    const auto [x0, x1] = halves(x);
    return b.add(b.mul(x, cos), b.mul(side_by_side(b.unary("neg", x0), x1), sin));
  }());
  g.add_output("wide", [&] {  // a matrix for all pairs, with as many columns as there are elements
    const auto pairs = b.split_dim(x, 2, {3, 2});
    const auto half = [&](std::int64_t which) { return b.slice(pairs, 3, which, which + 1); };
    const auto m = b.input("m", {1, 1, 3, 4}, DType::f32);
    return b.merge_dims(b.add(b.mul(m, half(0)), b.mul(m, half(1))), 2, 2);
  }());
  EXPECT_EQ(fused(g).find("rope"), std::string::npos);
}

// Chains of any steps behind any ops, seen through any views, with readers anywhere.
class Soup {
 public:
  explicit Soup(std::uint32_t seed) : random_(seed), b_(g_, DType::f32) {}
  Graph run() {
    for (const char* name : {"x", "y"}) push(b_.input(name, {2, 20, 6}, DType::f32));
    push(b_.input("image", {2, 6, 4, 5}, DType::f32));
    push(b_.input("text", {2, 20, 6}, DType::f32, "prompt"));
    push(b_.input("emb", {2, 1, 6}, DType::f32));
    while (g_.nodes().size() < 60) step();
    for (int i = 0; i < 5; ++i) g_.add_output(fmt::format("y{}", i), pool_[pool_.size() - 1 - below(10)]);
    return std::move(g_);
  }

 private:
  std::size_t below(std::size_t n) { return std::uniform_int_distribution<std::size_t>(0, n - 1)(random_); }
  void push(ValueId id) { pool_.push_back(id); }
  // Mostly what was made last, so that chains grow.
  ValueId any() { return below(3) ? pool_.back() : pool_[below(pool_.size())]; }
  ValueId weight(const Shape& shape) { return b_.weight(fmt::format("w{}{}", below(3), comfytp::to_string(shape)), shape); }
  ValueId operand(const Shape& shape) {
    for (int tries = 0; tries < 12; ++tries)
      if (const ValueId id = pool_[below(pool_.size())]; b_.shape(id) == shape) return id;
    Shape part = shape;
    for (auto& size : part) size = below(2) ? size : 1;
    return weight(below(2) ? part : Shape{shape.back()});
  }
  void step() {
    const ValueId x = any();
    const Shape s = b_.shape(x);
    switch (below(11)) {
      case 0:
        return push(b_.linear(x, weight({s.back(), s.back()}), "linear"));
      case 1:
        return push(b_.unary(std::array{"silu", "gelu", "tanh", "sigmoid"}[below(4)], x));
      case 2:
      case 3:
        return push(below(2) ? b_.add(x, operand(s)) : b_.add(operand(s), x));
      case 4:
        return push(below(2) ? b_.mul(x, operand(s)) : b_.mul(b_.add(operand(s), b_.constant({}, {1}, DType::f32)), x));
      case 5:
        return push(b_.layer_norm(x, weight({s.back()}), weight({s.back()}), 0.1));
      case 6:
        return push(g_.add("rms_norm", {x, weight({s.back()})}, {{"epsilon", 0.1}}));
      case 7:
        return push(b_.mul(operand(s), b_.unary("gelu", x)));
      case 8:
        if (s == Shape{2, 20, 6}) return push(b_.split_dim(b_.transpose(x, {0, 2, 1}), 2, {4, 5}));
        if (s == Shape{2, 6, 4, 5}) return push(b_.transpose(b_.merge_dims(x, 2, 2), {0, 2, 1}));
        return;
      case 9:
        if (s == Shape{2, 6, 4, 5}) push(b_.conv2d(x, weight({6, 6, 1, 1}), weight({6, 1, 1}), 1, 0, "conv"));
        return;
      case 10:
        push(g_.add("all_reduce", {x}, {{"group", Ints{0}}, {"rank", 0}}));
    }
  }

  std::mt19937 random_;
  Graph g_;
  Builder b_;
  std::vector<ValueId> pool_;
};

class FuseSoup : public testing::TestWithParam<int> {};
TEST_P(FuseSoup, KeepsTheValuesAndFindsNothingMore) {
  for (int seed = 50 * GetParam(); seed < 50 * (GetParam() + 1); ++seed) {
    SCOPED_TRACE(seed);
    const Graph before = Soup(static_cast<std::uint32_t>(seed)).run();
    const auto expected = evaluate(before, test::seeded_leaves());
    const Graph after = fuse(before, Fusion::passes);
    ASSERT_LE(test::difference(expected, evaluate(after, test::seeded_leaves())), 1e-9) << to_text(before) << "\n" << to_text(after);
    ASSERT_EQ(to_text(fuse(after, Fusion::passes)), to_text(after));
    // No more runs in the call than did before; equal nodes are one.
    const auto count = [](const Graph& g) {
      const auto varies = varies_per_call(g);
      int heavy = 0;
      for (std::size_t i = 0; i < g.nodes().size(); ++i) heavy += varies[i] && (is(g.nodes()[i], "linear") || is(g.nodes()[i], "conv2d"));
      return heavy;
    };
    ASSERT_GE(count(prune(before)), count(after));
  }
}
INSTANTIATE_TEST_SUITE_P(Seeds, FuseSoup, testing::Range(0, 4));

}  // namespace
}  // namespace comfytp::graph
