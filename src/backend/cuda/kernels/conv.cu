#include "backend/cuda/kernels/conv.h"

#include <algorithm>

#include "backend/cuda/elements.cuh"

namespace comfytp::backend::cuda {
namespace {

template <typename T>
__global__ void direct_convolution(const __grid_constant__ DirectConvolution c, const T* x, const T* filter, T* y, std::int64_t count) {
  for (std::int64_t i = blockIdx.x * std::int64_t{blockDim.x} + threadIdx.x; i < count; i += std::int64_t{gridDim.x} * blockDim.x) {
    std::int64_t rest = i, at[3], to = 0;
    const std::int64_t o = rest % c.outputs;
    rest /= c.outputs;
    for (int d = 2; d >= 0; --d) {
      at[d] = rest % c.y[d];
      rest /= c.y[d];
      to += at[d] * c.y_strides[2 + d];
    }
    const T* sample = x + rest * c.x_strides[0] + o / (c.outputs / c.groups) * c.inputs * c.x_strides[1];
    const T* weights = filter + o * c.filter_strides[0];
    float sum = 0;
    for (std::int64_t a = 0; a < c.window[0]; ++a) {
      const std::int64_t p = at[0] * c.stride[0] + a - c.before[0];
      if (p < 0 || p >= c.x[0]) continue;
      for (std::int64_t b = 0; b < c.window[1]; ++b) {
        const std::int64_t q = at[1] * c.stride[1] + b - c.before[1];
        if (q < 0 || q >= c.x[1]) continue;
        for (std::int64_t e = 0; e < c.window[2]; ++e) {
          const std::int64_t r = at[2] * c.stride[2] + e - c.before[2];
          if (r < 0 || r >= c.x[2]) continue;
          const T* from = sample + p * c.x_strides[2] + q * c.x_strides[3] + r * c.x_strides[4];
          const T* w = weights + a * c.filter_strides[2] + b * c.filter_strides[3] + e * c.filter_strides[4];
          for (std::int64_t k = 0; k < c.inputs; ++k) sum += to_float(from[k * c.x_strides[1]]) * to_float(w[k * c.filter_strides[1]]);
        }
      }
    }
    y[rest * c.y_strides[0] + o * c.y_strides[1] + to] = from_float<T>(sum);
  }
}

}  // namespace

cudaError_t launch_direct_convolution(const DirectConvolution& c, DType dtype, const void* x, const void* filter, void* y, cudaStream_t stream) {
  const std::int64_t count = c.n * c.outputs * c.y[0] * c.y[1] * c.y[2];
  if (count == 0) return cudaSuccess;
  const int blocks = blocks_for(count, 128, 16);
  const bool known = with_real(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    direct_convolution<T><<<blocks, 128, 0, stream>>>(c, static_cast<const T*>(x), static_cast<const T*>(filter), static_cast<T*>(y), count);
  });
  return known ? cudaGetLastError() : cudaErrorInvalidValue;
}

}  // namespace comfytp::backend::cuda
