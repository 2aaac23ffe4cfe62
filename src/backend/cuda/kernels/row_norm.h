#pragma once

#include <cuda_runtime.h>

#include "backend/cuda/chain.h"
#include "base/dtype.h"

namespace comfytp::backend::cuda {

/// y = pre(x), z = post(norm(y)) over the rows of a row-major [rows, columns].
struct RowNorm {
  std::int64_t rows = 0, columns = 0;
  bool centred = true;       ///< layer_norm; otherwise rms_norm
  float epsilon = 0;
  Chain pre, post;           ///< over the same dimensions, the innermost being the columns
  bool x_wide = false, weight_wide = false, bias_wide = false, y_wide = false, z_wide = false;  ///< f32, whatever the dtype of the others
  int parts = 0;             ///< of the rows' moments, where they are given: [parts, rows, 3], count, mean and squared deviations
};

struct RowNormOperands {
  const void* x = nullptr;
  const void *weight = nullptr, *bias = nullptr;  ///< null where there is none
  const float* moments = nullptr;
  ChainOperands pre, post;
  void *y = nullptr, *z = nullptr;                ///< y null where nobody wants it; z may lie where x, or an operand of pre or post does, y where x or one of pre does
};

cudaError_t launch_row_norm(const RowNorm& norm, const RowNormOperands& operands, DType dtype, cudaStream_t stream);

}  // namespace comfytp::backend::cuda
