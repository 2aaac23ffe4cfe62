// Copies between strided tensors in device memory, with conversion of the dtype. Known to host and device code.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "base/dtype.h"

namespace comfytp::backend::cuda {

constexpr int kMaxRank = 8;

/// Dimensions, outermost first, with strides in elements.
struct StridedCopy {
  int rank = 0;
  std::int64_t size[kMaxRank] = {};
  std::int64_t from[kMaxRank] = {}, to[kMaxRank] = {};
  DType source = DType::f32, target = DType::f32;
};

inline std::int64_t count_of(const StridedCopy& copy) {
  std::int64_t count = 1;
  for (int d = 0; d < copy.rank; ++d) count *= copy.size[d];
  return count;
}

/// Queues the copy. Rounds to nearest even. fp8 is only ever read, but from fp8 of the same kind.
cudaError_t launch_copy(const StridedCopy& copy, const void* from, void* to, cudaStream_t stream);

}  // namespace comfytp::backend::cuda
