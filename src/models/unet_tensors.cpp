// The construction of the published UNets (CompVis latent-diffusion's openaimodel.py, Stability's generative-models), and
// the tensors that a construction calls for.
#include <algorithm>

#include "base/error.h"
#include "models/unet.h"

namespace comfytp::models {
namespace {

using Kind = UNetModule::Kind;

/// What the published configuration files state.
struct Family {
  std::string name;
  std::int64_t model_channels;
  std::vector<std::int64_t> multipliers;
  std::vector<std::int64_t> depths;  ///< transformer blocks of each level
  std::int64_t middle_depth;
  std::int64_t context_dim;
  bool linear;
  std::optional<std::int64_t> label_dim;
};

const std::vector<Family>& families() {
  static const std::vector<Family> list = {
      {"sd1", 320, {1, 2, 4, 4}, {1, 1, 1, 0}, 1, 768, false, {}},
      {"sd2", 320, {1, 2, 4, 4}, {1, 1, 1, 0}, 1, 1024, true, {}},
      {"sdxl", 320, {1, 2, 4}, {0, 2, 10}, 10, 2048, true, 2816},
      {"sdxl-refiner", 384, {1, 2, 4, 4}, {0, 4, 4, 0}, 4, 1280, true, 2560},
  };
  return list;
}

UNet construct(const Family& family, std::int64_t width) {
  constexpr std::int64_t resnets = 2;
  UNet unet;
  unet.family = family.name;
  unet.in_channels = unet.out_channels = 4;
  unet.model_channels = width;
  unet.time_embed_dim = 4 * width;
  unet.context_dim = family.context_dim;
  unet.label_dim = family.label_dim;
  unet.levels = static_cast<std::int64_t>(family.multipliers.size());

  const auto append = [&](UNetBlock& block, const std::string& path, Kind kind, std::int64_t in, std::int64_t out, std::int64_t depth = 0) {
    const auto prefix = fmt::format("{}.{}", path, block.size());
    block.push_back({kind, prefix, in, out, unet.transformers.size()});
    if (kind == Kind::transformer) unet.transformers.push_back({prefix, in, depth, 0, family.context_dim, family.linear});
  };
  const auto add = [&](std::vector<UNetBlock>& blocks, const char* name, std::int64_t in, std::int64_t out,
                       std::int64_t depth) -> UNetBlock& {
    const auto path = fmt::format("{}.{}", name, blocks.size());
    auto& block = blocks.emplace_back();
    append(block, path, Kind::resnet, in, out);
    if (depth) append(block, path, Kind::transformer, out, out, depth);
    return block;
  };

  append(unet.input_blocks.emplace_back(), "input_blocks.0", Kind::conv, unet.in_channels, width);
  std::vector<std::int64_t> skips = {width};
  std::int64_t channels = width;
  for (std::size_t level = 0; level < family.multipliers.size(); ++level) {
    for (int i = 0; i < resnets; ++i) {
      add(unet.input_blocks, "input_blocks", channels, width * family.multipliers[level], family.depths[level]);
      skips.push_back(channels = width * family.multipliers[level]);
    }
    if (level + 1 == family.multipliers.size()) break;
    const auto path = fmt::format("input_blocks.{}", unet.input_blocks.size());
    append(unet.input_blocks.emplace_back(), path, Kind::downsample, channels, channels);
    skips.push_back(channels);
  }
  append(unet.middle_block, "middle_block", Kind::resnet, channels, channels);
  append(unet.middle_block, "middle_block", Kind::transformer, channels, channels, family.middle_depth);
  append(unet.middle_block, "middle_block", Kind::resnet, channels, channels);
  for (std::size_t level = family.multipliers.size(); level-- > 0;)
    for (int i = 0; i <= resnets; ++i) {
      const auto out = width * family.multipliers[level];
      auto& block = add(unet.output_blocks, "output_blocks", channels + skips.back(), out, family.depths[level]);
      skips.pop_back();
      channels = out;
      if (level && i == resnets) append(block, fmt::format("output_blocks.{}", unet.output_blocks.size() - 1), Kind::upsample, out, out);
    }
  return unet;
}

class Required {
 public:
  std::vector<std::pair<std::string, Shape>> list;

