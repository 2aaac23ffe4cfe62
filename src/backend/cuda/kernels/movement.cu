#include "backend/cuda/kernels/movement.h"

#include "backend/cuda/elements.cuh"
#include "backend/cuda/kernels/words.h"

namespace comfytp::backend::cuda {
namespace {

constexpr int kThreads = 256, kEach = 4;

// All sizes in words W; kEach of them a thread.
template <typename W, typename Index>
__global__ void __launch_bounds__(kThreads) row_copies(const __grid_constant__ RowCopies c, const __grid_constant__ RowSources from, W* to) {
  const Index columns = static_cast<Index>(c.start[c.parts]), count = columns * static_cast<Index>(c.rows);
  const Index first = static_cast<Index>(blockIdx.x) * (kThreads * kEach) + threadIdx.x;
  W v[kEach];
  Index place[kEach];
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    const Index i = first + k * kThreads;
    if (i >= count) continue;
    const Index row = i / columns, column = i - row * columns;
    int part = 0;
    while (column >= static_cast<Index>(c.start[part + 1])) ++part;  // ends at the last piece that is not empty
    v[k] = static_cast<const W*>(from.at[part])[row * static_cast<Index>(c.from_pitch[part]) + (column - static_cast<Index>(c.start[part]))];
    place[k] = row * static_cast<Index>(c.to_pitch) + column;
  }
#pragma unroll
  for (int k = 0; k < kEach; ++k)
    if (first + k * kThreads < count) to[place[k]] = v[k];
}

template <typename T, int N>
__device__ __forceinline__ void load_many(const T* p, T (&v)[N]) {
  static_assert(sizeof v % 8 == 0);
  if constexpr (sizeof v == 8) {
    alignas(8) T few[N];
    *reinterpret_cast<uint2*>(few) = *reinterpret_cast<const uint2*>(p);
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = few[i];
  } else {
    constexpr int M = Pack<T>::size;
#pragma unroll
    for (int k = 0; k < N / M; ++k) {
      const auto pack = load_pack(p + k * M);
#pragma unroll
      for (int i = 0; i < M; ++i) v[k * M + i] = pack.v[i];
    }
  }
}

// 8 elements a thread; those behind the last 8 go to the first block.
template <typename From, typename To>
__global__ void __launch_bounds__(kThreads) dense_cast(const From* x, To* y, std::int64_t count) {
  const std::int64_t i = (std::int64_t{blockIdx.x} * kThreads + threadIdx.x) * 8;
  if (i + 8 <= count) {
    From v[8];
    load_many(x + i, v);
    constexpr int M = Pack<To>::size;
#pragma unroll
    for (int k = 0; k < 8 / M; ++k) {
      Pack<To> pack;
#pragma unroll
      for (int e = 0; e < M; ++e) pack.v[e] = from_float<To>(to_float(v[k * M + e]));
      store_pack(y + i + k * M, pack);
    }
  }
  const std::int64_t last = count / 8 * 8 + threadIdx.x;
  if (blockIdx.x == 0 && last < count) y[last] = from_float<To>(to_float(x[last]));
}

bool is_small_float(DType t) { return t == DType::f32 || t == DType::f16 || t == DType::bf16 || t == DType::f8_e4m3 || t == DType::f8_e5m2; }

}  // namespace

cudaError_t launch_row_copies(const RowCopies& given, const RowSources& from, void* to, cudaStream_t stream) {
  RowCopies c = given;
  const std::int64_t bytes = c.rows * c.start[c.parts];
  if (bytes == 0) return cudaSuccess;
  std::uint64_t bits = address(to) | static_cast<std::uint64_t>(c.to_pitch);
  std::int64_t farthest = c.rows * c.to_pitch;
  for (int k = 0; k < c.parts; ++k) {
    bits |= static_cast<std::uint64_t>(c.start[k + 1]);
    if (c.start[k + 1] == c.start[k]) continue;  // an empty piece: nothing is read
    bits |= address(from.at[k]) | static_cast<std::uint64_t>(c.from_pitch[k]);
    farthest = farthest > c.rows * c.from_pitch[k] ? farthest : c.rows * c.from_pitch[k];
  }
  const int word = widest_word(bits);
  for (int k = 0; k < c.parts; ++k) c.start[k + 1] /= word, c.from_pitch[k] /= word;
  c.to_pitch /= word;
  const std::int64_t words = bytes / word;
  const auto blocks = static_cast<unsigned>((words + kThreads * kEach - 1) / (kThreads * kEach));
  with_word(word, [&](auto tag) {
    using W = typename decltype(tag)::type;

    if (farthest / word < (std::int64_t{1} << 31)) row_copies<W, unsigned><<<blocks, kThreads, 0, stream>>>(c, from, static_cast<W*>(to));
    else row_copies<W, std::uint64_t><<<blocks, kThreads, 0, stream>>>(c, from, static_cast<W*>(to));
  });
  return cudaGetLastError();
}

bool has_dense_cast(DType from, DType to) { return from != to && is_small_float(from) && (to == DType::f32 || to == DType::f16 || to == DType::bf16); }

cudaError_t launch_dense_cast(DType from, DType to, std::int64_t count, const void* x, void* y, cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  const auto blocks = static_cast<unsigned>((count + kThreads * 8 - 1) / (kThreads * 8));
  cudaError_t status = cudaErrorInvalidValue;
  with_real(to, [&](auto target) {
    using To = typename decltype(target)::type;
    with_any(from, [&](auto source) {
      using From = typename decltype(source)::type;
      if constexpr (!std::is_integral_v<From> && !std::is_same_v<From, double> && !std::is_same_v<From, To>) {
        dense_cast<From, To><<<blocks, kThreads, 0, stream>>>(static_cast<const From*>(x), static_cast<To*>(y), count);
        status = cudaGetLastError();
      }
    });
  });
  return status;
}

}  // namespace comfytp::backend::cuda
