// Small uses of every op: what the sharding rules are tried on.
#pragma once

#include <string>
#include <vector>

#include "graph/graph.h"

namespace comfytp::test {

struct OpCase {
  std::string op;
  graph::Attrs attrs;
  std::vector<graph::Type> inputs;
};

/// At least one for every op that is neither a leaf nor a collective.
inline std::vector<OpCase> op_cases() {
  using graph::Ints;
  const auto f = [](Shape shape) { return graph::Type{DType::f32, std::move(shape)}; };
  const auto text = [](const char* t) { return std::string(t); };
  std::vector<OpCase> cases;
  for (const char* op : {"silu", "gelu", "gelu_tanh", "sin", "cos", "tanh", "sigmoid", "relu", "exp", "log", "sqrt", "rsqrt", "abs", "neg", "logical_not"}) cases.push_back({op, {}, {f({3, 5})}});
  cases.push_back({"cast", {{"dtype", text("f32")}}, {f({3, 5})}});
  const auto with = [](DType dtype, Shape shape) { return graph::Type{dtype, std::move(shape)}; };
  for (const char* op : {"pow", "maximum", "minimum", "equal", "not_equal", "less", "less_equal", "greater", "greater_equal"})
    cases.push_back({op, {}, {f({3, 1, 5}), f({4, 5})}});
  cases.push_back({"where", {}, {with(DType::boolean, {4, 1}), f({3, 4, 5}), f({5})}});
  cases.push_back({"sum", {{"dims", Ints{1}}}, {f({3, 4, 5})}});
  cases.push_back({"sum", {{"dims", Ints{0, 2}}}, {f({3, 4, 5})}});
  cases.push_back({"amax", {{"dims", Ints{2}}}, {f({3, 4, 5})}});
  cases.push_back({"softmax", {{"dim", 1}}, {f({3, 4, 5})}});
  cases.push_back({"matmul", {}, {f({2, 4, 5}), f({2, 5, 3})}});
  cases.push_back({"gather", {{"dim", 1}}, {f({3, 4, 5}), with(DType::i64, {6})}});
  cases.push_back({"gather", {{"dim", 0}}, {f({4, 5}), with(DType::i64, {2, 3})}});
  cases.push_back({"pad", {{"before", Ints{0, 1, 2}}, {"after", Ints{0, 2, 0}}, {"mode", text("constant")}, {"value", 0.5}}, {f({2, 5, 4})}});
  cases.push_back({"pad", {{"before", Ints{0, 1, 2}}, {"after", Ints{0, 2, 3}}, {"mode", text("replicate")}}, {f({2, 5, 4})}});
  cases.push_back({"pad", {{"before", Ints{0, 1}}, {"after", Ints{0, 2}}, {"mode", text("circular")}}, {f({3, 4})}});
  cases.push_back({"expand", {{"shape", Ints{3, 4, 5}}}, {f({3, 1, 5})}});
  cases.push_back({"slice", {{"dim", 1}, {"start", 1}, {"stop", 6}, {"step", 2}}, {f({3, 7, 4})}});
  for (const char* op : {"add", "sub", "mul", "div"}) {
    cases.push_back({op, {}, {f({3, 4, 5}), f({3, 4, 5})}});
    cases.push_back({op, {}, {f({3, 4, 5}), f({4, 1})}});
    cases.push_back({op, {}, {f({1, 5}), f({3, 4, 5})}});
  }
  cases.push_back({"transpose", {{"order", Ints{2, 0, 1}}}, {f({3, 4, 5})}});
  cases.push_back({"split_dim", {{"dim", 1}, {"sizes", Ints{4, 3}}}, {f({3, 12, 2})}});
  cases.push_back({"split_dim", {{"dim", 1}, {"sizes", Ints{1, 5, 1}}}, {f({3, 5, 2})}});
  cases.push_back({"merge_dims", {{"dim", 1}, {"count", 2}}, {f({3, 4, 3, 2})}});
  cases.push_back({"merge_dims", {{"dim", 0}, {"count", 3}}, {f({1, 5, 3, 2})}});
  cases.push_back({"slice", {{"dim", 1}, {"start", 1}, {"stop", 4}}, {f({3, 5, 4})}});
  cases.push_back({"concat", {{"dim", 1}}, {f({3, 2, 4}), f({3, 3, 4})}});
  cases.push_back({"linear", {}, {f({2, 5, 6}), f({7, 6})}});
  cases.push_back({"linear", {{"epilogue", text("bias,gelu,mul,add")}}, {f({5, 6}), f({7, 6}), f({7}), f({5, 7}), f({5, 7})}});
  const auto conv = [&](Ints stride, Ints padding) { return graph::Attrs{{"stride", std::move(stride)}, {"padding", std::move(padding)}}; };
  cases.push_back({"conv2d", conv({1, 1}, {1, 1, 1, 1}), {f({2, 3, 9, 4}), f({5, 3, 3, 3})}});
  cases.push_back({"conv2d", conv({2, 2}, {1, 1, 1, 1}), {f({2, 3, 9, 5}), f({4, 3, 3, 3})}});
  cases.push_back({"conv2d", conv({2, 1}, {0, 1, 1, 1}), {f({1, 2, 8, 5}), f({3, 2, 3, 3})}});
  cases.push_back({"conv2d", conv({1, 1}, {0, 0, 0, 0}), {f({2, 6, 5, 3}), f({4, 6, 1, 1})}});
  cases.push_back({"conv2d", conv({1, 1}, {0, 0, 0, 0}), {f({1, 2, 7, 6}), f({3, 2, 3, 3})}});
  cases.push_back({"conv2d", conv({1, 1}, {2, 2, 2, 2}), {f({1, 2, 6, 6}), f({3, 2, 5, 5})}});
  auto grouped = conv({1, 1}, {1, 1, 1, 1});
  grouped.set("groups", std::int64_t{3});
  cases.push_back({"conv2d", grouped, {f({2, 6, 5, 4}), f({9, 2, 3, 3})}});
  cases.push_back({"conv1d", conv({2}, {1, 1}), {f({2, 3, 9}), f({4, 3, 3})}});
  cases.push_back({"conv3d", conv({1, 2, 2}, {1, 0, 1, 1, 0, 1}), {f({1, 2, 4, 6, 5}), f({3, 2, 3, 2, 3})}});
  auto fused = conv({1, 1}, {1, 1, 1, 1});
  fused.set("epilogue", text("bias,silu,add"));
  cases.push_back({"conv2d", fused, {f({2, 3, 5, 4}), f({5, 3, 3, 3}), f({5}), f({2, 5, 5, 4})}});
  cases.push_back({"attention", {{"scale", 0.5}}, {f({2, 5, 6, 4}), f({2, 5, 7, 4}), f({2, 5, 7, 3})}});
  cases.push_back({"attention", {{"scale", 0.5}}, {f({2, 6, 5, 4}), f({2, 3, 7, 4}), f({2, 3, 7, 4}), with(DType::boolean, {2, 1, 1, 7})}});
  cases.push_back({"attention", {{"scale", 0.5}}, {f({2, 4, 5, 4}), f({2, 4, 7, 4}), f({2, 4, 7, 4}), f({1, 4, 5, 7})}});
  cases.push_back({"rms_norm", {{"epsilon", 1e-5}}, {f({3, 5, 9}), f({9})}});
  cases.push_back({"group_norm", {{"groups", 6}, {"epsilon", 1e-5}}, {f({2, 12, 5, 4}), f({12}), f({12})}});
  cases.push_back({"group_norm", {{"groups", 2}, {"epsilon", 1e-5}, {"activation", text("silu")}}, {f({3, 6, 7}), f({6}), f({6})}});
  cases.push_back({"layer_norm", {{"epsilon", 1e-5}}, {f({3, 5, 9}), f({9}), f({9})}});
  cases.push_back({"pointwise", {{"steps", text("bias,add,gelu")}, {"channel", 1}}, {f({2, 5, 4}), f({5}), f({2, 5, 1})}});
  cases.push_back({"pointwise", {{"steps", text("rope,add")}, {"dtype", text("f32")}}, {f({2, 5, 4}), f({1, 5, 2}), f({1, 5, 2}), f({2, 5, 4})}});
  cases.push_back({"fused_norm",
                   {{"pre", text("add")}, {"norm", text("layer_norm")}, {"epsilon", 1e-5}, {"affine", text("weight")}, {"post", text("mul")}},
                   {f({2, 5, 6}), f({2, 5, 6}), f({6}), f({2, 1, 6})}});
  cases.push_back({"glu", {{"activation", text("gelu")}, {"biases", text("value")}}, {f({2, 5, 6}), f({2, 5, 6}), f({6})}});
  cases.push_back({"gated_linear", {{"activation", text("silu")}, {"biases", text("gate")}}, {f({2, 5, 6}), f({4, 6}), f({4, 6}), f({4})}});
  cases.push_back({"linears", {{"biased", Ints{1}}}, {f({2, 5, 6}), f({4, 6}), f({4})}});
  cases.push_back({"group_moments", {{"groups", 3}}, {f({2, 6, 4, 3})}});
  cases.push_back({"row_moments", {}, {f({2, 5, 6})}});
  cases.push_back({"upsample_nearest",
                   {{"from", Ints{4, 3}}, {"to", Ints{8, 6}}, {"size", Ints{8, 6}}, {"from_offset", Ints{0, 0}}, {"to_offset", Ints{0, 0}}},
                   {f({2, 3, 4, 3})}});
  cases.push_back({"upsample_nearest",
                   {{"from", Ints{5, 3}}, {"to", Ints{9, 7}}, {"size", Ints{9, 7}}, {"from_offset", Ints{0, 0}}, {"to_offset", Ints{0, 0}}},
                   {f({1, 2, 5, 3})}});
  return cases;
}

}  // namespace comfytp::test
