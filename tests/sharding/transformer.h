// Transformers as captures give them, for tests of what is cut.
#pragma once

#include <fmt/format.h>

#include <string>
#include <utility>
#include <vector>

#include "graph/builder.h"
#include "graph/rewrites.h"

namespace comfytp::test {

using graph::Builder;
using graph::Graph;
using graph::ValueId;

struct Call {
  std::int64_t batch, height, width, tokens;  // of the latent
};

// "joint", "single" (some blocks of the one, then some of the other) or "cross": merged projections, modulation by the timestep's embedding, a learned matrix added.
struct Transformer {
  static constexpr std::int64_t kWidth = 96, kHeads = 6, kText = 40;
  Graph graph;
  Builder b{graph, DType::f32};
  ValueId embedding = -1, cos = -1, sin = -1;

  ValueId linear(ValueId x, const std::string& key, std::int64_t out) {
    return b.linear(x, b.weight(key + ".weight", {out, b.shape(x).back()}), b.weight(key + ".bias", {out}), key);
  }
  ValueId norm(ValueId x, const std::string& key) {
    return b.layer_norm(x, b.weight(key + ".weight", {kWidth}), b.weight(key + ".bias", {kWidth}), 1e-6, key);
  }
  // Slice i of n along the channels.
  ValueId slice(ValueId x, std::int64_t i) { return b.slice(x, 2, i * kWidth, (i + 1) * kWidth); }
  ValueId heads(ValueId x) { return b.transpose(b.split_dim(x, 2, {kHeads, kWidth / kHeads}), {0, 2, 1, 3}); }
  ValueId attend(ValueId q, ValueId k, ValueId v) { return b.merge_dims(b.transpose(b.attention(q, k, v, 0.25), {0, 2, 1, 3}), 2, 2); }
  ValueId modulation(const std::string& key) {
    const ValueId m = linear(b.unary("silu", embedding), key, 6 * kWidth);
    return b.split_dim(m, 0, {b.shape(m)[0], 1});
  }
  ValueId feed_forward(ValueId x, const std::string& key) { return linear(b.unary("gelu_tanh", linear(x, key + ".0", 4 * kWidth)), key + ".2", kWidth); }
  ValueId gated(ValueId x, ValueId y, ValueId m, std::int64_t i) { return b.add(x, b.mul(y, slice(m, i))); }
  ValueId modulated(ValueId x, ValueId m, std::int64_t i) { return b.add(b.add(x, b.mul(x, slice(m, i))), slice(m, i + 1)); }

  // By the positions' angles, pair by pair (Su et al. 2021).
  ValueId turned(ValueId x) {
    const auto tokens = b.shape(x)[2], width = b.shape(x)[3];
    if (cos < 0) cos = b.input("cos", {1, 1, tokens, width}, DType::f32), sin = b.input("sin", {1, 1, tokens, width}, DType::f32);
    const ValueId pairs = b.split_dim(x, 3, {width / 2, 2});
    const ValueId swapped = b.merge_dims(b.concat({b.unary("neg", b.slice(pairs, 4, 1, 2)), b.slice(pairs, 4, 0, 1)}, 4), 3, 2);
    return b.add(b.mul(x, cos), b.mul(swapped, sin));
  }

