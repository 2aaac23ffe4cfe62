#include "backend/cuda/kernels/pointwise.h"

#include <algorithm>

#include "backend/cuda/chain.cuh"

namespace comfytp::backend::cuda {
namespace {

template <typename T, int N>
__global__ void pointwise(Chain chain, ChainOperands operands, const T* x, T* y, std::int64_t packs) {
  const std::int64_t step = std::int64_t{gridDim.x} * blockDim.x;
  for (std::int64_t i = blockIdx.x * std::int64_t{blockDim.x} + threadIdx.x; i < packs; i += step) {
    float v[N];
    load_floats<T, N>(x + i * N, v);
    std::int64_t at[kChainDims] = {};
    chain_index(chain, i * N, at);
    apply_chain<T, N>(chain, operands, at, v);
    store_floats<T, N>(y + i * N, v);
  }
}

template <typename T, int N>
void launch(const Chain& chain, const ChainOperands& operands, const void* x, void* y, std::int64_t count, cudaStream_t stream) {
  const std::int64_t packs = count / N;
  const int blocks = static_cast<int>(std::min<std::int64_t>((packs + 255) / 256, 132 * 32));
  pointwise<T, N><<<blocks, 256, 0, stream>>>(chain, operands, static_cast<const T*>(x), static_cast<T*>(y), packs);
}

}  // namespace

cudaError_t launch_pointwise(const Chain& chain, const ChainOperands& operands, DType dtype, const void* x, void* y, cudaStream_t stream) {
  std::int64_t count = 1;
  for (int d = 0; d < chain.dims; ++d) count *= chain.size[d];
  if (count == 0) return cudaSuccess;
  const bool aligned = operands.aligned() && reinterpret_cast<std::uintptr_t>(x) % 16 == 0 && reinterpret_cast<std::uintptr_t>(y) % 16 == 0;
  const bool known = with_real(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (aligned && chain.packs_of(Pack<T>::size))
      launch<T, Pack<T>::size>(chain, operands, x, y, count, stream);
    else
      launch<T, 1>(chain, operands, x, y, count, stream);
  });
  return known ? cudaGetLastError() : cudaErrorInvalidValue;
}

}  // namespace comfytp::backend::cuda
