#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "base/dtype.h"

namespace comfytp::backend::cuda {

/// A convolution over up to three spatial dimensions (those that are missing have size 1), with the strides in elements in which x,
/// filter and y lie.
struct DirectConvolution {
  std::int64_t n = 0, outputs = 0, inputs = 0, groups = 1;  ///< inputs: of one group
  std::int64_t x[3] = {1, 1, 1}, window[3] = {1, 1, 1}, y[3] = {1, 1, 1}, stride[3] = {1, 1, 1}, before[3] = {};
  std::int64_t x_strides[5] = {}, filter_strides[5] = {}, y_strides[5] = {};  ///< n, channels, spatial; o, i, window
};

/// Plain and slow, for what cuDNN does not take.
cudaError_t launch_direct_convolution(const DirectConvolution& convolution, DType dtype, const void* x, const void* filter, void* y, cudaStream_t stream);

}  // namespace comfytp::backend::cuda
