#include "backend/cuda/kernels/row_norm.h"

#include "backend/cuda/chain.cuh"

namespace comfytp::backend::cuda {
namespace {

// The sum over the threads of a row, in an order that never changes.
template <int WARPS>
__device__ __forceinline__ float row_sum(float v, float* shared) {
#pragma unroll
  for (int k = 16; k > 0; k /= 2) v += __shfl_xor_sync(~0u, v, k);
  if constexpr (WARPS > 1) {
    __syncthreads();
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = v;
    __syncthreads();
    v = 0;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) v += shared[w];
  }
  return v;
}

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

__device__ __forceinline__ void row_index(const Chain& chain, std::int64_t row, std::int64_t (&at)[kChainDims]) {
  for (int d = chain.dims - 2; d > 0; --d) {
    const std::int64_t q = row / chain.size[d];
    at[d] = row - q * chain.size[d];
    row = q;
  }
  if (chain.dims > 1) at[0] = row;
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
  std::int64_t pre_at[kChainDims] = {}, post_at[kChainDims] = {};
  row_index(n.pre, row, pre_at);
  row_index(n.post, row, post_at);
  float v[PACKS][N];
  float sum = 0, shift = 0;
#pragma unroll
  for (int k = 0; k < PACKS; ++k) {
    const int pack = thread + k * kThreads;
    if (pack < packs) load_floats<T, N>(static_cast<const T*>(o.x) + base + pack * N, v[k]);
  }
#pragma unroll
  for (int k = 0; k < PACKS; ++k) {
    const int pack = thread + k * kThreads;
    if (pack >= packs) continue;
    if (n.pre.count > 0) {
      pre_at[n.pre.dims - 1] = pack * N;
      apply_chain<T, N>(n.pre, o.pre, pre_at, v[k]);
#pragma unroll
      for (int i = 0; i < N; ++i) v[k][i] = to_float(from_float<T>(v[k][i]));
      if (o.y) store_floats<T, N>(static_cast<T*>(o.y) + base + pack * N, v[k]);
    }
  }
  float mean, scale;
  if (o.moments) {
    const float2 m = merged(n, o.moments, row);
    mean = m.x;
    scale = m.y;
  } else {
    // Differences from the first element, so that a large mean costs no digits.
    if (n.centred) shift = first_of_row<WARPS>(v[0][0], shared);
#pragma unroll
    for (int k = 0; k < PACKS; ++k)
      if (thread + k * kThreads < packs)
#pragma unroll
        for (int i = 0; i < N; ++i) sum += v[k][i] -= shift;
    const float count = static_cast<float>(n.columns);
    mean = n.centred ? row_sum<WARPS>(sum, shared) / count : 0.f;
    float squares = 0;
#pragma unroll
    for (int k = 0; k < PACKS; ++k)
      if (thread + k * kThreads < packs)
#pragma unroll
        for (int i = 0; i < N; ++i) squares += (v[k][i] - mean) * (v[k][i] - mean);
    scale = rsqrtf(row_sum<WARPS>(squares, shared) / count + n.epsilon);
  }
#pragma unroll
  for (int k = 0; k < PACKS; ++k) {
    const int pack = thread + k * kThreads;
    if (pack >= packs) continue;
#pragma unroll
    for (int i = 0; i < N; ++i) v[k][i] = (v[k][i] - mean) * scale;
    float p[N];
    if (o.weight) {
      load_floats<T, N>(static_cast<const T*>(o.weight) + pack * N, p);
#pragma unroll
      for (int i = 0; i < N; ++i) v[k][i] *= p[i];
    }
    if (o.bias) {
      load_floats<T, N>(static_cast<const T*>(o.bias) + pack * N, p);
#pragma unroll
      for (int i = 0; i < N; ++i) v[k][i] += p[i];
    }
    if (n.post.count > 0) {
      post_at[n.post.dims - 1] = pack * N;
      apply_chain<T, N>(n.post, o.post, post_at, v[k]);
    }
    store_floats<T, N>(static_cast<T*>(o.z) + base + pack * N, v[k]);
  }
}

// Rows of any length: pre(x) is taken again in each of three passes where y is not written; y may then not be x.
template <typename T>
__global__ void __launch_bounds__(256) any_row_norm(const __grid_constant__ RowNorm n, const __grid_constant__ RowNormOperands o) {
  __shared__ float shared[8];
  const std::int64_t row = blockIdx.x, base = row * n.columns;
  std::int64_t pre_at[kChainDims] = {}, post_at[kChainDims] = {};
  row_index(n.pre, row, pre_at);
  row_index(n.post, row, post_at);
  const bool reread = n.pre.count == 0 || o.y;
  const T* x = static_cast<const T*>(o.x) + base;
  const T* again = n.pre.count == 0 ? x : static_cast<const T*>(o.y) + base;
  const auto value = [&](std::int64_t c) {
    float v[1] = {to_float(x[c])};
    if (n.pre.count > 0) {
      pre_at[n.pre.dims - 1] = c;
      apply_chain<T, 1>(n.pre, o.pre, pre_at, v);
    }
    return to_float(from_float<T>(v[0]));
  };
  const float shift = n.centred && !o.moments ? value(0) : 0.f;
  __syncthreads();  // y may be x
  float sum = 0;
  for (std::int64_t c = threadIdx.x; c < n.columns; c += 256) {
    const float v = value(c);
    if (o.y) static_cast<T*>(o.y)[base + c] = from_float<T>(v);
    sum += v - shift;
  }
  float mean, scale;
  if (o.moments) {
    const float2 m = merged(n, o.moments, row);
    mean = m.x;
    scale = m.y;
  } else {
    const float count = static_cast<float>(n.columns);
    mean = n.centred ? row_sum<8>(sum, shared) / count : 0.f;
    float squares = 0;
    for (std::int64_t c = threadIdx.x; c < n.columns; c += 256) {
      const float v = (reread ? to_float(again[c]) : value(c)) - shift - mean;
      squares += v * v;
    }
    scale = rsqrtf(row_sum<8>(squares, shared) / count + n.epsilon);
  }
  for (std::int64_t c = threadIdx.x; c < n.columns; c += 256) {
    float v[1] = {((reread ? to_float(again[c]) : value(c)) - shift - mean) * scale};
    if (o.weight) v[0] *= to_float(static_cast<const T*>(o.weight)[c]);
    if (o.bias) v[0] += to_float(static_cast<const T*>(o.bias)[c]);
    if (n.post.count > 0) {
      post_at[n.post.dims - 1] = c;
      apply_chain<T, 1>(n.post, o.post, post_at, v);
    }
    static_cast<T*>(o.z)[base + c] = from_float<T>(v[0]);
  }
}

template <typename T, int PACKS, int WARPS>
void launch(const RowNorm& n, const RowNormOperands& o, cudaStream_t stream) {
  const int rows = WARPS == 1 ? 4 : 1;
  row_norm<T, Pack<T>::size, PACKS, WARPS><<<static_cast<unsigned>((n.rows + rows - 1) / rows), rows * 32 * WARPS, 0, stream>>>(n, o);
}

bool aligned(const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; }

}  // namespace

