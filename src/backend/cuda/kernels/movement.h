#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "base/dtype.h"

namespace comfytp::backend::cuda {

constexpr int kMaxParts = 8;

/// `rows` rows that are put together from one piece of each part. All in bytes.
struct RowCopies {
  int parts = 0;
  std::int64_t rows = 0;
  std::int64_t start[kMaxParts + 1] = {};  ///< of the pieces in a row; behind the last piece what is written of it
  std::int64_t from_pitch[kMaxParts] = {}, to_pitch = 0;
};
struct RowSources {
  const void* at[kMaxParts] = {};
};
cudaError_t launch_row_copies(const RowCopies& copies, const RowSources& from, void* to, cudaStream_t stream);

/// Converts `count` elements that lie one behind the other; both addresses are multiples of 16.
bool has_dense_cast(DType from, DType to);
cudaError_t launch_dense_cast(DType from, DType to, std::int64_t count, const void* x, void* y, cudaStream_t stream);

}  // namespace comfytp::backend::cuda