  void linear(const std::string& path, std::int64_t in, std::int64_t out, bool bias = true) {
    list.push_back({path + ".weight", {out, in}});
    if (bias) list.push_back({path + ".bias", {out}});
  }
  void conv(const std::string& path, std::int64_t in, std::int64_t out, std::int64_t kernel = 3) {
    list.push_back({path + ".weight", {out, in, kernel, kernel}});
    list.push_back({path + ".bias", {out}});
  }
  void norm(const std::string& path, std::int64_t channels) {
    list.push_back({path + ".weight", {channels}});
    list.push_back({path + ".bias", {channels}});
  }

  void attention(const std::string& path, std::int64_t channels, std::int64_t context) {
    linear(path + ".to_q", channels, channels, false);
    linear(path + ".to_k", context, channels, false);
    linear(path + ".to_v", context, channels, false);
    linear(path + ".to_out.0", channels, channels);
  }

  void transformer(const UNetTransformer& t) {
    const auto project = [&](const std::string& path) {
      t.linear ? linear(path, t.channels, t.channels) : conv(path, t.channels, t.channels, 1);
    };
    norm(t.prefix + ".norm", t.channels);
    project(t.prefix + ".proj_in");
    for (std::int64_t i = 0; i < t.depth; ++i) {
      const auto path = fmt::format("{}.transformer_blocks.{}", t.prefix, i);
      for (const char* name : {".norm1", ".norm2", ".norm3"}) norm(path + name, t.channels);
      attention(path + ".attn1", t.channels, t.channels);
      attention(path + ".attn2", t.channels, t.context_dim);
      linear(path + ".ff.net.0.proj", t.channels, 8 * t.channels);
      linear(path + ".ff.net.2", 4 * t.channels, t.channels);
    }
    project(t.prefix + ".proj_out");
  }

  void module(const UNet& unet, const UNetModule& m) {
    switch (m.kind) {
      case Kind::conv:
        return conv(m.prefix, m.in, m.out);
      case Kind::downsample:
        return conv(m.prefix + ".op", m.in, m.out);
      case Kind::upsample:
        return conv(m.prefix + ".conv", m.in, m.out);
      case Kind::transformer:
        return transformer(unet.transformers[m.transformer]);
      case Kind::resnet:
        break;
    }
    norm(m.prefix + ".in_layers.0", m.in);
    conv(m.prefix + ".in_layers.2", m.in, m.out);
    linear(m.prefix + ".emb_layers.1", unet.time_embed_dim, m.out);
    norm(m.prefix + ".out_layers.0", m.out);
    conv(m.prefix + ".out_layers.3", m.out, m.out);
    if (m.in != m.out) conv(m.prefix + ".skip_connection", m.in, m.out, 1);
  }
};

}  // namespace

std::vector<std::pair<std::string, Shape>> required_tensors(const UNet& unet) {
  Required required;
  required.linear("time_embed.0", unet.model_channels, unet.time_embed_dim);
  required.linear("time_embed.2", unet.time_embed_dim, unet.time_embed_dim);
  if (unet.label_dim) {
    required.linear("label_emb.0.0", *unet.label_dim, unet.time_embed_dim);
    required.linear("label_emb.0.2", unet.time_embed_dim, unet.time_embed_dim);
  }
  for (const auto& block : unet.input_blocks)
    for (const auto& m : block) required.module(unet, m);
  for (const auto& m : unet.middle_block) required.module(unet, m);
  for (const auto& block : unet.output_blocks)
    for (const auto& m : block) required.module(unet, m);
  const auto last = unet.output_blocks.back().back().out;
  required.norm("out.0", last);
  required.conv("out.2", last, unet.out_channels);
  return std::move(required.list);
}

std::map<std::string, weights::TensorInfo, std::less<>> unet_tensors(const std::string& family, DType dtype,
                                                                     std::optional<std::int64_t> width) {
  const auto& list = families();
  const auto found = std::find_if(list.begin(), list.end(), [&](const Family& f) { return f.name == family; });
  require(found != list.end(), "[models] expected a family sd1, sd2, sdxl or sdxl-refiner but got '{}'", family);
  require(!width || (*width > 0 && *width % 32 == 0), "[models] expected a width that is a multiple of 32 but got {}", width.value_or(0));
  std::map<std::string, weights::TensorInfo, std::less<>> tensors;
  for (auto& [key, shape] : required_tensors(construct(*found, width.value_or(found->model_channels)))) tensors[key] = {dtype, shape};
  return tensors;
}

}  // namespace comfytp::models