cudaError_t launch_row_norm(const RowNorm& n, const RowNormOperands& o, DType dtype, cudaStream_t stream) {
  if (n.rows == 0 || n.columns == 0) return cudaSuccess;
  const bool all_aligned = aligned(o.x) && aligned(o.weight) && aligned(o.bias) && aligned(o.y) && aligned(o.z) && o.pre.aligned() && o.post.aligned();
  const bool known = with_real(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int N = Pack<T>::size;
    const std::int64_t packs = n.columns / N;
    const bool fits = all_aligned && n.columns % N == 0 && n.pre.packs_of(N) && n.post.packs_of(N);
    if (fits && packs <= 32) launch<T, 1, 1>(n, o, stream);
    else if (fits && packs <= 64) launch<T, 2, 1>(n, o, stream);
    else if (fits && packs <= 96) launch<T, 3, 1>(n, o, stream);
    else if (fits && packs <= 160) launch<T, 5, 1>(n, o, stream);
    else if (fits && packs <= 384) launch<T, 3, 4>(n, o, stream);
    else if (fits && packs <= 640) launch<T, 5, 4>(n, o, stream);
    else if (fits && packs <= 2048) launch<T, 8, 8>(n, o, stream);
    else any_row_norm<T><<<static_cast<unsigned>(n.rows), 256, 0, stream>>>(n, o);
  });
  return known ? cudaGetLastError() : cudaErrorInvalidValue;
}

}  // namespace comfytp::backend::cuda
