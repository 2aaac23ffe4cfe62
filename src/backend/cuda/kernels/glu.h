#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "backend/cuda/chain.h"
#include "base/dtype.h"

namespace comfytp::backend::cuda {

/// y[r, c] = (value[r, c] + value_bias[c]) * activation(gate[r, c] + gate_bias[c]), row-major; null biases are none. y may be value
/// or gate.
cudaError_t launch_glu(StepKind activation, DType dtype, std::int64_t rows, std::int64_t columns, const void* value, const void* gate,
                       const void* value_bias, const void* gate_bias, void* y, cudaStream_t stream);

}  // namespace comfytp::backend::cuda
