#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "backend/cuda/chain.h"
#include "base/dtype.h"

namespace comfytp::backend::cuda::hopper {

/// y [rows, outputs] = (x v^T + value_bias) activation(x g^T + gate_bias) for x [rows, inner], v and g [outputs, inner], all row-major. Sums are
/// fp32; like their product they are rounded once.
struct GatedLinear {
  DType dtype = DType::f16;  ///< or bf16
  std::int64_t rows = 0, inner = 0, outputs = 0;
  StepKind activation = StepKind::gelu;  ///< gelu, gelu_tanh, silu or sigmoid
};
struct GatedLinearOperands {
  const void *x = nullptr, *value = nullptr, *gate = nullptr;
  const void *value_bias = nullptr, *gate_bias = nullptr;  ///< null where there is none
  void* y = nullptr;
};

/// Whether the device has the instructions and the sizes are multiples of 8.
bool takes(const GatedLinear& linear, const cudaDeviceProp& device);
/// Addresses are multiples of 16. Returns cudaErrorInvalidValue where they are not, or where takes() is false.
cudaError_t launch_gated_linear(const GatedLinear& linear, const GatedLinearOperands& operands, cudaStream_t stream);

}  // namespace comfytp::backend::cuda::hopper
