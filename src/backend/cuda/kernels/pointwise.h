#pragma once

#include <cuda_runtime.h>

#include "backend/cuda/chain.h"
#include "base/dtype.h"

namespace comfytp::backend::cuda {

/// y = the chain applied to x; both dense in the chain's dimensions, and each of f32 or of `dtype`. y may be x or an operand of full shape, where
/// these are of one dtype.
cudaError_t launch_pointwise(const Chain& chain, const ChainOperands& operands, DType x_dtype, DType y_dtype, DType dtype, const void* x, void* y,
                             cudaStream_t stream);

}  // namespace comfytp::backend::cuda
