// The names that a denoiser's tensors have in the files of the field, and LDM's bare UNet names, which the engine uses.
#pragma once

#include <memory>
#include <string>

#include "weights/source.h"

namespace comfytp::weights {

/// The denoiser in a source.
struct DenoiserTensors {
  std::string layout;               ///< "ldm" (model.diffusion_model.…), "bare" (input_blocks.…), "diffusers" (down_blocks.…)
  std::shared_ptr<Source> tensors;  ///< under LDM's bare UNet names ("input_blocks.0.0.weight", …); under "ldm" any denoiser's
};

/// Finds the denoiser's tensors by their names alone; `layout` is empty and `tensors` null when no known layout matches.
/// diffusers' UNet2DConditionModel is renamed as convert_ldm_unet_checkpoint does it (Hugging Face diffusers), for any
/// number of levels and of layers in each; throws Error naming the source and a key that is no part of such a UNet.
DenoiserTensors find_denoiser(std::shared_ptr<const Source> source);

}  // namespace comfytp::weights
