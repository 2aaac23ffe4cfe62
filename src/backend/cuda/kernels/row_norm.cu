#include "backend/cuda/kernels/row_norm.h"

#include "backend/cuda/chain.cuh"
#include "backend/cuda/kernels/reduction.cuh"

namespace comfytp::backend::cuda {
namespace {

// The value of the row's first thread.
template <int WARPS, int LANES>
__device__ __forceinline__ float first_of_row(float v, float* shared) {
  v = __shfl_sync(~0u, v, threadIdx.x % 32 / LANES * LANES);
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

// A row in the registers of WARPS warps, or of LANES threads of one, N elements at a time.
template <typename T, int N, int PACKS, int WARPS, int LANES>
__global__ void __launch_bounds__(WARPS == 1 ? 128 : 32 * WARPS) row_norm(const __grid_constant__ RowNorm n, const __grid_constant__ RowNormOperands o) {
  __shared__ float shared[WARPS];
  constexpr int kThreads = LANES * WARPS, kRows = WARPS == 1 ? 128 / LANES : 1;
  const std::int64_t given = std::int64_t{blockIdx.x} * kRows + (WARPS == 1 ? threadIdx.x / LANES : 0);
  const std::int64_t row = given < n.rows ? given : n.rows - 1;  // what has no row computes the last one too, and keeps it to itself
  const int thread = threadIdx.x % kThreads, packs = static_cast<int>(n.columns / N);
  const std::int64_t base = row * n.columns;
  const auto column = [&](int k) { return (thread + k * kThreads) * N; };
  bool there[PACKS];
  float v[PACKS][N];
#pragma unroll
  for (int k = 0; k < PACKS; ++k) {
    there[k] = thread + k * kThreads < packs;
    if (there[k]) load_floats<T, N>(o.x, base + column(k), n.x_wide, v[k]);
  }
  unsigned at[PACKS][kChainDims];
  if (n.pre.count > 0) {
    pack_index(n.pre, row, thread * N, kThreads * N, at);
    apply_chain<T, N, PACKS>(n.pre, o.pre, at, there, v);
#pragma unroll
    for (int k = 0; k < PACKS; ++k) {
      if (!there[k]) continue;
      if (!n.y_wide)
#pragma unroll
        for (int i = 0; i < N; ++i) v[k][i] = to_float(from_float<T>(v[k][i]));
      if (o.y && given < n.rows) store_floats<T, N>(o.y, base + column(k), n.y_wide, v[k]);
    }
  }
  float mean, scale;
  if (o.moments) {
    const float2 m = merged(n, o.moments, row);
    mean = m.x;
    scale = m.y;
  } else {
    // Differences from the first element, so that a large mean costs no digits.
    const float shift = n.centred ? first_of_row<WARPS, LANES>(v[0][0], shared) : 0.f;
    float sum = 0, squares = 0;
#pragma unroll
    for (int k = 0; k < PACKS; ++k)
      if (there[k])
#pragma unroll
        for (int i = 0; i < N; ++i) sum += v[k][i] -= shift;
    const float count = static_cast<float>(n.columns);
    mean = n.centred ? join_threads<kThreads>(sum, shared, Sum()) / count : 0.f;
#pragma unroll
    for (int k = 0; k < PACKS; ++k)
      if (there[k])
#pragma unroll
        for (int i = 0; i < N; ++i) squares += (v[k][i] - mean) * (v[k][i] - mean);
    scale = rsqrtf(join_threads<kThreads>(squares, shared, Sum()) / count + n.epsilon);
  }
#pragma unroll
  for (int k = 0; k < PACKS; ++k) {
#pragma unroll
    for (int i = 0; i < N; ++i) v[k][i] = (v[k][i] - mean) * scale;
    float parameter[N];
    if (o.weight && there[k]) {
      load_floats<T, N>(o.weight, column(k), n.weight_wide, parameter);
#pragma unroll
      for (int i = 0; i < N; ++i) v[k][i] *= parameter[i];
    }
    if (o.bias && there[k]) {
      load_floats<T, N>(o.bias, column(k), n.bias_wide, parameter);
#pragma unroll
      for (int i = 0; i < N; ++i) v[k][i] += parameter[i];
    }
  }
  if (n.post.count > 0) {
    pack_index(n.post, row, thread * N, kThreads * N, at);
    apply_chain<T, N, PACKS>(n.post, o.post, at, there, v);
  }
#pragma unroll
  for (int k = 0; k < PACKS; ++k)
    if (there[k] && given < n.rows) store_floats<T, N>(o.z, base + column(k), n.z_wide, v[k]);
}

// Rows of any length, N elements at a time (two where a step takes pairs); where there is a chain before the norm y holds its result, or z if
// nobody wants y.
template <typename T, int N>
__global__ void __launch_bounds__(256) any_row_norm(const __grid_constant__ RowNorm n, const __grid_constant__ RowNormOperands o) {
  __shared__ float shared[8];
  const std::int64_t row = blockIdx.x, base = row * n.columns;
  unsigned at[1][kChainDims];
  const bool there[1] = {true};
  const auto chained = [&](const Chain& chain, const ChainOperands& operands, std::int64_t c, float (&v)[1][N]) {
    pack_index(chain, row, static_cast<unsigned>(c), 0, at);
    apply_chain<T, N, 1>(chain, operands, at, there, v);
  };
  const void* x = o.x;
  bool x_wide = n.x_wide;
  float v[1][N];
  if (n.pre.count > 0) {
    void* y = o.y ? o.y : o.z;
    const bool wide = o.y ? n.y_wide : n.z_wide;
    for (std::int64_t c = threadIdx.x * N; c < n.columns; c += 256 * N) {
      load_floats<T, N>(o.x, base + c, n.x_wide, v[0]);
      chained(n.pre, o.pre, c, v);
      store_floats<T, N>(y, base + c, wide, v[0]);
    }
    __syncthreads();
    x = y;
    x_wide = wide;
  }
  float shift = 0;
  if (n.centred && !o.moments) {
    float first[1];
    load_floats<T, 1>(x, base, x_wide, first);
    shift = first[0];
  }
  float mean, scale;
  if (o.moments) {
    const float2 m = merged(n, o.moments, row);
    mean = m.x;
    scale = m.y;
  } else {
    float sum = 0, squares = 0;
    const float count = static_cast<float>(n.columns);
    for (std::int64_t c = threadIdx.x * N; c < n.columns; c += 256 * N) {
      load_floats<T, N>(x, base + c, x_wide, v[0]);
#pragma unroll
      for (int i = 0; i < N; ++i) sum += v[0][i] - shift;
    }
    mean = n.centred ? join_threads<256>(sum, shared, Sum()) / count : 0.f;
    for (std::int64_t c = threadIdx.x * N; c < n.columns; c += 256 * N) {
      load_floats<T, N>(x, base + c, x_wide, v[0]);
#pragma unroll
      for (int i = 0; i < N; ++i) squares += (v[0][i] - shift - mean) * (v[0][i] - shift - mean);
    }
    scale = rsqrtf(join_threads<256>(squares, shared, Sum()) / count + n.epsilon);
  }
  for (std::int64_t c = threadIdx.x * N; c < n.columns; c += 256 * N) {
    load_floats<T, N>(x, base + c, x_wide, v[0]);
    float parameter[N];
#pragma unroll
    for (int i = 0; i < N; ++i) v[0][i] = (v[0][i] - shift - mean) * scale;
    if (o.weight) {
      load_floats<T, N>(o.weight, c, n.weight_wide, parameter);
#pragma unroll
      for (int i = 0; i < N; ++i) v[0][i] *= parameter[i];
    }
    if (o.bias) {
      load_floats<T, N>(o.bias, c, n.bias_wide, parameter);
#pragma unroll
      for (int i = 0; i < N; ++i) v[0][i] += parameter[i];
    }
    if (n.post.count > 0) chained(n.post, o.post, c, v);
    store_floats<T, N>(o.z, base + c, n.z_wide, v[0]);
  }
}

template <typename T, int WARPS, int PACKS, int LANES = 32>
void launch(const RowNorm& n, const RowNormOperands& o, cudaStream_t stream) {
  constexpr int rows = WARPS == 1 ? 128 / LANES : 1;
  const auto blocks = static_cast<unsigned>((n.rows + rows - 1) / rows);
  row_norm<T, Pack<T>::size, PACKS, WARPS, LANES><<<blocks, WARPS == 1 ? 128 : 32 * WARPS, 0, stream>>>(n, o);
}

}  // namespace

cudaError_t launch_row_norm(const RowNorm& n, const RowNormOperands& o, DType dtype, cudaStream_t stream) {
  if (n.rows == 0 || n.columns == 0) return cudaSuccess;
  if (n.rows >= std::int64_t{1} << 31 || n.columns >= std::int64_t{1} << 31) return cudaErrorInvalidValue;
  const bool all_aligned = aligned(o.x) && aligned(o.weight) && aligned(o.bias) && aligned(o.y) && aligned(o.z) && o.pre.aligned() && o.post.aligned();
  const bool known = with_real(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int N = Pack<T>::size;
    const std::int64_t packs = n.columns / N;
    const bool fits = all_aligned && n.columns % N == 0 && n.pre.packs_of(N) && n.post.packs_of(N);
    if (fits && packs <= 16) launch<T, 1, 1, 16>(n, o, stream);
    else if (fits && packs <= 32) launch<T, 1, 1>(n, o, stream);
    else if (fits && packs <= 64) launch<T, 1, 2>(n, o, stream);
    else if (fits && packs <= 96) launch<T, 1, 3>(n, o, stream);
    else if (fits && packs <= 160) launch<T, 1, 5>(n, o, stream);
    else if (fits && packs <= 256) launch<T, 2, 4>(n, o, stream);
    else if (fits && packs <= 384) launch<T, 4, 3>(n, o, stream);
    else if (fits && packs <= 512) launch<T, 4, 4>(n, o, stream);
    else if (fits && packs <= 768) launch<T, 8, 3>(n, o, stream);
    else if (fits && packs <= 1024) launch<T, 8, 4>(n, o, stream);
    else if (n.columns % 2 == 0 && (n.pre.pairs() || n.post.pairs())) any_row_norm<T, 2><<<static_cast<unsigned>(n.rows), 256, 0, stream>>>(n, o);
    else any_row_norm<T, 1><<<static_cast<unsigned>(n.rows), 256, 0, stream>>>(n, o);
  });
  return known ? cudaGetLastError() : cudaErrorInvalidValue;
}

}  // namespace comfytp::backend::cuda
