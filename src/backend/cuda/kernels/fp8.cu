#include "backend/cuda/chain.cuh"
#include "backend/cuda/kernels/fp8.h"
#include "backend/cuda/kernels/reduction.cuh"

namespace comfytp::backend::cuda {
namespace {

constexpr int kThreads = 256, kEach = 16;
constexpr float kLargest = 448;

// What is not negative is ordered as its bits are, with NaN behind infinity.
template <typename T>
__global__ void __launch_bounds__(kThreads) largest(const T* x, std::int64_t packs, unsigned* found) {
  constexpr int N = Pack<T>::size;
  __shared__ float shared[kThreads / 32];
  float most = 0;
  for (std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; i < packs; i += std::int64_t{gridDim.x} * kThreads) {
    float v[N];
    load_floats<T, N>(x + i * N, v);
#pragma unroll
    for (int k = 0; k < N; ++k) most = Larger()(fabsf(v[k]), most);
  }
  most = join_threads<kThreads>(most, shared, Larger());
  if (threadIdx.x == 0) atomicMax(found, __float_as_uint(most));
}

template <typename T>
__global__ void __launch_bounds__(kThreads) to_fp8(const T* x, std::int64_t packs, const unsigned* found, uint4* y, float* scale) {
  // Of values as small as 1e-33 the factor would leave fp32.
  const float most = __uint_as_float(*found), factor = most > 0 ? fminf(kLargest / most, 1e35f) : most == 0 ? 1.f : most;
  const std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i == 0) *scale = 1.f / factor;
  if (i >= packs) return;
  float v[kEach];
  load_floats<T, kEach>(x + i * kEach, v);
  union {
    __nv_fp8x2_storage_t pairs[kEach / 2];
    uint4 all;
  };
#pragma unroll
  for (int k = 0; k < kEach / 2; ++k) pairs[k] = __nv_cvt_float2_to_fp8x2({v[2 * k] * factor, v[2 * k + 1] * factor}, __NV_SATFINITE, __NV_E4M3);
  y[i] = all;
}

}  // namespace

cudaError_t launch_to_fp8(DType dtype, const void* x, std::int64_t count, void* y, float* scale, cudaStream_t stream) {
  if (count % kEach || !aligned(x) || !aligned(y)) return cudaErrorInvalidValue;
  // The largest value stands behind the scale.
  auto* found = reinterpret_cast<unsigned*>(scale + 1);
  if (const auto status = cudaMemsetAsync(found, 0, sizeof *found, stream); status != cudaSuccess) return status;
  const bool known = with_real(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const std::int64_t packs = count / Pack<T>::size;
    largest<T><<<blocks_for(packs, kThreads, 8), kThreads, 0, stream>>>(static_cast<const T*>(x), packs, found);
    to_fp8<T><<<static_cast<unsigned>((count / kEach + kThreads - 1) / kThreads), kThreads, 0, stream>>>(static_cast<const T*>(x), count / kEach, found,
                                                                                                    static_cast<uint4*>(y), scale);
  });
  return known ? cudaGetLastError() : cudaErrorInvalidValue;
}

}  // namespace comfytp::backend::cuda