  // Image tokens and text tokens attend to each other, each with weights of their own (Flux, SD3).
  void joint_block(ValueId& image, ValueId& text, const std::string& key) {
    std::vector<ValueId> q, k, v, modulations;
    for (auto [stream, name] : {std::pair{text, ".text"}, {image, ".image"}}) {
      modulations.push_back(modulation(key + name + ".mod"));
      const ValueId qkv = linear(modulated(norm(stream, key + name + ".norm1"), modulations.back(), 0), key + name + ".qkv", 3 * kWidth);
      const auto normed = [&](std::int64_t i, const std::string& scale) {
        return graph.add("rms_norm", {heads(slice(qkv, i)), b.weight(key + name + scale, {kWidth / kHeads})}, {{"epsilon", 1e-6}});
      };
      q.push_back(normed(0, ".q_norm")), k.push_back(normed(1, ".k_norm")), v.push_back(heads(slice(qkv, 2)));
    }
    const auto tokens = b.shape(text)[1], all = tokens + b.shape(image)[1];
    const ValueId joint = attend(turned(b.concat(q, 2)), turned(b.concat(k, 2)), b.concat(v, 2));
    std::int64_t from = 0;
    for (auto [stream, name, m] : {std::tuple{&text, ".text", modulations[0]}, {&image, ".image", modulations[1]}}) {
      const auto to = from == 0 ? tokens : all;
      *stream = gated(*stream, linear(b.slice(joint, 1, from, to), key + name + ".proj", kWidth), m, 2);
      *stream = gated(*stream, feed_forward(modulated(norm(*stream, key + name + ".norm2"), m, 3), key + name + ".mlp"), m, 5);
      from = tokens;
    }
  }
  // Both as one sequence, with the same weights (the second half of Flux, Z-Image).
  void single_block(ValueId& both, const std::string& key) {
    const ValueId m = modulation(key + ".mod");
    const ValueId qkv = linear(modulated(norm(both, key + ".norm1"), m, 0), key + ".qkv", 3 * kWidth);
    both = gated(both, linear(attend(heads(slice(qkv, 0)), heads(slice(qkv, 1)), heads(slice(qkv, 2))), key + ".proj", kWidth), m, 2);
    both = gated(both, feed_forward(modulated(norm(both, key + ".norm2"), m, 3), key + ".mlp"), m, 5);
  }
  // Image tokens attend to each other, then to the text (PixArt, Wan).
  void cross_block(ValueId& image, ValueId text, const std::string& key) {
    const ValueId table = b.weight(key + ".table", {1, 6 * kWidth});
    const ValueId m = b.add(modulation(key + ".mod"), table);
    const ValueId qkv = linear(modulated(norm(image, key + ".norm1"), m, 0), key + ".qkv", 3 * kWidth);
    image = gated(image, linear(attend(heads(slice(qkv, 0)), heads(slice(qkv, 1)), heads(slice(qkv, 2))), key + ".proj", kWidth), m, 2);
    const ValueId q = heads(linear(image, key + ".q", kWidth)), kv = linear(text, key + ".kv", 2 * kWidth);
    image = b.add(image, linear(attend(q, heads(slice(kv, 0)), heads(slice(kv, 1))), key + ".out", kWidth));
    image = gated(image, feed_forward(modulated(norm(image, key + ".norm2"), m, 3), key + ".mlp"), m, 5);
  }

  Transformer(const std::string& kind, const Call& call) {
    const auto h = call.height / 2, w = call.width / 2;
    const ValueId x = b.input("x", {call.batch, 4, 2 * h, 2 * w}, DType::f32);
    const ValueId patches = b.conv2d(x, b.weight("patch.weight", {kWidth, 4, 2, 2}), b.weight("patch.bias", {kWidth, 1, 1}), 2, 0, "patch");
    ValueId image = b.transpose(b.merge_dims(patches, 2, 2), {0, 2, 1});
    image = b.add(image, b.slice(b.weight("positions", {1, 64 * 64, kWidth}), 1, 0, h * w));
    ValueId text = linear(b.input("context", {call.batch, call.tokens, kText}, DType::f32, "prompt"), "text", kWidth);
    const ValueId time = b.input("time", {call.batch, 32}, DType::f32);
    embedding = linear(b.unary("silu", linear(time, "time.0", kWidth)), "time.2", kWidth);
    for (int i = 0; i < 2; ++i) {
      const auto key = fmt::format("blocks.{}", i);
      if (kind == "cross") cross_block(image, text, key);
      else joint_block(image, text, key);
    }
    if (kind == "single") {
      ValueId both = b.concat({text, image}, 1);
      for (int i = 0; i < 2; ++i) single_block(both, fmt::format("single.{}", i));
      image = b.slice(both, 1, call.tokens, call.tokens + h * w);
    }
    graph.add_output("output", linear(norm(image, "out.norm"), "out", 16));
    graph = graph::normalise(graph);
  }
};

}  // namespace comfytp::test
