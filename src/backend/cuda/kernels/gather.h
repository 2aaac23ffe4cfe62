#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "base/dtype.h"

namespace comfytp::backend::cuda {

/// y[o, i, k] = x[o, index[i], k] of a dense x [outer, size, inner] and `count` indices; a negative index counts from the end.
struct Gather {
  std::int64_t outer = 0, size = 0, inner = 0, count = 0;
  DType from = DType::f32, to = DType::f32;
  bool wide_index = true;      ///< i64, otherwise i32
  unsigned char outside[8] = {};  ///< the element that an index outside gives
};
/// Reads floats in any dtype; what is not a float only as it is.
cudaError_t launch_gather(const Gather& gather, const void* x, const void* index, void* y, cudaStream_t stream);

}  // namespace comfytp::backend::cuda
