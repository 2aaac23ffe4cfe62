#include "backend/cuda/kernels/pointwise.h"

#include "backend/cuda/chain.cuh"

namespace comfytp::backend::cuda {
namespace {

constexpr int kThreads = 256, kPacks = 4;

template <typename T, int N>
__global__ void __launch_bounds__(kThreads) pointwise(const __grid_constant__ Chain chain, const __grid_constant__ ChainOperands operands, const void* x,
                                                      bool x_wide, void* y, bool y_wide, unsigned packs) {
  const unsigned first = blockIdx.x * (kThreads * kPacks) + threadIdx.x;
  float v[kPacks][N];
  unsigned at[kPacks][kChainDims];
  bool there[kPacks];
#pragma unroll
  for (int m = 0; m < kPacks; ++m) {
    const unsigned i = first + m * kThreads;
    there[m] = i < packs;
    if (there[m]) load_floats<T, N>(x, std::int64_t{i} * N, x_wide, v[m]);
    chain_index(chain, i * N, at[m]);
  }
  apply_chain<T, N, kPacks>(chain, operands, at, there, v);
#pragma unroll
  for (int m = 0; m < kPacks; ++m)
    if (there[m]) store_floats<T, N>(y, std::int64_t{first + m * kThreads} * N, y_wide, v[m]);
}

template <typename T, int N>
void launch(const Chain& chain, const ChainOperands& operands, const void* x, bool x_wide, void* y, bool y_wide, std::int64_t count, cudaStream_t stream) {
  const auto packs = static_cast<unsigned>(count / N);
  pointwise<T, N><<<(packs + kThreads * kPacks - 1) / (kThreads * kPacks), kThreads, 0, stream>>>(chain, operands, x, x_wide, y, y_wide, packs);
}

}  // namespace

cudaError_t launch_pointwise(const Chain& chain, const ChainOperands& operands, DType x_dtype, DType y_dtype, DType dtype, const void* x, void* y,
                             cudaStream_t stream) {
  std::int64_t count = 1;
  for (int d = 0; d < chain.dims; ++d) count *= chain.size[d];
  if (count == 0) return cudaSuccess;
  if (count >= std::int64_t{1} << 32) return cudaErrorInvalidValue;
  const bool x_wide = x_dtype == DType::f32, y_wide = y_dtype == DType::f32;
  const bool all_aligned = operands.aligned() && aligned(x) && aligned(y);
  const bool known = with_real(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (all_aligned && chain.packs_of(Pack<T>::size))
      launch<T, Pack<T>::size>(chain, operands, x, x_wide, y, y_wide, count, stream);
    else if (chain.pairs())
      launch<T, 2>(chain, operands, x, x_wide, y, y_wide, count, stream);
    else
      launch<T, 1>(chain, operands, x, x_wide, y, y_wide, count, stream);
  });
  return known ? cudaGetLastError() : cudaErrorInvalidValue;
}

}  // namespace comfytp::backend::cuda
