#include "backend/cuda/kernels/upsample.h"

#include <algorithm>

#include "backend/cuda/kernels/words.h"

namespace comfytp::backend::cuda {
namespace {

constexpr int kThreads = 256, kEach = 2;

__device__ __forceinline__ std::int64_t source(const Upsample& u, int d, std::int64_t i) {
  const std::int64_t product = (i + u.to_offset[d]) * u.from[d];
  const std::int64_t q = (product | u.to[d]) >> 32 ? product / u.to[d] : static_cast<unsigned>(product) / static_cast<unsigned>(u.to[d]);
  return q - u.from_offset[d];
}

// Blocks along x share an output row, those along y take rows in turn. A pixel is `u.pixel` words.
template <typename W>
__global__ void __launch_bounds__(kThreads) upsample(const __grid_constant__ Upsample u, const W* x, W* y) {
  const std::int64_t words = u.out[1] * u.pixel, first = std::int64_t{blockIdx.x} * (kThreads * kEach) + threadIdx.x;
  for (std::int64_t row = blockIdx.y; row < u.samples * u.out[0]; row += gridDim.y) {
    const std::int64_t sample = row / u.out[0];
    const W* from = x + (sample * u.in[0] + source(u, 0, row - sample * u.out[0])) * u.in[1] * u.pixel;
    W v[kEach];
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      const std::int64_t i = first + k * kThreads;
      if (i >= words) continue;
      const std::int64_t column = words >> 31 ? i / u.pixel : static_cast<unsigned>(i) / static_cast<unsigned>(u.pixel);
      v[k] = from[source(u, 1, column) * u.pixel + (i - column * u.pixel)];
    }
#pragma unroll
    for (int k = 0; k < kEach; ++k)
      if (first + k * kThreads < words) y[row * words + first + k * kThreads] = v[k];
  }
}

}  // namespace

cudaError_t launch_upsample(const Upsample& given, const void* x, void* y, cudaStream_t stream) {
  Upsample u = given;
  const std::int64_t rows = u.samples * u.out[0];
  if (rows == 0 || u.out[1] == 0 || u.pixel == 0) return cudaSuccess;
  const int word = widest_word(address(x) | address(y) | static_cast<std::uint64_t>(u.pixel));
  u.pixel /= word;
  const dim3 grid(static_cast<unsigned>((u.out[1] * u.pixel + kThreads * kEach - 1) / (kThreads * kEach)), static_cast<unsigned>(std::min<std::int64_t>(rows, 65535)));
  with_word(word, [&](auto tag) {
    using W = typename decltype(tag)::type;
    upsample<W><<<grid, kThreads, 0, stream>>>(u, static_cast<const W*>(x), static_cast<W*>(y));
  });
  return cudaGetLastError();
}

}  // namespace comfytp::backend::cuda
