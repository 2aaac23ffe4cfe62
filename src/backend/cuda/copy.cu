#include "backend/cuda/copy.h"

#include <algorithm>

#include "backend/cuda/elements.cuh"

namespace comfytp::backend::cuda {
namespace {

// Integers keep all their bits: what is not a float goes through 64 bits, not through a float.
template <typename To, typename From>
__device__ __forceinline__ To converted(From v) {
  constexpr bool from_whole = std::is_integral_v<From>, to_whole = std::is_integral_v<To>;
  if constexpr (std::is_same_v<From, To>)
    return v;
  else if constexpr (std::is_same_v<To, bool>) {
    if constexpr (from_whole) return v != From(0);
    else return to_float(v) != 0;
  } else if constexpr (from_whole && to_whole)
    return static_cast<To>(v);
  else if constexpr (std::is_same_v<From, double> || std::is_same_v<To, double>) {
    if constexpr (std::is_same_v<To, double>) {
      if constexpr (from_whole) return static_cast<double>(v);
      else return static_cast<double>(to_float(v));
    } else if constexpr (to_whole)
      return static_cast<To>(v);
    else if constexpr (std::is_same_v<To, __half>)
      return __double2half(v);
    else if constexpr (std::is_same_v<To, __nv_bfloat16>)
      return __double2bfloat16(v);
    else
      return static_cast<To>(static_cast<float>(v));
  } else if constexpr (to_whole)
    return static_cast<To>(to_float(v));
  else
    return from_float<To>(to_float(v));
}

__device__ __forceinline__ void offsets(const StridedCopy& c, std::int64_t i, std::int64_t& from, std::int64_t& to) {
  from = to = 0;
  for (int d = c.rank - 1; d > 0; --d) {
    const std::int64_t q = i / c.size[d], r = i - q * c.size[d];
    from += r * c.from[d];
    to += r * c.to[d];
    i = q;
  }
  if (c.rank > 0) {
    from += i * c.from[0];
    to += i * c.to[0];
  }
}

template <typename From, typename To>
__global__ void copy_elements(StridedCopy c, const From* from, To* to, std::int64_t count) {
  for (std::int64_t i = blockIdx.x * std::int64_t{blockDim.x} + threadIdx.x; i < count; i += std::int64_t{gridDim.x} * blockDim.x) {
    std::int64_t a, b;
    offsets(c, i, a, b);
    to[b] = converted<To>(from[a]);
  }
}

// Tiles of a matrix whose rows are dense in the source's columns: [d0.., rows, columns] where `columns` is dense in the target and
// `rows` is dense in the source.
template <typename T>
__global__ void transpose_tiles(StridedCopy c, int rows, const T* from, T* to) {
  constexpr int kTile = 32;
  __shared__ T tile[kTile][kTile + 1];
  const int columns = c.rank - 1;
  std::int64_t outer = blockIdx.z, a = 0, b = 0;
  for (int d = c.rank - 2; d >= 0; --d) {
    if (d == rows) continue;
    const std::int64_t q = outer / c.size[d], r = outer - q * c.size[d];
    a += r * c.from[d];
    b += r * c.to[d];
    outer = q;
  }
  const std::int64_t row0 = std::int64_t{blockIdx.y} * kTile, col0 = std::int64_t{blockIdx.x} * kTile;
  for (int j = threadIdx.y; j < kTile; j += blockDim.y) {
    const std::int64_t row = row0 + threadIdx.x, col = col0 + j;
    if (row < c.size[rows] && col < c.size[columns]) tile[j][threadIdx.x] = from[a + row * c.from[rows] + col * c.from[columns]];
  }
  __syncthreads();
  for (int j = threadIdx.y; j < kTile; j += blockDim.y) {
    const std::int64_t row = row0 + j, col = col0 + threadIdx.x;
    if (row < c.size[rows] && col < c.size[columns]) to[b + row * c.to[rows] + col * c.to[columns]] = tile[threadIdx.x][j];
  }
}

// As many bytes at a time as all strides and both addresses allow; the innermost dimension is dense on both sides.
int widest(const StridedCopy& c, const void* from, const void* to, int size) {
  for (int bytes = 16; bytes > size; bytes /= 2) {
    const int many = bytes / size;
    bool fits = reinterpret_cast<std::uintptr_t>(from) % bytes == 0 && reinterpret_cast<std::uintptr_t>(to) % bytes == 0 &&
                c.size[c.rank - 1] % many == 0;
    for (int d = 0; fits && d < c.rank - 1; ++d) fits = c.from[d] % many == 0 && c.to[d] % many == 0;
    if (fits) return bytes;
  }
  return size;
}

template <typename T>
void copy_words(StridedCopy c, int elements, const void* from, void* to, cudaStream_t stream) {
  c.size[c.rank - 1] /= elements;
  for (int d = 0; d < c.rank - 1; ++d) c.from[d] /= elements, c.to[d] /= elements;
  const std::int64_t count = count_of(c);
  const int blocks = blocks_for(count, 256, 16);
  copy_elements<T, T><<<blocks, 256, 0, stream>>>(c, static_cast<const T*>(from), static_cast<T*>(to), count);
}

}  // namespace

cudaError_t launch_copy(const StridedCopy& given, const void* from, void* to, cudaStream_t stream) {
  StridedCopy c = given;
  const std::int64_t count = count_of(c);
  if (count == 0) return cudaSuccess;
  if (c.rank == 0) c.rank = 1, c.size[0] = 1, c.from[0] = c.to[0] = 1;
  const int last = c.rank - 1, size = size_of(c.source);
  if (c.source == c.target && c.from[last] == 1 && c.to[last] == 1) {
    if (c.rank == 1) return cudaMemcpyAsync(to, from, static_cast<std::size_t>(count) * size, cudaMemcpyDefault, stream);
    const int bytes = widest(c, from, to, size);
    switch (bytes) {
      case 16: copy_words<uint4>(c, 16 / size, from, to, stream); break;
      case 8: copy_words<std::uint64_t>(c, 8 / size, from, to, stream); break;
      case 4: copy_words<std::uint32_t>(c, 4 / size, from, to, stream); break;
      case 2: copy_words<std::uint16_t>(c, 2 / size, from, to, stream); break;
      default: copy_words<std::uint8_t>(c, 1, from, to, stream); break;
    }
    return cudaGetLastError();
  }
  int rows = -1;
  for (int d = 0; d < last; ++d)
    if (c.from[d] == 1 && c.size[d] >= 8) rows = d;
  if (c.source == c.target && rows >= 0 && c.to[last] == 1 && c.size[last] >= 8 && size <= 4) {
    const std::int64_t outer = count / (c.size[rows] * c.size[last]);
    const dim3 grid(static_cast<unsigned>((c.size[last] + 31) / 32), static_cast<unsigned>((c.size[rows] + 31) / 32), static_cast<unsigned>(outer));
    if (grid.y <= 65535 && outer <= 65535) {
      const dim3 block(32, 8);
      if (size == 4) transpose_tiles<<<grid, block, 0, stream>>>(c, rows, static_cast<const std::uint32_t*>(from), static_cast<std::uint32_t*>(to));
      if (size == 2) transpose_tiles<<<grid, block, 0, stream>>>(c, rows, static_cast<const std::uint16_t*>(from), static_cast<std::uint16_t*>(to));
      if (size == 1) transpose_tiles<<<grid, block, 0, stream>>>(c, rows, static_cast<const std::uint8_t*>(from), static_cast<std::uint8_t*>(to));
      return cudaGetLastError();
    }
  }
  const int blocks = blocks_for(count, 256, 16);
  with_any(c.source, [&](auto source) {
    using From = typename decltype(source)::type;
    with_any(c.target, [&](auto target) {
      using To = typename decltype(target)::type;
      copy_elements<<<blocks, 256, 0, stream>>>(c, static_cast<const From*>(from), static_cast<To*>(to), count);
    });
  });
  return cudaGetLastError();
}

}  // namespace comfytp::backend::cuda
