// Elementwise ops of two or three operands that broadcast.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "backend/cuda/copy.h"
#include "base/dtype.h"

namespace comfytp::backend::cuda {

/// The result, dense, outermost dimension first, and how its operands lie along its dimensions; 0 where one is broadcast.
struct Broadcast {
  int rank = 1;
  std::int64_t count = 0;
  std::int64_t size[kMaxRank] = {};
  std::int64_t stride[3][kMaxRank] = {};
};

enum class BinaryKind : std::uint8_t {
  add, sub, mul, div, pow, maximum, minimum, equal, not_equal, less, less_equal, greater, greater_equal
};

/// y = a kind b, in the operands' dtype or, from `equal` on, bool. y may be an operand of full shape.
cudaError_t launch_binary(BinaryKind kind, DType dtype, const Broadcast& broadcast, const void* a, const void* b, void* y, cudaStream_t stream);
/// y = condition ? a : b, of elements of so many bytes. Operands in this order.
cudaError_t launch_where(int element, const Broadcast& broadcast, const void* condition, const void* a, const void* b, void* y, cudaStream_t stream);

}  // namespace comfytp::backend::cuda
