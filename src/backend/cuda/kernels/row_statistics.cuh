// Mean and deviation of a row that lies in registers. For .cu files alone.
#pragma once

#include "backend/cuda/kernels/reduction.cuh"

namespace comfytp::backend::cuda {

struct RowStatistics {
  float mean, scale;  ///< scale: 1 / deviation
};

/// Of a row in packs of N: PACKS of each of LANES neighbouring threads of a warp or, where LANES is 0, of the whole block, of which all threads call
/// this, once a kernel. Pack k of thread t is the row's number t + k * threads, and is `there` as long as that is less than `packs`. Where `centred`, the row's first
/// value of the warp is taken from v, so that a large mean costs no digits, and `mean` is that of what is left; else it is 0.
template <int N, int PACKS, int LANES>
__device__ __forceinline__ RowStatistics row_statistics(float (&v)[PACKS][N], const bool (&there)[PACKS], int packs, bool centred, float epsilon) {
  constexpr int kLanes = LANES ? LANES : 32;
  const int threads = LANES ? LANES : static_cast<int>(blockDim.x);
  // What a warp, or a part of one, knows of its elements: the first, and the mean and squared deviations of the differences from it.
  struct Part {
    float first, mean, squares;
  };
  // Elements of warp `w` of the row's, or of all that there is.
  const auto count = [&](int w) {
    int found = 0;
#pragma unroll
    for (int k = 0; k < PACKS; ++k) found += min(max(packs - w * 32 - k * threads, 0), kLanes);
    return static_cast<float>(found * N);
  };
  Part part = {0, 0, 0};
  if (centred) {
    part.first = __shfl_sync(~0u, v[0][0], threadIdx.x % 32 / kLanes * kLanes);
    float sum = 0;
#pragma unroll
    for (int k = 0; k < PACKS; ++k)
#pragma unroll
      for (int i = 0; i < N; ++i) {
        v[k][i] -= part.first;
        if (there[k]) sum += v[k][i];
      }
    const float own = count(LANES ? 0 : threadIdx.x / 32);
    part.mean = own > 0 ? __fdividef(join_threads<kLanes>(sum, static_cast<float*>(nullptr), Sum()), own) : 0.f;
  }
#pragma unroll
  for (int k = 0; k < PACKS; ++k)
    if (there[k])
#pragma unroll
      for (int i = 0; i < N; ++i) part.squares += (v[k][i] - part.mean) * (v[k][i] - part.mean);
  part.squares = join_threads<kLanes>(part.squares, static_cast<float*>(nullptr), Sum());
  float mean = part.mean, squares = part.squares;
  if constexpr (LANES == 0) {
    __shared__ Part parts[32];
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = part;
    __syncthreads();
    const int lane = threadIdx.x % 32;
    const bool warp = lane < threads / 32;
    const Part theirs = warp ? parts[lane] : Part{part.first, 0, 0};
    squares = theirs.squares;
    if (centred) {
      const float theirs_count = warp ? count(lane) : 0.f;
      // Means as differences from what this warp's values are differences from.
      const float m = theirs_count > 0 ? theirs.first - part.first + theirs.mean : 0.f;
      mean = join_threads<32>(m * theirs_count, static_cast<float*>(nullptr), Sum()) / static_cast<float>(packs * N);
      squares += (m - mean) * (m - mean) * theirs_count;
    }
    squares = join_threads<32>(squares, static_cast<float*>(nullptr), Sum());
  }
  return {mean, rsqrtf(squares / static_cast<float>(packs * N) + epsilon)};
}

}  // namespace comfytp::backend::cuda
