#include "backend/cuda/kernels/row_norm.h"

#include "backend/cuda/chain.cuh"
#include "backend/cuda/kernels/reduction.cuh"

namespace comfytp::backend::cuda {
namespace {

// The value of the row's first thread.
template <int WARPS>
__device__ __forceinline__ float first_of_row(float v, float* shared) {
  v = __shfl_sync(~0u, v, 0);
  if constexpr (WARPS > 1) {
    if (threadIdx.x == 0) shared[0] = v;
    __syncthreads();
    v = shared[0];
  }
  return v;
}

// Mean and 1/deviation of a row from the moments of its parts (Chan et al. 1979).
__device__ __forceinline__ float2 merged(const RowNorm& n, const float* moments, std::int64_t row) {
  float count = 0, mean = 0, squares = 0;
  for (int p = 0; p < n.parts; ++p) {
    const float* m = moments + (p * n.rows + row) * 3;
    if (m[0] == 0) continue;
    const float total = count + m[0], delta = m[1] - mean;
    squares += m[2] + delta * delta * count * m[0] / total;
    mean += delta * m[0] / total;
    count = total;
  }
  const float variance = n.centred ? squares / count : squares / count + mean * mean;
  return {n.centred ? mean : 0.f, rsqrtf(variance + n.epsilon)};
}

// The index of a row in a chain's dimensions; the innermost is the columns.
__device__ __forceinline__ void row_index(const Chain& chain, std::int64_t row, unsigned (&at)[kChainDims]) {
  unsigned rest = static_cast<unsigned>(row);
#pragma unroll
  for (int d = kChainDims - 1; d >= 0; --d) {
    at[d] = 0;
    if (d + 1 >= chain.dims) continue;
    const unsigned size = static_cast<unsigned>(chain.size[d]), q = d > 0 ? rest / size : 0;
    at[d] = rest - q * size;
    rest = q;
  }
}

// The same for a row's packs of N, the first at column `first` and the others `step` apart.
template <int M>
__device__ __forceinline__ void pack_index(const Chain& chain, std::int64_t row, unsigned first, unsigned step, unsigned (&at)[M][kChainDims]) {
  row_index(chain, row, at[0]);
#pragma unroll
  for (int m = M - 1; m >= 0; --m)
#pragma unroll
    for (int d = 0; d < kChainDims; ++d) at[m][d] = d == chain.dims - 1 ? first + m * step : at[0][d];
}

// A row in the registers of WARPS warps, N elements at a time.
template <typename T, int N, int PACKS, int WARPS>
__global__ void __launch_bounds__(WARPS == 1 ? 128 : 32 * WARPS) row_norm(const __grid_constant__ RowNorm n, const __grid_constant__ RowNormOperands o) {
  __shared__ float shared[WARPS];
  constexpr int kThreads = 32 * WARPS, kRows = WARPS == 1 ? 4 : 1;
  const std::int64_t row = std::int64_t{blockIdx.x} * kRows + (WARPS == 1 ? threadIdx.x / 32 : 0);
  if (row >= n.rows) return;  // whole warps, or the whole block
  const int thread = threadIdx.x % kThreads, packs = static_cast<int>(n.columns / N);
  const std::int64_t base = row * n.columns;
  const auto column = [&](int k) { return (thread + k * kThreads) * N; };
  bool there[PACKS];
  float v[PACKS][N];
  Pack<T> weight[PACKS], bias[PACKS];
#pragma unroll
  for (int k = 0; k < PACKS; ++k) {
    there[k] = thread + k * kThreads < packs;
    if (!there[k]) continue;
    load_floats<T, N>(static_cast<const T*>(o.x) + base + column(k), v[k]);
    if (o.weight) weight[k] = load_pack(static_cast<const T*>(o.weight) + column(k));
    if (o.bias) bias[k] = load_pack(static_cast<const T*>(o.bias) + column(k));
  }
  unsigned at[PACKS][kChainDims];
  if (n.pre.count > 0) {
    pack_index(n.pre, row, thread * N, kThreads * N, at);
    apply_chain<T, N, PACKS>(n.pre, o.pre, at, there, v);
#pragma unroll
    for (int k = 0; k < PACKS; ++k) {
      if (!there[k]) continue;
#pragma unroll
      for (int i = 0; i < N; ++i) v[k][i] = to_float(from_float<T>(v[k][i]));
      if (o.y) store_floats<T, N>(static_cast<T*>(o.y) + base + column(k), v[k]);
    }
  }
  float mean, scale;
  if (o.moments) {
    const float2 m = merged(n, o.moments, row);
    mean = m.x;
    scale = m.y;
  } else {
    // Differences from the first element, so that a large mean costs no digits.
    const float shift = n.centred ? first_of_row<WARPS>(v[0][0], shared) : 0.f;
    float sum = 0, squares = 0;
#pragma unroll
    for (int k = 0; k < PACKS; ++k)
      if (there[k])
#pragma unroll
        for (int i = 0; i < N; ++i) sum += v[k][i] -= shift;
    const float count = static_cast<float>(n.columns);
    mean = n.centred ? join_threads<32 * WARPS>(sum, shared, Sum()) / count : 0.f;
#pragma unroll
    for (int k = 0; k < PACKS; ++k)
      if (there[k])
#pragma unroll
        for (int i = 0; i < N; ++i) squares += (v[k][i] - mean) * (v[k][i] - mean);
    scale = rsqrtf(join_threads<32 * WARPS>(squares, shared, Sum()) / count + n.epsilon);
  }
#pragma unroll
  for (int k = 0; k < PACKS; ++k)
#pragma unroll
    for (int i = 0; i < N; ++i) {
      v[k][i] = (v[k][i] - mean) * scale;
      if (o.weight) v[k][i] *= to_float(weight[k].v[i]);
      if (o.bias) v[k][i] += to_float(bias[k].v[i]);
    }
  if (n.post.count > 0) {
    pack_index(n.post, row, thread * N, kThreads * N, at);
    apply_chain<T, N, PACKS>(n.post, o.post, at, there, v);
  }
#pragma unroll
  for (int k = 0; k < PACKS; ++k)
    if (there[k]) store_floats<T, N>(static_cast<T*>(o.z) + base + column(k), v[k]);
}

// Rows of any length, an element at a time; where there is a chain before the norm y holds its result.
template <typename T>
__global__ void __launch_bounds__(256) any_row_norm(const __grid_constant__ RowNorm n, const __grid_constant__ RowNormOperands o) {
  __shared__ float shared[8];
  const std::int64_t row = blockIdx.x, base = row * n.columns;
  unsigned at[1][kChainDims];
  const bool there[1] = {true};
  const auto chained = [&](const Chain& chain, const ChainOperands& operands, std::int64_t c, float value) {
    float v[1][1] = {{value}};
    pack_index(chain, row, static_cast<unsigned>(c), 0, at);
    apply_chain<T, 1, 1>(chain, operands, at, there, v);
    return v[0][0];
  };
  const T* x = static_cast<const T*>(o.x) + base;
  if (n.pre.count > 0) {
    T* y = static_cast<T*>(o.y) + base;
    for (std::int64_t c = threadIdx.x; c < n.columns; c += 256) y[c] = from_float<T>(chained(n.pre, o.pre, c, to_float(x[c])));
    __syncthreads();
    x = y;
  }
  const float shift = n.centred && !o.moments ? to_float(x[0]) : 0.f;
  float mean, scale;
  if (o.moments) {
    const float2 m = merged(n, o.moments, row);
    mean = m.x;
    scale = m.y;
  } else {
    float sum = 0, squares = 0;
    const float count = static_cast<float>(n.columns);
    for (std::int64_t c = threadIdx.x; c < n.columns; c += 256) sum += to_float(x[c]) - shift;
    mean = n.centred ? join_threads<256>(sum, shared, Sum()) / count : 0.f;
    for (std::int64_t c = threadIdx.x; c < n.columns; c += 256) {
      const float v = to_float(x[c]) - shift - mean;
      squares += v * v;
    }
    scale = rsqrtf(join_threads<256>(squares, shared, Sum()) / count + n.epsilon);
  }
  for (std::int64_t c = threadIdx.x; c < n.columns; c += 256) {
    float v = (to_float(x[c]) - shift - mean) * scale;
    if (o.weight) v *= to_float(static_cast<const T*>(o.weight)[c]);
    if (o.bias) v += to_float(static_cast<const T*>(o.bias)[c]);
    if (n.post.count > 0) v = chained(n.post, o.post, c, v);
    static_cast<T*>(o.z)[base + c] = from_float<T>(v);
  }
}

template <typename T, int PACKS, int WARPS>
void launch(const RowNorm& n, const RowNormOperands& o, cudaStream_t stream) {
  const int rows = WARPS == 1 ? 4 : 1;
  row_norm<T, Pack<T>::size, PACKS, WARPS><<<static_cast<unsigned>((n.rows + rows - 1) / rows), rows * 32 * WARPS, 0, stream>>>(n, o);
}

}  // namespace

cudaError_t launch_row_norm(const RowNorm& n, const RowNormOperands& o, DType dtype, cudaStream_t stream) {
  if (n.rows == 0 || n.columns == 0) return cudaSuccess;
  if (n.rows >= std::int64_t{1} << 31 || n.columns >= std::int64_t{1} << 31 || (n.pre.count > 0 && !o.y)) return cudaErrorInvalidValue;
  const bool all_aligned = aligned(o.x) && aligned(o.weight) && aligned(o.bias) && aligned(o.y) && aligned(o.z) && o.pre.aligned() && o.post.aligned();
  const bool known = with_real(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int N = Pack<T>::size;
    const std::int64_t packs = n.columns / N;
    const bool fits = all_aligned && n.columns % N == 0 && n.pre.packs_of(N) && n.post.packs_of(N);
    if (fits && packs <= 32) launch<T, 1, 1>(n, o, stream);
    else if (fits && packs <= 64) launch<T, 1, 2>(n, o, stream);
    else if (fits && packs <= 96) launch<T, 1, 3>(n, o, stream);
    else if (fits && packs <= 160) launch<T, 1, 5>(n, o, stream);
    else if (fits && packs <= 256) launch<T, 1, 8>(n, o, stream);
    else if (fits && packs <= 512) launch<T, 2, 8>(n, o, stream);
    else if (fits && packs <= 1024) launch<T, 4, 8>(n, o, stream);
    else any_row_norm<T><<<static_cast<unsigned>(n.rows), 256, 0, stream>>>(n, o);
  });
  return known ? cudaGetLastError() : cudaErrorInvalidValue;
}

}  // namespace comfytp::backend::cuda
