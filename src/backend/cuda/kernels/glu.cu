#include "backend/cuda/kernels/glu.h"

#include <algorithm>

#include "backend/cuda/chain.cuh"

namespace comfytp::backend::cuda {
namespace {

template <typename T, int N>
__global__ void glu(StepKind activation, std::int64_t columns, const T* value, const T* gate, const T* value_bias, const T* gate_bias, T* y,
                    std::int64_t packs) {
  const std::int64_t step = std::int64_t{gridDim.x} * blockDim.x;
  const unsigned row = static_cast<unsigned>(columns / N);
  for (std::int64_t i = blockIdx.x * std::int64_t{blockDim.x} + threadIdx.x; i < packs; i += step) {
    float v[N], g[N], b[N];
    load_floats<T, N>(value + i * N, v);
    load_floats<T, N>(gate + i * N, g);
    const std::int64_t column = (i < (std::int64_t{1} << 31) ? static_cast<unsigned>(i) % row : i % row) * N;
    if (gate_bias) {
      load_floats<T, N>(gate_bias + column, b);
#pragma unroll
      for (int k = 0; k < N; ++k) g[k] += b[k];
    }
    if (value_bias) {
      load_floats<T, N>(value_bias + column, b);
#pragma unroll
      for (int k = 0; k < N; ++k) v[k] += b[k];
    }
    apply_activation<N>(activation, g);
#pragma unroll
    for (int k = 0; k < N; ++k) v[k] *= g[k];
    store_floats<T, N>(y + i * N, v);
  }
}

}  // namespace

cudaError_t launch_glu(StepKind activation, DType dtype, std::int64_t rows, std::int64_t columns, const void* value, const void* gate,
                       const void* value_bias, const void* gate_bias, void* y, cudaStream_t stream) {
  const std::int64_t count = rows * columns;
  if (count == 0) return cudaSuccess;
  const bool all_aligned = aligned(value) && aligned(gate) && aligned(value_bias) && aligned(gate_bias) && aligned(y);
  const bool known = with_real(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto run = [&](auto size) {
      constexpr int N = decltype(size)::value;
      const int blocks = blocks_for(count / N, 256, 32);
      glu<T, N><<<blocks, 256, 0, stream>>>(activation, columns, static_cast<const T*>(value), static_cast<const T*>(gate),
                                            static_cast<const T*>(value_bias), static_cast<const T*>(gate_bias), static_cast<T*>(y), count / N);
    };
    if (all_aligned && columns % Pack<T>::size == 0)
      run(std::integral_constant<int, Pack<T>::size>());
    else
      run(std::integral_constant<int, 1>());
  });
  return known ? cudaGetLastError() : cudaErrorInvalidValue;
}

}  // namespace comfytp::backend::cuda
