#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "base/dtype.h"

namespace comfytp::backend::cuda {

enum class UnaryKind : std::uint8_t {
  silu, gelu, gelu_tanh, sigmoid, tanh, exp, log, sin, cos, sqrt, rsqrt, relu, abs, neg, logical_not
};

/// y = kind(x) of `count` elements; y may be x. Integers and bool: relu, abs, neg and logical_not alone.
cudaError_t launch_unary(UnaryKind kind, DType dtype, std::int64_t count, const void* x, void* y, cudaStream_t stream);

}  // namespace comfytp::backend::cuda
