// Sums and maxima over the threads of a block, in an order that never changes. For .cu files alone.
#pragma once

#include "backend/cuda/elements.cuh"

namespace comfytp::backend::cuda {

/// Of THREADS neighbouring threads (a part of a warp that begins at a multiple of it, a warp, or the whole block, which then calls this together); every one
/// of them gets the result.
template <int THREADS, typename V, typename Join>
__device__ __forceinline__ V join_threads(V v, V* shared, const Join& join) {
#pragma unroll
  for (int k = THREADS < 32 ? THREADS / 2 : 16; k > 0; k /= 2) v = join(v, __shfl_xor_sync(~0u, v, k));
  if constexpr (THREADS > 32) {
    __syncthreads();  // the last result has been read
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = v;
    __syncthreads();
    v = shared[0];
#pragma unroll
    for (int w = 1; w < THREADS / 32; ++w) v = join(v, shared[w]);
  }
  return v;
}

/// NaN wins.
struct Larger {
  template <typename V>
  __device__ __forceinline__ V operator()(V a, V b) const { return a > b || a != a ? a : b; }
};
struct Sum {
  template <typename V>
  __device__ __forceinline__ V operator()(V a, V b) const { return a + b; }
};

}  // namespace comfytp::backend::cuda
