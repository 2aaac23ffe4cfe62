#include "backend/cuda/kernels/gather.h"

#include <algorithm>
#include <cstring>

#include "backend/cuda/elements.cuh"
#include "backend/cuda/kernels/words.h"

namespace comfytp::backend::cuda {
namespace {

template <typename From, typename To>
__global__ void gather(const __grid_constant__ Gather g, const From* x, const void* index, To* y, const __grid_constant__ uint4 outside) {
  const std::int64_t total = g.outer * g.count * g.inner;
  for (std::int64_t i = blockIdx.x * std::int64_t{blockDim.x} + threadIdx.x; i < total; i += std::int64_t{gridDim.x} * blockDim.x) {
    const std::int64_t place = i / g.inner, o = place / g.count, n = place - o * g.count;
    std::int64_t row = g.wide_index ? static_cast<const std::int64_t*>(index)[n] : static_cast<const std::int32_t*>(index)[n];
    if (row < 0) row += g.size;
    if (row < 0 || row >= g.size) {
      y[i] = *reinterpret_cast<const To*>(&outside);
      continue;
    }
    const From v = x[(o * g.size + row) * g.inner + (i - place * g.inner)];
    if constexpr (std::is_same_v<From, To>) y[i] = v;
    else y[i] = from_float<To>(to_float(v));
  }
}

template <typename From, typename To>
void launch(const Gather& g, const void* x, const void* index, void* y, const uint4& outside, cudaStream_t stream) {
  const int blocks = blocks_for(g.outer * g.count * g.inner, 256, 16);
  gather<From, To><<<blocks, 256, 0, stream>>>(g, static_cast<const From*>(x), index, static_cast<To*>(y), outside);
}

}  // namespace

cudaError_t launch_gather(const Gather& given, const void* x, const void* index, void* y, cudaStream_t stream) {
  Gather g = given;
  if (g.outer * g.count * g.inner == 0) return cudaSuccess;
  const int element = size_of(g.to);
  uint4 outside;
  for (int k = 0; k < 16 / element; ++k) std::memcpy(reinterpret_cast<char*>(&outside) + k * element, g.outside, static_cast<std::size_t>(element));
  if (g.from == g.to) {
    const int word = widest_word(address(x) | address(y) | static_cast<std::uint64_t>(g.inner * element));
    g.inner = g.inner * element / word;
    with_word(word, [&](auto tag) {
      using W = typename decltype(tag)::type;
      launch<W, W>(g, x, index, y, outside, stream);
    });
    return cudaGetLastError();
  }
  cudaError_t status = cudaErrorInvalidValue;
  with_real(g.to, [&](auto target) {
    with_any(g.from, [&](auto source) {
      using To = typename decltype(target)::type;
      using From = typename decltype(source)::type;
      if constexpr (!std::is_integral_v<From> && !std::is_same_v<From, To>) {
        launch<From, To>(g, x, index, y, outside, stream);
        status = cudaGetLastError();
      }
    });
  });
  return status;
}

}  // namespace comfytp::backend::cuda
