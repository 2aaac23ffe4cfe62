// The graph of one call of a UNet.
#include <cmath>

#include "base/error.h"
#include "graph/builder.h"
#include "models/unet.h"

namespace comfytp::models {
namespace {

using graph::ValueId;
using Kind = UNetModule::Kind;

class UNetGraph {
 public:
  UNetGraph(const UNet& unet, const UNetCall& call, DType compute) : unet_(unet), call_(call), b_(graph_, compute) {}

  graph::Graph build() {
    ValueId h = b_.input("x", {call_.batch, unet_.in_channels, call_.height, call_.width}, b_.compute);
    const ValueId timesteps = b_.input("timesteps", {call_.batch}, DType::f32);
    context_ = b_.input("context", {call_.batch, call_.tokens, unet_.context_dim}, b_.compute, "prompt");
    ValueId y = -1;
    if (unet_.label_dim) y = b_.input("y", {call_.batch, *unet_.label_dim}, b_.compute, "prompt");
    std::vector<ValueId> control;
    if (call_.control)
      for (const auto& [name, shape] : control_inputs(unet_, call_)) control.push_back(b_.input(name, shape, b_.compute));
    embedding_ = embedding(timesteps, y);

    std::vector<ValueId> skips;
    for (const auto& block : unet_.input_blocks) skips.push_back(h = run(block, h, {}));
    h = run(unet_.middle_block, h, {});
    if (call_.control) h = b_.add(h, control.back());
    for (const auto& block : unet_.output_blocks) {
      ValueId skip = skips.back();
      skips.pop_back();
      if (call_.control) skip = b_.add(skip, control[skips.size()]);
      // An upsampling restores the size of the skip that comes next, which an odd size makes one less than twice its own.
      h = run(block, b_.concat({h, skip}, 1), skips.empty() ? Shape{} : b_.shape(skips.back()));
    }
    h = b_.unary("silu", group_norm(h, "out.0", 1e-5));
    graph_.add_output("output", conv(h, "out.2"));
    graph::verify(graph_);
    return std::move(graph_);
  }

 private:
  const Shape& stored(const std::string& key) const { return unet_.tensors.at(key).shape; }

  ValueId vector(const std::string& key) { return b_.weight(key, stored(key)); }
  ValueId linear(ValueId x, const std::string& path) {
    const auto& w = stored(path + ".weight");
    const bool bias = unet_.tensors.contains(path + ".bias");
    const ValueId y = scaled(x, path, [&](ValueId in) { return b_.linear(in, b_.weight(path + ".weight", {w[0], w[1]}), path); });
    return bias ? b_.add(y, vector(path + ".bias")) : y;
  }
  ValueId conv(ValueId x, const std::string& path, std::int64_t stride = 1) {
    const auto& k = stored(path + ".weight");
    const ValueId y = scaled(x, path, [&](ValueId in) { return b_.conv2d(in, b_.weight(path + ".weight", k), -1, stride, k[2] / 2, path); });
    return b_.add(y, b_.weight(path + ".bias", {k[0], 1, 1}));
  }
  // So that the weight may stay as it is stored, its scale multiplies the sums, or in f16, whose range they could leave before, what goes in.
  template <typename Project>
  ValueId scaled(ValueId x, const std::string& path, const Project& project) {
    const auto found = unet_.scales.find(path + ".weight");
    if (found == unet_.scales.end()) return project(x);
    const ValueId scale = b_.weight(found->second, {1});
    return b_.compute == DType::f16 ? project(b_.mul(x, scale)) : b_.mul(project(x), scale);
  }
  ValueId group_norm(ValueId x, const std::string& path, double epsilon) {
    return b_.group_norm(x, vector(path + ".weight"), vector(path + ".bias"), unet_.norm_groups, epsilon, path);
  }
  ValueId layer_norm(ValueId x, const std::string& path) {
    return b_.layer_norm(x, vector(path + ".weight"), vector(path + ".bias"), 1e-5, path);
  }

  // silu of the sum of the embeddings of time (Ho et al. 2020: cosines, then sines) and label; every ResBlock begins with the silu.
  ValueId embedding(ValueId timesteps, ValueId y) {
    const auto half = unet_.model_channels / 2;
    graph::Doubles frequencies;
    // Rounded as the models were trained, in single precision: at timestep 999 the last bit of a frequency is felt.
    for (std::int64_t i = 0; i < half; ++i) {
      const float exponent = static_cast<float>(-std::log(10000.0)) * static_cast<float>(i) / static_cast<float>(half);
      frequencies.push_back(static_cast<float>(std::exp(static_cast<double>(exponent))));
    }
    const ValueId angles = b_.mul(b_.split_dim(timesteps, 0, {call_.batch, 1}), b_.constant({half}, std::move(frequencies), DType::f32));
    ValueId e = b_.cast(b_.concat({b_.unary("cos", angles), b_.unary("sin", angles)}, 1), b_.compute);
    e = linear(b_.unary("silu", linear(e, "time_embed.0")), "time_embed.2");
    if (y >= 0) e = b_.add(e, linear(b_.unary("silu", linear(y, "label_emb.0.0")), "label_emb.0.2"));
    return b_.unary("silu", e);
  }

