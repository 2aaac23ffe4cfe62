#pragma once

#include <cuda_runtime.h>

#include "backend/cuda/chain.h"
#include "base/dtype.h"

namespace comfytp::backend::cuda {

/// y = the chain applied to x; both dense in the chain's dimensions. y may be x or an operand of full shape.
cudaError_t launch_pointwise(const Chain& chain, const ChainOperands& operands, DType dtype, const void* x, void* y, cudaStream_t stream);

}  // namespace comfytp::backend::cuda
