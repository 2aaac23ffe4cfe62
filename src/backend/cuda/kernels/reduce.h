// sum, amax and softmax over dimensions, and the moments of rows.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "backend/cuda/copy.h"
#include "base/dtype.h"

namespace comfytp::backend::cuda {

/// Dimensions as they lie in the input's memory, outermost first; the result is dense in the kept ones. Strides are the input's.
struct Reduce {
  bool maximum = false;        ///< otherwise a sum
  bool inner_gone = false;     ///< the innermost dimension is reduced
  int kept = 0, gone = 0;
  std::int64_t kept_size[kMaxRank] = {}, kept_stride[kMaxRank] = {};
  std::int64_t gone_size[kMaxRank] = {}, gone_stride[kMaxRank] = {};
  std::int64_t results = 1, terms = 1;
};
cudaError_t launch_reduce(const Reduce& reduce, DType dtype, const void* x, void* y, cudaStream_t stream);

/// Over the middle dimension of a dense [outer, size, inner]. y may be x.
cudaError_t launch_softmax(DType dtype, std::int64_t outer, std::int64_t size, std::int64_t inner, const void* x, void* y, cudaStream_t stream);

/// [rows, 3]: count, mean and squared deviations of the rows of a dense [rows, columns].
cudaError_t launch_row_moments(DType dtype, std::int64_t rows, std::int64_t columns, const void* x, float* moments, cudaStream_t stream);

}  // namespace comfytp::backend::cuda
