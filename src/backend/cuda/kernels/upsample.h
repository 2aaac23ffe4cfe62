#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace comfytp::backend::cuda {

/// Nearest neighbours of an NHWC image or of a part of one: output row h shows input row (h + to_offset) * from / to - from_offset.
struct Upsample {
  std::int64_t samples = 0, in[2] = {}, out[2] = {}, pixel = 0;  ///< rows and columns; a pixel in bytes
  std::int64_t from[2] = {}, to[2] = {}, from_offset[2] = {}, to_offset[2] = {};
};
cudaError_t launch_upsample(const Upsample& upsample, const void* x, void* y, cudaStream_t stream);

}  // namespace comfytp::backend::cuda
