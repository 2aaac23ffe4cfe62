#include "models/model.h"

#include <array>

#include "base/error.h"
#include "weights/layout.h"

namespace comfytp::models {
namespace {

enum Part { denoiser, text_encoder, vae, other };
constexpr std::array<const char*, 4> kPartNames = {"denoiser", "text encoder", "vae", "other"};

/// Which part of a single-file checkpoint a key belongs to, apart from the denoiser (Stability's and ComfyUI's prefixes).
Part part_of(std::string_view key) {
  for (const char* prefix : {"cond_stage_model.", "conditioner.", "text_encoders."})
    if (key.starts_with(prefix)) return text_encoder;
  for (const char* prefix : {"first_stage_model.", "vae."})
    if (key.starts_with(prefix)) return vae;
  return other;
}

std::vector<Component> components_of(const weights::Source& file, const weights::DenoiserTensors& found) {
  std::array<Component, kPartNames.size()> parts;
  for (const auto& [key, info] : file.tensors()) {
    const bool denoises = found.layout == "ldm"    ? key.starts_with("model.diffusion_model.")
                          : found.layout == "bare" ? found.tensors->has(key)
                                                   : true;  // a diffusers folder holds nothing else
    auto& part = parts[denoises ? denoiser : part_of(key)];
    ++part.tensors;
    part.parameters += numel(info.shape);
    part.bytes += info.bytes();
    part.parameters_of_dtype[std::string(name_of(info.dtype))] += numel(info.shape);
  }
  std::vector<Component> result;
  for (std::size_t i = 0; i < parts.size(); ++i) {
    parts[i].name = kPartNames[i];
    if (parts[i].tensors) result.push_back(std::move(parts[i]));
  }
  return result;
}

}  // namespace

Checkpoint recognise(std::shared_ptr<const weights::Source> source, const HeadOptions& heads) {
  auto found = weights::find_denoiser(source);
  require(found.tensors != nullptr,
          "[models] {}: not a diffusion model (expected tensors model.diffusion_model.…, input_blocks.… or, from diffusers, down_blocks.…)",
          source->name());
  Checkpoint checkpoint;
  checkpoint.unet = detect_unet(*found.tensors, heads);
  checkpoint.components = components_of(*source, found);
  checkpoint.layout = std::move(found.layout);
  checkpoint.denoiser = std::move(found.tensors);
  return checkpoint;
}

}  // namespace comfytp::models
