// Which model a checkpoint holds, and the graph of a call of it.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "models/unet.h"
#include "weights/source.h"

namespace comfytp::models {

/// A part of a checkpoint: "denoiser", "text encoder", "vae", "other"; told by the prefixes of its keys.
struct Component {
  std::string name;
  std::int64_t tensors = 0, parameters = 0, bytes = 0;
  std::map<std::string, std::int64_t> parameters_of_dtype;  ///< by the dtype's name
};

/// The denoiser of a checkpoint under LDM's bare names, whatever layout the file has.
struct Checkpoint {
  std::string layout;                 ///< "ldm" (model.diffusion_model.…), "bare", "diffusers"
  std::vector<Component> components;  ///< those that have tensors, the denoiser first
  std::shared_ptr<weights::Source> denoiser;
  UNet unet;
};

/// Recognises layout and family. Throws Error: "…: not a diffusion model …", missing keys, wrong shapes or dtypes.
Checkpoint recognise(std::shared_ptr<const weights::Source> source, const HeadOptions& heads = {});

}  // namespace comfytp::models
