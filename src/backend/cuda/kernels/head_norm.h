// What an attention's queries and keys go through: rms_norm of every head, turned by its token's angles. A case of row_norm.h that its general
// kernels do at half of the memory's rate, since each head reads the angles anew.
#pragma once

#include <optional>

#include "backend/cuda/kernels/row_norm.h"

namespace comfytp::backend::cuda {

/// z = rope((x + before) / rms(x + before) * weight) over x of [batch, tokens, heads, columns]; `before` of [heads, columns] and `weight` may be missing.
struct HeadNorm {
  std::int64_t batch = 1, tokens = 0;
  int heads = 0, columns = 0;
  float epsilon = 0;
  bool halved = false;                             ///< neighbours have one angle
  std::int64_t batch_stride = 0, token_stride = 0;  ///< of the cosines and sines, in elements, which are f32
};

/// The norm as one of heads; nothing where it is none, or not of 64, 128 or 256 columns in f16 or bf16.
std::optional<HeadNorm> as_head_norm(const RowNorm& norm, DType dtype);

/// All operands begin at multiples of 16 bytes; z may lie where x does.
cudaError_t launch_head_norm(const HeadNorm& norm, const RowNormOperands& operands, DType dtype, cudaStream_t stream);

}  // namespace comfytp::backend::cuda
