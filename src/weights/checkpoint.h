// Opens what users have: a safetensors file, a sharded set with its index, a diffusers folder.
#pragma once

#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <string_view>

#include "weights/source.h"

namespace comfytp::weights {

/// Maps `path` and reads its headers only. Taken are
/// - a .safetensors (or .sft) file;
/// - the index of a sharded one (….safetensors.index.json), whose shards lie beside or below it;
/// - a folder of one model: diffusers' diffusion_pytorch_model in one file or sharded, full precision before a variant such as
///   fp16; otherwise the folder's only index or only file;
/// - a diffusers pipeline folder, of which the denoiser is opened: unet/ or transformer/.
/// Throws Error naming the file, and the key and shard where there are any, and what is wrong with it.
std::shared_ptr<Source> open_checkpoint(const std::filesystem::path& path);

/// The weight map of an index: key -> shard, a relative path without "..". Throws Error naming index, key and shard.
std::map<std::string, std::string, std::less<>> parse_index(std::string_view text, const std::string& name);

}  // namespace comfytp::weights