  ValueId run(const UNetBlock& block, ValueId h, const Shape& next_skip) {
    for (const auto& m : block) switch (m.kind) {
        case Kind::conv:
          h = conv(h, m.prefix);
          break;
        case Kind::resnet:
          h = resnet(h, m);
          break;
        case Kind::transformer:
          h = transformer(h, unet_.transformers[m.transformer]);
          break;
        case Kind::downsample:
          h = conv(h, m.prefix + ".op", 2);
          break;
        case Kind::upsample:
          h = conv(b_.upsample_nearest(h, next_skip[2], next_skip[3]), m.prefix + ".conv");
          break;
      }
    return h;
  }

  ValueId resnet(ValueId x, const UNetModule& m) {
    ValueId h = conv(b_.unary("silu", group_norm(x, m.prefix + ".in_layers.0", 1e-5)), m.prefix + ".in_layers.2");
    h = b_.add(h, b_.split_dim(linear(embedding_, m.prefix + ".emb_layers.1"), 1, {m.out, 1, 1}));
    h = conv(b_.unary("silu", group_norm(h, m.prefix + ".out_layers.0", 1e-5)), m.prefix + ".out_layers.3");
    return b_.add(m.in == m.out ? x : conv(x, m.prefix + ".skip_connection"), h);
  }

  ValueId transformer(ValueId image, const UNetTransformer& t) {
    const Shape size = b_.shape(image);
    const ValueId normed = group_norm(image, t.prefix + ".norm", 1e-6);
    ValueId x = linear(b_.transpose(b_.merge_dims(normed, 2, 2), {0, 2, 1}), t.prefix + ".proj_in");
    for (std::int64_t i = 0; i < t.depth; ++i) {
      const auto path = fmt::format("{}.transformer_blocks.{}", t.prefix, i);
      const ValueId self = layer_norm(x, path + ".norm1");
      x = b_.add(x, attention(self, self, path + ".attn1", t.heads));
      x = b_.add(x, attention(layer_norm(x, path + ".norm2"), context_, path + ".attn2", t.heads));
      x = b_.add(x, feed_forward(layer_norm(x, path + ".norm3"), path + ".ff.net"));
    }
    x = b_.transpose(linear(x, t.prefix + ".proj_out"), {0, 2, 1});
    return b_.add(image, b_.split_dim(x, 2, {size[2], size[3]}));
  }

  ValueId attention(ValueId x, ValueId context, const std::string& path, std::int64_t heads) {
    const auto width = b_.shape(x)[2] / heads;
    const auto split = [&](ValueId from, const char* name) {
      return b_.transpose(b_.split_dim(linear(from, path + name), 2, {heads, width}), {0, 2, 1, 3});
    };
    const ValueId q = split(x, ".to_q"), k = split(context, ".to_k"), v = split(context, ".to_v");
    const ValueId a = b_.attention(q, k, v, 1 / std::sqrt(static_cast<double>(width)), path);
    return linear(b_.merge_dims(b_.transpose(a, {0, 2, 1, 3}), 2, 2), path + ".to_out.0");
  }

  // GEGLU (Shazeer 2020): the second half of the projection gates the first.
  ValueId feed_forward(ValueId x, const std::string& path) {
    const ValueId both = linear(x, path + ".0.proj");
    const auto inner = b_.shape(both)[2] / 2;
    const ValueId gate = b_.unary("gelu", b_.slice(both, 2, inner, 2 * inner));
    return linear(b_.mul(b_.slice(both, 2, 0, inner), gate), path + ".2");
  }

  const UNet& unet_;
  const UNetCall& call_;
  graph::Graph graph_;
  graph::Builder b_;
  ValueId context_ = -1, embedding_ = -1;
};

}  // namespace

std::vector<std::pair<std::string, Shape>> control_inputs(const UNet& unet, const UNetCall& call) {
  std::vector<std::pair<std::string, Shape>> inputs;
  Shape shape = {call.batch, unet.in_channels, call.height, call.width};
  for (const auto& block : unet.input_blocks) {
    for (const auto& m : block)
      if (m.kind == Kind::downsample) shape[2] = (shape[2] + 1) / 2, shape[3] = (shape[3] + 1) / 2;
    shape[1] = block.back().out;
    inputs.emplace_back(fmt::format("control.{}", inputs.size()), shape);
  }
  if (!unet.middle_block.empty()) shape[1] = unet.middle_block.back().out;
  inputs.emplace_back("control.middle", shape);
  return inputs;
}

graph::Graph build_unet(const UNet& unet, const UNetCall& call, DType compute) {
  require(call.batch >= 1 && call.height >= 1 && call.width >= 1 && call.tokens >= 1,
          "[models] expected a call with batch, height, width and tokens of at least 1 but got batch {}, latent {}x{} and {} tokens",
          call.batch, call.height, call.width, call.tokens);
  require(compute == DType::f32 || compute == DType::bf16 || compute == DType::f16 || compute == DType::f64,
          "[models] expected to compute in f32, bf16, f16 or f64 but got {}", name_of(compute));
  return UNetGraph(unet, call, compute).build();
}

}  // namespace comfytp::models
