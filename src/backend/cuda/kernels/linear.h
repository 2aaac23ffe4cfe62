#pragma once

#include <cuda_runtime.h>

#include "backend/cuda/chain.h"
#include "base/dtype.h"

namespace comfytp::backend::cuda {

constexpr std::int64_t kFewRows = 8;

/// y[r, o] = chain(sum over i of x[r, i] w[o, i]) for up to kFewRows rows, where reading the weights is all that costs. `inner` must be
/// a multiple of what 16 bytes hold; the chain is over [rows, outputs], innermost not merged.
cudaError_t launch_few_rows(DType dtype, std::int64_t rows, std::int64_t inner, std::int64_t outputs, const void* x, const void* w, const Chain& chain,
                            const ChainOperands& operands, void* y, cudaStream_t stream);

}  // namespace comfytp::backend::cuda
