// Opens what users have: a safetensors file, a sharded set with its index, a diffusers folder.
#pragma once

#include <filesystem>
#include <memory>

#include "weights/source.h"

namespace comfytp::weights {

/// Maps `path` and reads its headers only: a .safetensors file, an …index.json, a folder that holds either, or a diffusers
/// pipeline folder (its denoiser: unet/ or transformer/). Throws Error naming the file and what is wrong with it.
std::shared_ptr<Source> open_checkpoint(const std::filesystem::path& path);

}  // namespace comfytp::weights
