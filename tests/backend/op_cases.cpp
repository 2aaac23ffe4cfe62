#include "op_cases.h"

namespace comfytp::test {
namespace {

using graph::Builder;
using graph::Ints;
using graph::ValueId;

ValueId input(Builder& b, Shape shape, const std::string& name = "x") { return b.input(name, std::move(shape), b.compute); }

// The operands of an epilogue for a result of `shape`; `channel` is its dimension of output channels.
std::vector<ValueId> operands(Builder& b, const std::string& epilogue, const Shape& shape, std::size_t channel) {
  std::vector<ValueId> ids;
  for (std::size_t at = 0; at < epilogue.size();) {
    const auto end = std::min(epilogue.find(',', at), epilogue.size());
    const auto step = epilogue.substr(at, end - at);
    const auto name = step + std::to_string(at);
    if (step == "bias") ids.push_back(b.weight(name, {shape[channel]}));
    if (step == "mul" || step == "add") ids.push_back(input(b, shape, name));
    at = end + 1;
  }
  return ids;
}

OpCase linear(const std::string& name, Shape x, std::int64_t o, const std::string& epilogue = "") {
  return {"linear_" + name,
          [=](Builder& b) {
            std::vector<ValueId> in = {input(b, x), b.weight("w", {o, x.back()})};
            Shape y = x;
            y.back() = o;
            for (auto id : operands(b, epilogue, y, y.size() - 1)) in.push_back(id);
            return b.graph.add("linear", in, epilogue.empty() ? graph::Attrs{} : graph::Attrs{{"epilogue", epilogue}});
          },
          true};
}

// Both operands have three bits behind the first, which a product of 16 of them and more is a few hundredths away for.
OpCase fp8_linear(const std::string& name, Shape x, std::int64_t o, const std::string& epilogue = "", const std::string& input_name = "x") {
  return {"linear_in_fp8_" + name,
          [=](Builder& b) {
            std::vector<ValueId> in = {input(b, x, input_name), b.weight("w", {o, x.back()})};
            Shape y = x;
            y.back() = o;
            for (auto id : operands(b, epilogue, y, y.size() - 1)) in.push_back(id);
            return b.graph.add("linear", in, {{"epilogue", epilogue}, {"product", std::string("fp8")}});
          },
          true, 0.05};
}

// One linear of each number of outputs, every other with a bias.
OpCase linears(const std::string& name, Shape x, std::vector<std::int64_t> outputs, bool fp8 = false) {
  return {(fp8 ? "linears_in_fp8_" : "linears_") + name,
          [=](Builder& b) {
            std::vector<ValueId> in = {input(b, x)};
            Ints biased;
            for (auto o : outputs) in.push_back(b.weight("w" + std::to_string(in.size()), {o, x.back()}));
            for (auto o : outputs) {
              biased.push_back(biased.size() % 2);
              if (biased.back()) in.push_back(b.weight("b" + std::to_string(in.size()), {o}));
            }
            graph::Attrs attrs = {{"biased", biased}};
            if (fp8) attrs.set("product", std::string("fp8"));
            return b.concat(b.graph.add_node(graph::find_op("linears"), in, attrs), static_cast<std::int64_t>(x.size()) - 1);
          },
          true, fp8 ? 0.05 : 0};
}

OpCase conv(const std::string& name, Shape x, Shape k, Ints stride, Ints padding, const std::string& epilogue = "",
            std::int64_t groups = 1) {
  const auto spatial = stride.size();
  const auto op = "conv" + std::to_string(spatial) + "d";
  return {op + "_" + name,
          [=](Builder& b) {
            std::vector<ValueId> in = {input(b, x), b.weight("k", k)};
            graph::Attrs attrs = {{"stride", stride}, {"padding", padding}};
            if (groups != 1) attrs.set("groups", groups);
            Shape y = {x[0], k[0]};
            for (std::size_t d = 0; d < spatial; ++d)
              y.push_back(x[2 + d] ? (x[2 + d] + padding[d] + padding[spatial + d] - k[2 + d]) / stride[d] + 1 : 0);
            for (auto id : operands(b, epilogue, y, 1)) in.push_back(id);
            if (!epilogue.empty()) attrs.set("epilogue", epilogue);
            return b.graph.add(op, in, attrs);
          },
          true};
}

// One weight for two images, for whose shapes oneDNN prefers different layouts: the second finds the first one's.
OpCase conv_of_two_shapes(const std::string& name, Shape first, Shape second, Shape k) {
  return {"conv2d_" + name,
          [=](Builder& b) {
            const auto weight = b.weight("k", k);
            std::vector<ValueId> parts;
            for (const auto& [n, shape] : {std::pair{"first", first}, {"second", second}}) {
              const auto y = b.graph.add("conv2d", {input(b, shape, n), weight}, {{"stride", Ints{1, 1}}, {"padding", Ints{1, 1, 1, 1}}});
              parts.push_back(b.merge_dims(b.transpose(y, {1, 0, 2, 3}), 1, 3));
            }
            return b.concat(parts, 1);
          },
          true};
}

// `tokens_outside`: the heads lie inside the tokens, as they come from a linear.
OpCase attention(const std::string& name, Shape q, std::int64_t keys, std::int64_t e, bool tokens_outside = false) {
  return {"attention_" + name, [=](Builder& b) {
            const auto operand = [&](const std::string& n, std::int64_t tokens, std::int64_t size) {
              if (!tokens_outside) return input(b, {q[0], q[1], tokens, size}, n);
              return b.transpose(b.split_dim(input(b, {q[0], tokens, q[1] * size}, n), 2, {q[1], size}), {0, 2, 1, 3});
            };
            const auto y = b.attention(operand("q", q[2], q[3]), operand("k", keys, q[3]), operand("v", keys, e), 0.3);
            return tokens_outside ? b.merge_dims(b.transpose(y, {0, 2, 1, 3}), 2, 2) : y;
          }};
}

OpCase group_norm(const std::string& name, Shape x, std::int64_t groups, const std::string& activation = "",
                  const std::string& input_name = "x") {
  return {"group_norm_" + name,
          [=](Builder& b) {
            return b.graph.add("group_norm", {input(b, x, input_name), b.weight("weight", {x[1]}), b.weight("bias", {x[1]})},
                               {{"groups", groups}, {"epsilon", 1e-5}, {"activation", activation}});
          },
          true};
}

OpCase layer_norm(const std::string& name, Shape x, const std::string& input_name = "x") {
  return {
      "layer_norm_" + name,
      [=](Builder& b) { return b.layer_norm(input(b, x, input_name), b.weight("weight", {x.back()}), b.weight("bias", {x.back()}), 1e-5); },
      true};
}

OpCase binary(const std::string& name, const std::string& op, Shape x, Shape y) {
  return {op + "_" + name, [=](Builder& b) { return b.graph.add(op, {input(b, x, "a"), input(b, y, "b")}); }};
}

OpCase upsample(const std::string& name, Shape x, Ints from, Ints to, Ints size, Ints from_offset, Ints to_offset) {
  return {"upsample_nearest_" + name, [=](Builder& b) {
            return b.graph.add("upsample_nearest", {input(b, x)},
                               {{"from", from}, {"to", to}, {"size", size}, {"from_offset", from_offset}, {"to_offset", to_offset}});
          }};
}

void add_contractions(std::vector<OpCase>& cases) {
  const std::string all = "bias,silu,mul,add,gelu";
  for (auto& c : {fp8_linear("plain", {2, 40, 64}, 96), fp8_linear("biased", {77, 272}, 48, "bias,silu"), fp8_linear("few_rows", {3, 64}, 32, "bias"),
                  fp8_linear("odd", {40, 52}, 24), fp8_linear("no_rows", {0, 32}, 16), fp8_linear("far_from_zero", {64, 96}, 32, "", "offset"),
                  linears("qkv", {2, 40, 64}, {96, 48, 48}, true), linears("some_odd", {40, 64}, {24, 32, 40}, true), linears("one_odd", {40, 52}, {24}, true),
                  linears("few_rows", {3, 64}, {32, 16}, true), linears("no_rows", {0, 32}, {16, 16}, true),
                  linears("qkv", {2, 40, 64}, {96, 48, 48}), linears("one", {40, 52}, {24}), linears("few_rows", {3, 64}, {32, 16}), linears("no_rows", {0, 32}, {16, 16}),
                  linear("plain", {6, 32}, 64),
                  linear("odd", {2, 5, 13}, 7, "bias"),
                  linear("one_row", {1, 96}, 80, "bias,silu"),
                  linear("vector", {19}, 3),
                  linear("several_chunks", {33, 64}, 208, all),
                  linear("bias_behind", {4, 16}, 48, "add,bias,gelu"),
                  linear("gelu", {3, 48, 64}, 160, "bias,gelu_tanh"),
                  linear("gelu_alone", {100, 24}, 48, "gelu_tanh"),
                  linear("gelu_of_few_rows", {5, 24}, 17, "bias,gelu_tanh"),
                  linear("gelu_between", {50, 24}, 17, "bias,gelu_tanh,mul"),
                  linear("no_rows", {0, 8}, 16, "bias"),
                  linear("no_outputs", {3, 8}, 0),
                  linear("nothing_contracted", {3, 0}, 5, "bias,add"),
                  conv("plain", {2, 32, 6, 5}, {64, 32, 3, 3}, {1, 1}, {1, 1, 1, 1}),
                  conv("odd", {1, 5, 7, 9}, {3, 5, 3, 3}, {1, 1}, {1, 1, 1, 1}, "bias"),
                  conv("several_chunks", {2, 32, 4, 4}, {208, 32, 3, 3}, {1, 1}, {1, 1, 1, 1}, all),
                  conv("stride", {2, 16, 7, 8}, {32, 16, 3, 3}, {2, 2}, {1, 1, 1, 1}, "bias"),
                  conv("one_sided_padding", {1, 16, 6, 6}, {16, 16, 3, 3}, {2, 2}, {0, 0, 1, 1}),
                  conv("pixelwise", {2, 48, 3, 5}, {32, 48, 1, 1}, {1, 1}, {0, 0, 0, 0}, "bias,add"),
                  conv("pixelwise_stride", {1, 16, 5, 5}, {16, 16, 1, 1}, {2, 2}, {0, 0, 0, 0}),
                  conv("large_kernel", {1, 3, 9, 9}, {8, 3, 5, 7}, {1, 2}, {2, 0, 1, 3}, "silu"),
                  conv("image_out", {1, 64, 4, 4}, {4, 64, 3, 3}, {1, 1}, {1, 1, 1, 1}, "bias"),
                  conv("no_rows", {1, 4, 0, 5}, {8, 4, 3, 3}, {1, 1}, {0, 1, 0, 1}, "bias"),
                  conv("no_samples", {0, 4, 5, 5}, {8, 4, 3, 3}, {1, 1}, {1, 1, 1, 1}),
                  conv("nothing_contracted", {1, 0, 4, 5}, {6, 0, 3, 3}, {1, 1}, {1, 1, 1, 1}, "bias,add"),
                  conv("many_inputs", {1, 2816, 1, 2}, {64, 2816, 3, 3}, {1, 1}, {1, 1, 1, 1}),
                  conv_of_two_shapes("two_shapes", {1, 16, 16, 16}, {2, 16, 4, 4}, {192, 16, 3, 3}),
                  conv_of_two_shapes("two_shapes_reversed", {2, 16, 4, 4}, {1, 16, 16, 16}, {192, 16, 3, 3}),
                  conv("one_dimension", {2, 16, 11}, {24, 16, 3}, {2}, {1, 0}, "bias,silu"),
                  conv("pixelwise", {2, 16, 11}, {24, 16, 1}, {1}, {0, 0}, "bias"),
                  conv("three_dimensions", {1, 6, 3, 4, 5}, {8, 6, 3, 3, 3}, {1, 1, 1}, {2, 1, 1, 0, 1, 1}, "bias"),
                  conv("groups", {2, 12, 5, 6}, {20, 3, 3, 3}, {1, 1}, {1, 1, 1, 1}, "bias,mul", 4),
                  conv("depthwise", {1, 32, 9}, {32, 1, 4}, {1}, {3, 0}, "silu", 32),
                  conv("no_groups", {1, 0, 4, 5}, {0, 3, 3, 3}, {1, 1}, {1, 1, 1, 1}, "", 0)})
    cases.push_back(c);
}

// `heads` of q share `groups` of k and v; the mask's shape, and whether it says which keys are seen or is added.
OpCase masked_attention(const std::string& name, Shape q, std::int64_t groups, std::int64_t keys, Shape mask, bool seen) {
  return {"attention_" + name, [=](Builder& b) {
            const auto kv = [&](const std::string& n) { return input(b, {q[0], groups, keys, q[3]}, n); };
            std::vector<ValueId> in = {input(b, q, "q"), kv("k"), kv("v")};
            if (!mask.empty()) {
              auto m = input(b, mask, "mask");
              if (seen) m = b.graph.add("less", {m, b.constant({}, {0.5}, b.compute)});
              in.push_back(m);
            }
            return b.graph.add("attention", in, {{"scale", 0.4}});
          }};
}

OpCase matmul(const std::string& name, Shape a, std::int64_t n) {
  return {"matmul_" + name, [=](Builder& b) {
            Shape other = a;
            other[a.size() - 2] = a.back();
            other.back() = n;
            return b.graph.add("matmul", {input(b, a, "a"), input(b, other, "b")});
          }};
}

void add_attention(std::vector<OpCase>& cases) {
  for (auto& c : {attention("small", {1, 2, 7, 8}, 7, 8), attention("text", {2, 2, 33, 40}, 77, 40, true),
                  attention("several_blocks", {1, 1, 70, 20}, 600, 36), attention("wide_heads", {1, 2, 5, 160}, 65, 160, true),
                  attention("one_query", {3, 1, 1, 16}, 4, 3), attention("no_keys", {1, 2, 3, 4}, 0, 5),
                  attention("no_queries", {1, 2, 0, 4}, 3, 5), attention("no_heads", {2, 0, 3, 4}, 3, 4, true),
                  attention("no_size", {1, 1, 3, 0}, 4, 5), masked_attention("shared_keys", {2, 6, 5, 8}, 2, 9, {}, false),
                  masked_attention("added_mask", {2, 4, 35, 8}, 4, 300, {2, 1, 35, 300}, false),
                  masked_attention("no_key_seen", {2, 2, 5, 4}, 2, 1, {2, 2, 5, 1}, true),
                  masked_attention("seen_keys", {2, 4, 5, 8}, 1, 40, {2, 4, 1, 40}, true),
                  masked_attention("seen_by_query", {2, 2, 34, 8}, 2, 77, {1, 1, 34, 77}, true),
                  masked_attention("seen_by_few", {2, 2, 34, 8}, 2, 1, {1, 1, 34, 1}, true), matmul("plain", {5, 7}, 6),
                  matmul("batches", {2, 3, 17, 33}, 9), matmul("empty", {2, 0, 3}, 4), matmul("nothing_contracted", {2, 3, 0}, 4)})
    cases.push_back(c);
}

void add_norms(std::vector<OpCase>& cases) {
  for (auto& c : {group_norm("plain", {2, 8, 5, 3}, 4), group_norm("silu", {1, 64, 8, 8}, 32, "silu"), group_norm("tokens", {2, 30, 11}, 3),
                  group_norm("vectors", {3, 12}, 2), group_norm("far_from_zero", {2, 32, 16, 16}, 4, "", "offset"),
                  group_norm("several_blocks", {2, 640, 20, 13}, 32, "silu"), group_norm("no_groups", {2, 0, 3, 3}, 0),
                  group_norm("no_rows", {2, 8, 0, 3}, 4), layer_norm("plain", {4, 5, 24}), layer_norm("odd", {3, 77}),
                  layer_norm("far_from_zero", {6, 320}, "offset"), layer_norm("no_rows", {0, 8}), layer_norm("no_channels", {3, 0})})
    cases.push_back(c);
  for (const auto& [name, shape] : {std::pair<std::string, Shape>{"plain", {4, 5, 24}}, {"odd", {3, 77}}, {"no_channels", {3, 0}}})
    cases.push_back({"rms_norm_" + name,
                     [shape](Builder& b) {
                       return b.graph.add("rms_norm", {input(b, shape), b.weight("weight", {shape.back()})}, {{"epsilon", 1e-5}});
                     },
                     true});
  cases.push_back({"group_moments", [](Builder& b) {
                     return b.graph.add("group_moments", {input(b, {2, 12, 5, 7}, "offset")}, {{"groups", std::int64_t{3}}});
                   }});
  cases.push_back({"group_moments_no_rows", [](Builder& b) {
                     return b.graph.add("group_moments", {input(b, {2, 12, 0, 7})}, {{"groups", std::int64_t{3}}});
                   }});
  cases.push_back({"row_moments", [](Builder& b) { return b.graph.add("row_moments", {input(b, {2, 3, 50}, "offset")}); }});
  cases.push_back({"row_moments_no_channels", [](Builder& b) { return b.graph.add("row_moments", {input(b, {2, 3, 0})}); }});
  // A part of a normalised set, with the moments of all three parts; one of them is empty.
  cases.push_back({"group_norm_part",
                   [](Builder& b) {
                     const auto x = input(b, {2, 12, 9, 4});
                     std::vector<ValueId> parts, moments;
                     for (auto [lo, hi] : {std::pair{0, 5}, {5, 5}, {5, 9}}) {
                       parts.push_back(b.slice(x, 2, lo, hi));
                       moments.push_back(b.graph.add("group_moments", {parts.back()}, {{"groups", std::int64_t{4}}}));
                     }
                     return b.graph.add("group_norm", {parts[2], b.weight("weight", {12}), b.weight("bias", {12}), b.concat(moments, 0)},
                                        {{"groups", std::int64_t{4}}, {"epsilon", 1e-5}, {"activation", "silu"}});
                   },
                   true});
  cases.push_back({"layer_norm_part",
                   [](Builder& b) {
                     const auto x = input(b, {3, 20});
                     std::vector<ValueId> parts, moments;
                     for (auto [lo, hi] : {std::pair{0, 13}, {13, 13}, {13, 20}}) {
                       parts.push_back(b.slice(x, 1, lo, hi));
                       moments.push_back(b.graph.add("row_moments", {parts.back()}));
                     }
                     const auto all = b.concat(moments, 0), weight = b.weight("weight", {13});
                     const auto x_normed = b.graph.add("layer_norm", {parts[0], weight, b.weight("bias", {13}), all}, {{"epsilon", 1e-5}});
                     return b.concat({x_normed, b.graph.add("rms_norm", {parts[0], weight, all}, {{"epsilon", 1e-5}})}, 1);
                   },
                   true});
}

OpCase pointwise(const std::string& name, const std::string& steps, Shape x, std::vector<Shape> operands, std::int64_t channel = 1) {
  return {"pointwise_" + name, [=](Builder& b) {
            std::vector<ValueId> in = {input(b, x)};
            for (const auto& shape : operands) in.push_back(input(b, shape, "operand" + std::to_string(in.size())));
            return b.graph.add("pointwise", in, {{"steps", steps}, {"channel", channel}});
          }};
}

// Steps whose operands are f32, whatever the value is, and so is the result where `wide` says so.
OpCase mixed_pointwise(const std::string& name, const std::string& steps, Shape x, std::vector<Shape> operands, bool wide) {
  return {"pointwise_" + name, [=](Builder& b) {
            std::vector<ValueId> in = {input(b, x)};
            for (const auto& shape : operands) in.push_back(b.input("operand" + std::to_string(in.size()), shape, DType::f32));
            graph::Attrs attrs = {{"steps", steps}};
            if (wide) attrs.set("dtype", std::string("f32"));
            const auto y = b.graph.add("pointwise", in, attrs);
            return wide ? b.cast(y, b.compute) : y;
          }};
}

// What an attention's queries go through: a norm of each head, and turns by angles that are f32.
OpCase turned_norm(const std::string& name, Shape x, Shape angles, const std::string& pre, std::vector<Shape> before) {
  return {"fused_norm_" + name,
          [=](Builder& b) {
            std::vector<ValueId> in = {input(b, x)};
            for (const auto& shape : before) in.push_back(input(b, shape, "before" + std::to_string(in.size())));
            in.push_back(b.weight("weight", {x.back()}));
            for (const char* of : {"cos", "sin"}) in.push_back(b.input(of, angles, DType::f32));
            graph::Attrs attrs = {{"pre", pre}, {"norm", std::string("rms_norm")}, {"epsilon", 1e-5}, {"affine", std::string("weight")}, {"post", std::string("rope")}};
            if (!pre.empty()) attrs.set("alone", std::int64_t{1});
            return b.graph.add("fused_norm", in, attrs);
          },
          true};
}

// A value far from zero that nobody wants but the norm: rounded to the result's dtype it would lose what the norm is of.
OpCase wide_normed(const std::string& name, Shape x) {
  return {"fused_norm_" + name, [=](Builder& b) {
            return b.graph.add("fused_norm", {b.input("offset", x, DType::f32)},
                               {{"pre", std::string("relu")}, {"norm", std::string("layer_norm")}, {"epsilon", 1e-5}, {"affine", std::string()},
                                {"post", std::string()}, {"alone", std::int64_t{1}}, {"dtype", std::string(name_of(b.compute))}});
          }};
}

// Both outputs of a fused_norm, or its only one.
OpCase fused_norm(const std::string& name, const std::string& norm, const std::string& affine, Shape x, const std::string& pre,
                  std::vector<Shape> before, const std::string& post, std::vector<Shape> behind, const std::string& input_name = "x", bool wide_operands = false) {
  return {"fused_norm_" + name,
          [=](Builder& b) {
            std::vector<ValueId> in = {input(b, x, input_name)};
            const auto append = [&](const std::vector<Shape>& shapes) {
              for (const auto& shape : shapes)
                in.push_back(b.input("operand" + std::to_string(in.size()), shape, wide_operands ? DType::f32 : b.compute));
            };
            append(before);
            if (!affine.empty()) in.push_back(b.weight("weight", {x.back()}));
            if (affine == "weight,bias") in.push_back(b.weight("bias", {x.back()}));
            append(behind);
            const auto y = b.graph.add_node(graph::find_op("fused_norm"), in,
                                            {{"pre", pre}, {"norm", norm}, {"epsilon", 1e-5}, {"affine", affine}, {"post", post}});
            return y.size() == 1 ? y[0] : b.concat({y[0], y[1]}, 0);
          },
          !affine.empty()};
}

OpCase glu(const std::string& name, const std::string& activation, const std::string& biases, Shape x) {
  return {"glu_" + name,
          [=](Builder& b) {
            std::vector<ValueId> in = {input(b, x, "value"), input(b, x, "gate")};
            if (biases.starts_with("value")) in.push_back(b.weight("value_bias", {x.back()}));
            if (biases.ends_with("gate")) in.push_back(b.weight("gate_bias", {x.back()}));
            return b.graph.add("glu", in, {{"activation", activation}, {"biases", biases}});
          },
          !biases.empty()};
}

OpCase gated_linear(const std::string& name, const std::string& activation, const std::string& biases, Shape x, std::int64_t outputs) {
  return {"gated_linear_" + name,
          [=](Builder& b) {
            std::vector<ValueId> in = {input(b, x), b.weight("value", {outputs, x.back()}), b.weight("gate", {outputs, x.back()})};
            if (biases.starts_with("value")) in.push_back(b.weight("value_bias", {outputs}));
            if (biases.ends_with("gate")) in.push_back(b.weight("gate_bias", {outputs}));
            return b.graph.add("gated_linear", in, {{"activation", activation}, {"biases", biases}});
          },
          true};
}

void add_passes(std::vector<OpCase>& cases) {
  const Shape image = {2, 6, 5, 3};
  for (auto& c : {pointwise("res_block", "bias,add", image, {{6}, {2, 6, 1, 1}}),
                  pointwise("residual", "add,bias,silu", image, {image, {6}}),
                  pointwise("tokens", "bias,mul,add", {2, 7, 40}, {{40}, {2, 1, 40}, {2, 7, 40}}, 2),
                  pointwise("long_rows", "add,gelu,add_one_mul", {3, 5000}, {{3, 5000}, {1, 5000}}),
                  pointwise("most_steps", "bias,gelu,mul,sigmoid,add_one_mul,tanh,add,gelu_tanh", {4, 3, 9},
                            {{3}, {4, 3, 9}, {4, 1, 1}, {1, 3, 9}}),
                  pointwise("across", "mul,add,relu", {3, 4, 5}, {{1, 4, 1}, {3, 1, 5}}), pointwise("alone", "silu", {7}, {}),
                  pointwise("empty", "bias,add", {2, 0, 4}, {{0}, {2, 0, 4}}),
                  pointwise("turned", "mul,rope", {2, 5, 3, 16}, {{2, 1, 1, 1}, {1, 5, 1, 8}, {1, 5, 1, 8}}),
                  pointwise("turned_one_by_one", "rope,add", {2, 5, 3, 16}, {{1, 5, 1, 16}, {1, 5, 1, 16}, {2, 5, 3, 16}}),
                  pointwise("turned_odd", "rope", {3, 7, 6}, {{1, 7, 3}, {1, 7, 3}}),
                  mixed_pointwise("mixed", "mul,add,gelu_tanh", {2, 7, 40}, {{2, 1, 40}, {2, 7, 40}}, false),
                  mixed_pointwise("widened", "add_one_mul,add", {2, 7, 9}, {{2, 1, 9}, {2, 7, 1}}, true),
                  mixed_pointwise("turned_mixed", "rope", {2, 5, 3, 24}, {{1, 5, 1, 12}, {1, 5, 1, 12}}, true),
                  turned_norm("turned", {2, 9, 3, 128}, {1, 9, 1, 64}, "", {}), turned_norm("turned_biased", {1, 9, 3, 64}, {1, 9, 1, 64}, "add", {{1, 1, 3, 64}}),
                  turned_norm("turned_many", {1, 5, 37, 128}, {1, 5, 1, 128}, "add", {{1, 1, 37, 128}}),
                  turned_norm("turned_batch", {2, 5, 3, 256}, {2, 5, 1, 128}, "add", {{1, 1, 3, 256}}),
                  turned_norm("turned_of_one_row", {2, 5, 3, 64}, {1, 1, 1, 32}, "", {}),
                  turned_norm("turned_short", {2, 5, 2, 6}, {2, 5, 1, 3}, "add", {{2, 5, 2, 6}}), turned_norm("turned_long", {2, 3, 1160}, {1, 3, 580}, "", {}),
                  wide_normed("wide_value", {5, 3072}), wide_normed("wide_value_of_short_rows", {7, 128}), wide_normed("wide_value_of_odd_rows", {4, 77}),
                  fused_norm("wide_rows", "layer_norm", "weight,bias", {5, 3072}, "bias,add", {{3072}, {5, 3072}}, "add_one_mul,bias", {{1, 3072}, {3072}}),
                  fused_norm("wider_rows", "rms_norm", "weight", {3, 5120}, "add", {{3, 5120}}, "", {}),
                  fused_norm("widest_rows", "layer_norm", "weight,bias", {2, 9000}, "add", {{2, 9000}}, "", {}, "offset"),
                  fused_norm("uneven_warps", "layer_norm", "", {3, 3064}, "add", {{3, 3064}}, "add_one_mul", {{1, 3064}}, "offset"),
                  fused_norm("gated_residual", "layer_norm", "", {2, 5, 3072}, "bias,mul,add", {{3072}, {2, 1, 3072}, {2, 5, 3072}}, "add_one_mul,add",
                             {{2, 1, 3072}, {2, 1, 3072}}),
                  fused_norm("gated_behind", "rms_norm", "weight", {2, 7, 256}, "", {}, "mul,add", {{2, 1, 256}, {2, 7, 256}}),
                  fused_norm("modulated_twice", "layer_norm", "weight,bias", {3, 17, 128}, "add", {{3, 17, 128}}, "add_one_mul,mul,bias,add",
                             {{1, 1, 128}, {3, 1, 128}, {128}, {3, 17, 128}}),
                  fused_norm("sample_of_one_row", "layer_norm", "", {3, 1, 512}, "mul,add", {{3, 1, 512}, {3, 1, 512}}, "add_one_mul,add", {{3, 1, 512}, {3, 1, 512}}),
                  fused_norm("modulated_by_frames", "layer_norm", "", {2, 3, 4, 256}, "", {}, "add_one_mul,add", {{2, 3, 1, 256}, {2, 3, 1, 256}}),
                  fused_norm("modulated_by_places", "layer_norm", "", {2, 3, 4, 256}, "", {}, "add_one_mul,add", {{2, 1, 4, 256}, {1, 3, 1, 256}}),
                  fused_norm("wide_operands", "layer_norm", "weight", {2, 3, 648}, "bias,add", {{648}, {2, 3, 648}}, "mul,bias", {{2, 1, 648}, {648}}, "x", true),
                  fused_norm("residual", "layer_norm", "weight,bias", {2, 5, 24}, "bias,add", {{24}, {2, 5, 24}}, "", {}),
                  fused_norm("modulated", "layer_norm", "", {2, 5, 77}, "bias,mul,add", {{77}, {2, 1, 77}, {2, 5, 77}}, "add_one_mul,add",
                             {{2, 1, 77}, {2, 1, 77}}),
                  fused_norm("modulation_alone", "layer_norm", "", {3, 40}, "", {}, "add_one_mul,add", {{1, 40}, {3, 40}}),
                  fused_norm("rms", "rms_norm", "weight", {4, 96}, "add,silu", {{4, 96}}, "mul,bias", {{4, 1}, {96}}),
                  fused_norm("weight_alone", "layer_norm", "weight", {9}, "relu", {}, "", {}),
                  fused_norm("far_from_zero", "layer_norm", "weight,bias", {6, 320}, "add", {{6, 320}}, "", {}, "offset"),
                  fused_norm("no_rows", "layer_norm", "weight,bias", {0, 8}, "add", {{0, 8}}, "", {}),
                  fused_norm("no_channels", "rms_norm", "weight", {3, 0}, "", {}, "add", {{3, 0}}),
                  glu("geglu", "gelu", "value,gate", {2, 5, 24}), glu("swiglu", "silu", "", {3, 1500}), glu("value_biased", "sigmoid", "value", {2, 1, 9}),
                  glu("gate_biased", "gelu_tanh", "gate", {33}), glu("empty", "gelu", "value,gate", {0, 4}),
                  gated_linear("geglu", "gelu", "value,gate", {2, 21, 40}, 72), gated_linear("swiglu", "silu", "", {300, 72}, 136),
                  gated_linear("deep", "gelu_tanh", "gate", {17, 776}, 200), gated_linear("odd", "sigmoid", "value", {3, 11, 13}, 7),
                  gated_linear("few_rows", "gelu", "value,gate", {3, 248}, 264), gated_linear("no_rows", "silu", "", {0, 16}, 8)})
    cases.push_back(c);
}

void add_elementwise(std::vector<OpCase>& cases) {
  for (const std::string op :
       {"add", "sub", "mul", "div", "maximum", "minimum", "less", "less_equal", "greater", "greater_equal", "equal", "not_equal"}) {
    cases.push_back(binary("same", op, {2, 3, 4, 5}, {2, 3, 4, 5}));
    cases.push_back(binary("channels", op, {2, 3, 4, 5}, {3, 1, 1}));
  }
  for (auto& c :
       {binary("samples", "add", {2, 6, 4, 5}, {2, 6, 1, 1}), binary("left", "sub", {4, 1}, {2, 3, 4, 5}),
        binary("scalar", "mul", {7, 9}, {}), binary("both", "add", {2, 1, 4, 1}, {3, 1, 5}),
        binary("long_rows", "add", {3, 40000}, {40000}), binary("empty", "add", {2, 0, 3}, {3}), binary("scalars", "div", {}, {})})
    cases.push_back(c);
  // Rounds nothing, so that the op's own error is what is seen.
  const auto positive = [](Builder& b, ValueId x) { return b.graph.add("maximum", {b.unary("abs", x), b.constant({}, {0.125}, b.compute)}); };
  for (const std::string op : {"log", "sqrt", "rsqrt"})
    cases.push_back({op, [=](Builder& b) { return b.unary(op, positive(b, input(b, {3, 70}))); }});
  cases.push_back({"pow", [=](Builder& b) { return b.graph.add("pow", {positive(b, input(b, {3, 70})), input(b, {70}, "y")}); }});
  cases.push_back({"where", [](Builder& b) {
                     const auto condition = b.graph.add("less", {input(b, {3, 1, 8}, "c"), input(b, {1}, "d")});
                     return b.graph.add("where", {condition, input(b, {3, 5, 8}, "a"), input(b, {5, 1}, "b")});
                   }});
  cases.push_back({"integers", [](Builder& b) {
                     const auto i = b.input("i", {3, 5}, DType::i64), j = b.input("j", {5}, DType::i64);
                     const auto odd = b.unary("logical_not", b.graph.add("equal", {i, j}));
                     return b.graph.add("where", {odd, b.add(b.mul(i, j), b.unary("neg", j)), i});
                   }});
  for (const std::string op : {"silu", "gelu", "gelu_tanh", "sigmoid", "tanh", "exp", "relu", "abs", "neg", "sin", "cos"}) {
    cases.push_back({op, [op](Builder& b) { return b.unary(op, input(b, {3, 5, 70})); }});
    cases.push_back({op + "_empty", [op](Builder& b) { return b.unary(op, input(b, {3, 0})); }});
  }
}

void add_movement(std::vector<OpCase>& cases) {
  for (auto to : {DType::f64, DType::f32, DType::f16, DType::bf16})
    cases.push_back({"cast_to_" + std::string(name_of(to)), [to](Builder& b) {
                       return b.cast(b.cast(input(b, {3, 37, 41}), DType::f32), to);
                     }});
  cases.push_back({"cast_integers", [](Builder& b) { return b.cast(b.input("i", {4, 9}, DType::i64), b.compute); }});
  cases.push_back({"cast_weight",
                   [](Builder& b) {
                     return b.graph.add("cast", {b.weight("w", {32, 48})}, {{"dtype", std::string(name_of(b.compute))}});
                   },
                   true});
  for (const std::string mode : {"constant", "replicate", "circular"})
    cases.push_back({"pad_" + mode, [=](Builder& b) {
                       return b.graph.add("pad", {input(b, {2, 3, 4, 5})},
                                          {{"before", Ints{0, 1, 2, 0}}, {"after", Ints{0, 0, 3, 1}}, {"mode", mode}, {"value", 1.5}});
                     }});
  cases.push_back({"pad_empty", [](Builder& b) {
                     return b.graph.add(
                         "pad", {input(b, {2, 0})},
                         {{"before", Ints{0, 1}}, {"after", Ints{1, 2}}, {"mode", std::string("constant")}, {"value", -1.0}});
                   }});
  cases.push_back({"expand", [](Builder& b) { return b.graph.add("expand", {input(b, {3, 1, 5, 1})}, {{"shape", Ints{3, 4, 5, 6}}}); }});
  cases.push_back({"expand_to_nothing", [](Builder& b) { return b.graph.add("expand", {input(b, {3, 1})}, {{"shape", Ints{3, 0}}}); }});
  for (const auto& [name, dims] : {std::pair<std::string, Ints>{"last", {3}},
                                   {"first", {0}},
                                   {"middle", {1, 2}},
                                   {"apart", {0, 3}},
                                   {"all", {0, 1, 2, 3}},
                                   {"none", {}}})
    for (const std::string op : {"sum", "amax"})
      cases.push_back({op + "_" + name, [=](Builder& b) { return b.graph.add(op, {input(b, {3, 5, 7, 130})}, {{"dims", dims}}); }});
  cases.push_back({"sum_of_nothing", [](Builder& b) { return b.graph.add("sum", {input(b, {3, 0, 2})}, {{"dims", Ints{1}}}); }});
  cases.push_back({"sum_integers", [](Builder& b) { return b.graph.add("sum", {b.input("i", {6, 5}, DType::i32)}, {{"dims", Ints{1}}}); }});
  for (std::int64_t dim : {0, 1, 2})
    cases.push_back({"softmax_" + std::to_string(dim), [=](Builder& b) {
                       return b.graph.add("softmax", {input(b, {5, 77, 70})}, {{"dim", dim}});
                     }});
  cases.push_back({"softmax_empty", [](Builder& b) { return b.graph.add("softmax", {input(b, {5, 0, 3})}, {{"dim", std::int64_t{2}}}); }});
  for (std::int64_t dim : {0, 1})
    cases.push_back({"gather_" + std::to_string(dim),
                     [=](Builder& b) {
                       return b.graph.add("gather", {b.weight("table", {120, 130}), b.input("i", {2, 3}, DType::i64)}, {{"dim", dim}});
                     },
                     true});
  cases.push_back({"gather_from_the_end_and_outside", [](Builder& b) {
                     const auto index = b.graph.add("sub", {b.input("i", {40}, DType::i64), b.constant({}, {50}, DType::i64)});
                     return b.graph.add("gather", {input(b, {30, 3}), index}, {{"dim", std::int64_t{0}}});
                   }});
  cases.push_back({"gather_shared_with_linear",
                   [](Builder& b) {
                     const auto table = b.weight("table", {128, 64});
                     return b.linear(b.graph.add("gather", {table, b.input("i", {5}, DType::i32)}, {{"dim", std::int64_t{0}}}), table);
                   },
                   true});
  cases.push_back({"linear_shared_with_gather",
                   [](Builder& b) {
                     const auto table = b.weight("table", {128, 64}), y = b.linear(input(b, {3, 64}), table);
                     return b.concat(
                         {b.slice(y, 1, 0, 64), b.graph.add("gather", {table, b.input("i", {5}, DType::i32)}, {{"dim", std::int64_t{0}}})},
                         0);
                   },
                   true});
  cases.push_back({"constant", [](Builder& b) { return b.constant({2, 3}, {1, -2, 3, 4.5, 0, 6}, b.compute); }});
  cases.push_back({"constant_filled", [](Builder& b) { return b.constant({2, 3, 1}, {0.5}, b.compute); }});
  cases.push_back({"transpose", [](Builder& b) { return b.transpose(input(b, {2, 33, 5, 40}), {3, 0, 2, 1}); }});
  cases.push_back({"split_dim", [](Builder& b) { return b.split_dim(input(b, {3, 24, 5}), 1, {2, 3, 4}); }});
  cases.push_back({"merge_dims", [](Builder& b) { return b.merge_dims(input(b, {3, 2, 4, 5}), 1, 2); }});
  cases.push_back({"merge_dims_apart", [](Builder& b) { return b.merge_dims(b.transpose(input(b, {3, 2, 4, 5}), {0, 2, 1, 3}), 1, 2); }});
  cases.push_back({"slice", [](Builder& b) { return b.slice(input(b, {3, 20, 5}), 1, 4, 17); }});
  cases.push_back({"slice_with_a_step", [](Builder& b) {
                     return b.graph.add("slice", {input(b, {3, 20, 5})}, {{"dim", std::int64_t{1}}, {"start", std::int64_t{4}}, {"stop", std::int64_t{18}}, {"step", std::int64_t{3}}});
                   }});
  cases.push_back({"slice_empty", [](Builder& b) { return b.slice(input(b, {3, 20, 5}), 1, 4, 4); }});
  cases.push_back({"concat", [](Builder& b) {
                     return b.concat({input(b, {2, 3, 4, 5}, "a"), input(b, {2, 0, 4, 5}, "b"), input(b, {2, 7, 4, 5}, "c")}, 1);
                   }});
  cases.push_back({"concat_empty", [](Builder& b) { return b.concat({input(b, {0, 3}, "a"), input(b, {0, 4}, "b")}, 1); }});
  cases.push_back(upsample("twice", {2, 5, 3, 4}, {3, 4}, {6, 8}, {6, 8}, {0, 0}, {0, 0}));
  cases.push_back(upsample("uneven", {1, 5, 3, 4}, {3, 4}, {5, 11}, {5, 11}, {0, 0}, {0, 0}));
  cases.push_back(upsample("part", {1, 5, 2, 4}, {5, 4}, {10, 8}, {3, 8}, {1, 0}, {3, 0}));
  cases.push_back(upsample("no_rows", {1, 5, 0, 4}, {5, 4}, {10, 8}, {0, 8}, {0, 0}, {0, 0}));
}

}  // namespace

std::vector<OpCase> op_cases() {
  std::vector<OpCase> cases;
  add_contractions(cases);
  add_attention(cases);
  add_norms(cases);
  add_passes(cases);
  add_elementwise(cases);
  add_movement(cases);
  return cases;
}

}  // namespace comfytp::test
