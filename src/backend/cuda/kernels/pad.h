#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "backend/cuda/copy.h"

namespace comfytp::backend::cuda {

enum class PadMode : std::uint8_t { constant, replicate, circular };

/// Dimensions as they lie in memory, outermost first, both sides dense.
struct Pad {
  PadMode mode = PadMode::constant;
  int rank = 0, element = 1;  ///< bytes of an element
  std::int64_t in[kMaxRank] = {}, out[kMaxRank] = {}, before[kMaxRank] = {};
  unsigned char value[8] = {};
};
cudaError_t launch_pad(const Pad& pad, const void* x, void* y, cudaStream_t stream);

}  // namespace comfytp::backend::cuda
