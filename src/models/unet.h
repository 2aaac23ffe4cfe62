// The UNets of the Stable Diffusion families (Rombach et al. 2022, Podell et al. 2023): SD1.x, SD2.x, SDXL base and
// refiner, their inpainting and instruct variants, and narrower or deeper ones of the same construction.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "graph/graph.h"
#include "weights/source.h"

namespace comfytp::models {

/// One transformer ("spatial transformer") of the UNet.
struct UNetTransformer {
  std::string prefix;            ///< "input_blocks.1.1"
  std::int64_t channels = 0;     ///< inner width
  std::int64_t depth = 0;        ///< transformer blocks
  std::int64_t heads = 0;        ///< of every attention in it
  std::int64_t context_dim = 0;  ///< width of the text tokens
  bool linear = false;           ///< its projections are linears, not 1x1 convolutions: the same arithmetic
};

/// One module of a block, as LDM numbers them.
struct UNetModule {
  enum class Kind { conv, resnet, transformer, downsample, upsample };
  Kind kind = Kind::conv;
  std::string prefix;            ///< "input_blocks.1.0"
  std::int64_t in = 0, out = 0;  ///< channels
  std::size_t transformer = 0;   ///< index in UNet::transformers
};
using UNetBlock = std::vector<UNetModule>;

/// What the tensors of a UNet say. All sizes are read from shapes; heads follow the family's rule where shapes cannot say.
struct UNet {
  std::string family;            ///< "sd1", "sd2", "sdxl", "sdxl-refiner", or "unet" for another of this construction
  std::int64_t in_channels = 0;  ///< 4; 9 inpainting; 8 instruct
  std::int64_t out_channels = 0;
  std::int64_t model_channels = 0;
  std::int64_t time_embed_dim = 0;
  std::int64_t context_dim = 0;
  std::optional<std::int64_t> label_dim;  ///< width of y (SDXL's pooled text and sizes), if there is one
  std::int64_t levels = 0;                ///< resolutions; an image is halved levels-1 times
  std::int64_t norm_groups = 32;
  std::vector<UNetTransformer> transformers;
  std::vector<UNetBlock> input_blocks;  ///< what each makes is a skip
  UNetBlock middle_block;
  std::vector<UNetBlock> output_blocks;                             ///< each begins with a concat of the last skip that is left
  std::map<std::string, weights::TensorInfo, std::less<>> tensors;  ///< the tensors that the UNet uses, in LDM's bare names
  /// Of a weight that was scaled before it was rounded to fp8: the tensor of one number that its values are to be multiplied by.
  std::map<std::string, std::string, std::less<>> scales;
};

/// Shapes do not tell the number of heads. Without options: heads of width 64 where the projections are linears or there is
/// a label embedding (SD2.x, SDXL, refiner), else 8 heads (SD1.x).
struct HeadOptions {
  std::optional<std::int64_t> heads;     ///< heads of every attention
  std::optional<std::int64_t> head_dim;  ///< or the width of a head
};

/// Reads a UNet off tensors that carry LDM's bare names ("input_blocks.0.0.weight", …). Throws Error that names the source and
/// what is missing (the first few keys and the count), of the wrong shape or dtype, or stands in a block without a place in this
/// construction (a video model's time layers): leaving that out would give a wrong picture. Of quantised weights those are read that
/// are fp8 with one scale each, as ComfyUI names it: "….scale_weight" (beside a marker "scaled_fp8") or "….weight_scale" (beside
/// "….comfy_quant"); what says how their inputs may be rounded is passed over.
UNet detect_unet(const weights::Source& source, const HeadOptions& heads = {});

/// One call of the denoiser.
struct UNetCall {
  std::int64_t batch = 1;
  std::int64_t height = 64, width = 64;  ///< of the latent
  std::int64_t tokens = 77;
  bool control = false;  ///< ControlNet residuals are inputs
};

/// Inputs: x [N,C,H,W], timesteps f32 [N], context [N,L,D] (prompt), y [N,A] (prompt) where the UNet has one; with control
/// the residuals "control.0" … in the order of the skips (input blocks) and "control.middle", each added where ControlNet adds it.
/// Output: output [N,C,H,W]. Weights have LDM's bare names. Throws Error when the sizes do not fit.
graph::Graph build_unet(const UNet& unet, const UNetCall& call, DType compute);

/// Shapes of the control residuals that build_unet expects: name -> shape.
std::vector<std::pair<std::string, Shape>> control_inputs(const UNet& unet, const UNetCall& call);

/// The tensors of a published family at its full size ("sd1", "sd2", "sdxl", "sdxl-refiner"), in LDM's bare names, or of a
/// reduced one with `width` channels at the first level (a multiple of 32): what a seeded checkpoint for demos and tests is made of.
/// A reduced one keeps the widths of context and y, by which the family is told. Throws Error for another family or width.
std::map<std::string, weights::TensorInfo, std::less<>> unet_tensors(const std::string& family, DType dtype,
                                                                     std::optional<std::int64_t> width = {});

/// The keys and shapes that the blocks of `unet` call for, in the order of the construction.
std::vector<std::pair<std::string, Shape>> required_tensors(const UNet& unet);

}  // namespace comfytp::models
