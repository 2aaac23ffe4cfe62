// A UNet that is small enough for the references.
#pragma once

#include "models/shapes_only.h"
#include "models/unet.h"

namespace comfytp::test {

/// Two resolutions with one ResBlock each; transformers at the first (SD1's construction) or at the second (SDXL's).
inline Tensors small_unet(bool linear) {
  using models::UNet;
  using models::UNetBlock;
  using Kind = models::UNetModule::Kind;
  UNet unet;
  const std::int64_t low = linear ? 64 : 32, high = 2 * low, depth = linear ? 2 : 1;
  unet.model_channels = low;
  unet.time_embed_dim = 4 * low;
  unet.out_channels = 4;
  if (linear) unet.label_dim = 40;
  const auto block = [&](const std::string& path, std::int64_t in, std::int64_t out, std::vector<Kind> kinds) {
    UNetBlock result;
    for (Kind kind : kinds) {
      const auto prefix = fmt::format("{}.{}", path, result.size());
      result.push_back({kind, prefix, result.empty() ? in : out, out, unet.transformers.size()});
      if (kind == Kind::transformer) unet.transformers.push_back({prefix, out, depth, 0, 24, linear});
    }
    return result;
  };
  const auto level = [&](bool attends, std::vector<Kind> behind = {}) {
    std::vector<Kind> kinds = {Kind::resnet};
    if (attends) kinds.push_back(Kind::transformer);
    kinds.insert(kinds.end(), behind.begin(), behind.end());
    return kinds;
  };
  unet.input_blocks = {block("input_blocks.0", 4, low, {Kind::conv}), block("input_blocks.1", low, low, level(!linear)),
                       block("input_blocks.2", low, low, {Kind::downsample}), block("input_blocks.3", low, high, level(linear))};
  unet.middle_block = block("middle_block", high, high, {Kind::resnet, Kind::transformer, Kind::resnet});
  unet.output_blocks = {block("output_blocks.0", high + high, high, level(linear)),
                        block("output_blocks.1", high + low, high, level(linear, {Kind::upsample})),
                        block("output_blocks.2", high + low, low, level(!linear)),
                        block("output_blocks.3", low + low, low, level(!linear))};
  Tensors tensors;
  for (const auto& [key, shape] : models::required_tensors(unet)) tensors[key] = {DType::f32, shape};
  return tensors;
}

}  // namespace comfytp::test
