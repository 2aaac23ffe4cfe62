#include "backend/cuda/kernels/reduce.h"

#include <limits>
#include <type_traits>

#include "backend/cuda/kernels/reduction.cuh"

namespace comfytp::backend::cuda {
namespace {

constexpr int kThreads = 256, kColumns = 32, kLanes = kThreads / kColumns;

// Reals are summed as float, whole numbers in 64 bits.
template <typename T>
using Total = std::conditional_t<!std::is_integral_v<T>, float, std::conditional_t<std::is_signed_v<T>, long long, unsigned long long>>;
template <typename T>
__device__ __forceinline__ Total<T> total_of(T v) {
  if constexpr (std::is_integral_v<T>) return static_cast<Total<T>>(v);
  else return to_float(v);
}
template <typename T>
__device__ __forceinline__ T element_of(Total<T> v) {
  if constexpr (std::is_integral_v<T>) return static_cast<T>(v);
  else return from_float<T>(v);
}

template <typename V>
struct Join {
  bool maximum;
  __device__ __forceinline__ V operator()(V a, V b) const { return maximum ? Larger()(a, b) : a + b; }
};

__device__ __forceinline__ std::int64_t place(int rank, const std::int64_t* size, const std::int64_t* stride, std::int64_t i) {
  std::int64_t at = 0;
  for (int d = rank - 1; d > 0; --d) {
    std::int64_t q;
    if (i >> 32 || size[d] >> 32) q = i / size[d];
    else q = static_cast<unsigned>(i) / static_cast<unsigned>(size[d]);
    at += (i - q * size[d]) * stride[d];
    i = q;
  }
  return rank > 0 ? at + i * stride[0] : 0;
}

// THREADS threads a result, side by side along what is reduced.
template <typename T, int THREADS>
__global__ void __launch_bounds__(kThreads) reduce_rows(const __grid_constant__ Reduce r, Total<T> start, const T* x, T* y) {
  __shared__ Total<T> shared[kThreads / 32];
  const std::int64_t result = std::int64_t{blockIdx.x} * (kThreads / THREADS) + threadIdx.x / THREADS;
  if (result >= r.results) return;  // whole warps, or the whole block
  const Join<Total<T>> join{r.maximum};
  const T* from = x + place(r.kept, r.kept_size, r.kept_stride, result);
  auto total = start;
#pragma unroll 4
  for (std::int64_t i = threadIdx.x % THREADS; i < r.terms; i += THREADS) total = join(total, total_of(from[place(r.gone, r.gone_size, r.gone_stride, i)]));
  total = join_threads<THREADS>(total, shared, join);
  if (threadIdx.x % THREADS == 0) y[result] = element_of<T>(total);
}

// kColumns results side by side, kLanes threads each.
template <typename T>
__global__ void __launch_bounds__(kThreads) reduce_columns(const __grid_constant__ Reduce r, Total<T> start, const T* x, T* y) {
  __shared__ Total<T> shared[kLanes][kColumns];
  const std::int64_t result = std::int64_t{blockIdx.x} * kColumns + threadIdx.x;
  const Join<Total<T>> join{r.maximum};
  auto total = start;
  if (result < r.results) {
    const T* from = x + place(r.kept, r.kept_size, r.kept_stride, result);
#pragma unroll 4
    for (std::int64_t i = threadIdx.y; i < r.terms; i += kLanes) total = join(total, total_of(from[place(r.gone, r.gone_size, r.gone_stride, i)]));
  }
  shared[threadIdx.y][threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.y > 0 || result >= r.results) return;
  for (int l = 1; l < kLanes; ++l) total = join(total, shared[l][threadIdx.x]);
  y[result] = element_of<T>(total);
}

template <typename T>
void launch(const Reduce& r, const void* from, void* to, cudaStream_t stream) {
  const auto* x = static_cast<const T*>(from);
  auto* y = static_cast<T*>(to);
  Total<T> start = 0;
  if (r.maximum) {
    if constexpr (std::is_integral_v<T>) start = static_cast<Total<T>>(std::numeric_limits<T>::lowest());
    else start = -std::numeric_limits<float>::infinity();
  }
  const auto blocks = [&](int each) { return static_cast<unsigned>((r.results + each - 1) / each); };
  if (!r.inner_gone)
    reduce_columns<T><<<blocks(kColumns), dim3(kColumns, kLanes), 0, stream>>>(r, start, x, y);
  else if (r.terms <= 1024)
    reduce_rows<T, 32><<<blocks(kThreads / 32), kThreads, 0, stream>>>(r, start, x, y);
  else
    reduce_rows<T, kThreads><<<blocks(1), kThreads, 0, stream>>>(r, start, x, y);
}

// Maximum first, then the sum, as a row that starts with -inf asks for it. Every element is read before it is written.
template <typename T, int THREADS>
__global__ void __launch_bounds__(kThreads) softmax_rows(std::int64_t rows, std::int64_t size, const T* x, T* y) {
  __shared__ float shared[kThreads / 32];
  const std::int64_t row = std::int64_t{blockIdx.x} * (kThreads / THREADS) + threadIdx.x / THREADS;
  if (row >= rows) return;  // whole warps, or the whole block
  const T* from = x + row * size;
  T* to = y + row * size;
  float top = -INFINITY, sum = 0;
#pragma unroll 4
  for (std::int64_t i = threadIdx.x % THREADS; i < size; i += THREADS) top = Larger()(top, to_float(from[i]));
  top = join_threads<THREADS>(top, shared, Larger());
#pragma unroll 4
  for (std::int64_t i = threadIdx.x % THREADS; i < size; i += THREADS) sum += expf(to_float(from[i]) - top);
  sum = join_threads<THREADS>(sum, shared, Sum());
  for (std::int64_t i = threadIdx.x % THREADS; i < size; i += THREADS) to[i] = from_float<T>(expf(to_float(from[i]) - top) / sum);
}

// The same for kColumns rows that lie side by side, kLanes threads each.
template <typename T>
__global__ void __launch_bounds__(kThreads) softmax_columns(std::int64_t columns, std::int64_t size, std::int64_t inner, const T* x, T* y) {
  __shared__ float shared[kLanes][kColumns];
  const std::int64_t column = std::int64_t{blockIdx.x} * kColumns + threadIdx.x;
  const bool mine = column < columns;
  const std::int64_t outer = mine ? column / inner : 0, base = mine ? outer * size * inner + (column - outer * inner) : 0, end = mine ? size : 0;
  float top = -INFINITY, sum = 0;
#pragma unroll 4
  for (std::int64_t i = threadIdx.y; i < end; i += kLanes) top = Larger()(top, to_float(x[base + i * inner]));
  shared[threadIdx.y][threadIdx.x] = top;
  __syncthreads();
  for (int l = 0; l < kLanes; ++l) top = Larger()(top, shared[l][threadIdx.x]);
  __syncthreads();
#pragma unroll 4
  for (std::int64_t i = threadIdx.y; i < end; i += kLanes) sum += expf(to_float(x[base + i * inner]) - top);
  shared[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  sum = 0;
  for (int l = 0; l < kLanes; ++l) sum += shared[l][threadIdx.x];
  for (std::int64_t i = threadIdx.y; i < end; i += kLanes) y[base + i * inner] = from_float<T>(expf(to_float(x[base + i * inner]) - top) / sum);
}

// A warp a row, read twice: the mean first, so that nothing cancels; what rounding took from it is put back.
template <typename T>
__global__ void __launch_bounds__(kThreads) row_moments(std::int64_t rows, std::int64_t columns, const T* x, float* moments) {
  const std::int64_t row = std::int64_t{blockIdx.x} * (kThreads / 32) + threadIdx.x / 32;
  if (row >= rows) return;  // whole warps
  const T* from = x + row * columns;
  const int lane = threadIdx.x % 32;
  const float count = static_cast<float>(columns);
  float sum = 0, rest = 0, squares = 0;
#pragma unroll 4
  for (std::int64_t i = lane; i < columns; i += 32) sum += to_float(from[i]);
  const float mean = columns ? join_threads<32>(sum, static_cast<float*>(nullptr), Sum()) / count : 0.f;
#pragma unroll 4
  for (std::int64_t i = lane; i < columns; i += 32) {
    const float d = to_float(from[i]) - mean;
    rest += d;
    squares += d * d;
  }
  rest = join_threads<32>(rest, static_cast<float*>(nullptr), Sum());
  squares = join_threads<32>(squares, static_cast<float*>(nullptr), Sum());
  if (lane > 0) return;
  moments[3 * row] = count;
  moments[3 * row + 1] = columns ? mean + rest / count : 0.f;
  moments[3 * row + 2] = columns ? squares - rest * rest / count : 0.f;
}

}  // namespace

cudaError_t launch_reduce(const Reduce& r, DType dtype, const void* x, void* y, cudaStream_t stream) {
  if (r.results == 0) return cudaSuccess;
  cudaError_t status = cudaErrorInvalidValue;
  const auto body = [&](auto tag) {
    launch<typename decltype(tag)::type>(r, x, y, stream);
    status = cudaGetLastError();
  };
  if (!with_real(dtype, body)) with_any(dtype, [&](auto tag) {
      if constexpr (std::is_integral_v<typename decltype(tag)::type>) body(tag);
    });
  return status;
}

cudaError_t launch_softmax(DType dtype, std::int64_t outer, std::int64_t size, std::int64_t inner, const void* from, void* to, cudaStream_t stream) {
  const std::int64_t rows = outer * inner;
  if (rows == 0 || size == 0) return cudaSuccess;
  const auto blocks = [&](int each) { return static_cast<unsigned>((rows + each - 1) / each); };
  const bool known = with_real(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto* x = static_cast<const T*>(from);
    auto* y = static_cast<T*>(to);
    if (inner > 1)
      softmax_columns<T><<<blocks(kColumns), dim3(kColumns, kLanes), 0, stream>>>(rows, size, inner, x, y);
    else if (size <= 1024)
      softmax_rows<T, 32><<<blocks(kThreads / 32), kThreads, 0, stream>>>(rows, size, x, y);
    else
      softmax_rows<T, kThreads><<<blocks(1), kThreads, 0, stream>>>(rows, size, x, y);
  });
  return known ? cudaGetLastError() : cudaErrorInvalidValue;
}

cudaError_t launch_row_moments(DType dtype, std::int64_t rows, std::int64_t columns, const void* x, float* moments, cudaStream_t stream) {
  if (rows == 0) return cudaSuccess;
  const bool known = with_real(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    row_moments<T><<<static_cast<unsigned>((rows + 7) / 8), kThreads, 0, stream>>>(rows, columns, static_cast<const T*>(x), moments);
  });
  return known ? cudaGetLastError() : cudaErrorInvalidValue;
}

}  // namespace comfytp::backend::cuda
