#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "base/dtype.h"

namespace comfytp::backend::cuda {

/// y[i] = x[i] / scale[0] in e4m3, rounded to nearest even, with scale[0] = max|x| / 448 (1e-35 at least), or 1 where all of x is 0. With infinity or
/// NaN in x the scale is infinity or NaN, so that no product is a number. x is of f16, bf16 or f32, `count` a multiple of 16, x and y aligned to 16
/// bytes; scale has room for two floats.
cudaError_t launch_to_fp8(DType dtype, const void* x, std::int64_t count, void* y, float* scale, cudaStream_t stream);

}  // namespace comfytp::backend::cuda
