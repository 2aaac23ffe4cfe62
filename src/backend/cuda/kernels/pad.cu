#include "backend/cuda/kernels/pad.h"

#include <algorithm>
#include <cstring>

#include "backend/cuda/elements.cuh"
#include "backend/cuda/kernels/words.h"

namespace comfytp::backend::cuda {
namespace {

template <typename W>
__global__ void pad(const __grid_constant__ Pad p, std::int64_t count, const W* x, W* y, const __grid_constant__ uint4 value) {
  for (std::int64_t i = blockIdx.x * std::int64_t{blockDim.x} + threadIdx.x; i < count; i += std::int64_t{gridDim.x} * blockDim.x) {
    std::int64_t rest = i, at = 0, stride = 1;
    bool inside = true;
    for (int d = p.rank - 1; d >= 0; --d) {
      std::int64_t q;
      if (rest >> 32 || p.out[d] >> 32) q = rest / p.out[d];
      else q = static_cast<unsigned>(rest) / static_cast<unsigned>(p.out[d]);
      std::int64_t row = rest - q * p.out[d] - p.before[d];
      const std::int64_t size = p.in[d];
      if (p.mode == PadMode::replicate) row = row < 0 ? 0 : row >= size ? size - 1 : row;
      if (p.mode == PadMode::circular) row += row < 0 ? size : row >= size ? -size : 0;
      inside = inside && row >= 0 && row < size;
      at += row * stride;
      stride *= size;
      rest = q;
    }
    y[i] = inside ? x[at] : *reinterpret_cast<const W*>(&value);
  }
}

}  // namespace

cudaError_t launch_pad(const Pad& given, const void* x, void* y, cudaStream_t stream) {
  Pad p = given;
  std::int64_t count = 1, read = 1;
  for (int d = 0; d < p.rank; ++d) count *= p.out[d], read *= p.in[d];
  if (count == 0 || (read == 0 && p.mode != PadMode::constant)) return cudaSuccess;
  uint4 value;
  for (int k = 0; k < 16 / p.element; ++k) std::memcpy(reinterpret_cast<char*>(&value) + k * p.element, p.value, static_cast<std::size_t>(p.element));
  const int last = p.rank - 1;
  int word = p.element;
  if (p.rank > 0 && p.in[last] == p.out[last]) {
    word = widest_word(address(x) | address(y) | static_cast<std::uint64_t>(p.in[last] * p.element));
    p.in[last] = p.out[last] = p.in[last] * p.element / word;
    count = count * p.element / word;
  }
  const int blocks = blocks_for(count, 256, 16);
  with_word(word, [&](auto tag) {
    using W = typename decltype(tag)::type;
    pad<W><<<blocks, 256, 0, stream>>>(p, count, static_cast<const W*>(x), static_cast<W*>(y), value);
  });
  return cudaGetLastError();
}

}  // namespace comfytp::backend::cuda
