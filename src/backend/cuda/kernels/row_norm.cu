#include "backend/cuda/kernels/row_norm.h"

#include "backend/cuda/chain.cuh"
#include "backend/cuda/kernels/head_norm.h"
#include "backend/cuda/kernels/modulated_norm.h"
#include "backend/cuda/kernels/row_statistics.cuh"

namespace comfytp::backend::cuda {
namespace {

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

// Where a row's packs of N stand in a chain's dimensions, of which the innermost is the columns.
template <int N>
struct RowPacks {
  unsigned outer[kChainDims - 1];  // the row's indices, 0 behind the last
  unsigned first, step;            // columns of the first pack and from one to the next
  __device__ __forceinline__ RowPacks(const Chain& chain, std::int64_t row, unsigned first, unsigned step) : first(first), step(step) {
    unsigned rest = static_cast<unsigned>(row);
#pragma unroll
    for (int d = kChainDims - 2; d >= 0; --d) {
      outer[d] = 0;
      if (d + 1 >= chain.dims) continue;
      const unsigned size = static_cast<unsigned>(chain.size[d]), q = d > 0 ? rest / size : 0;
      outer[d] = rest - q * size;
      rest = q;
    }
  }
  __device__ __forceinline__ std::int64_t offset(const Chain& chain, const ChainStep& s, int m) const {
    std::int64_t offset = 0;
    if (s.varies) {
#pragma unroll
      for (int d = 0; d < kChainDims - 1; ++d) offset += outer[d] * s.stride[d];
    }
    const unsigned column = s.halved ? (first + m * step) / 2 : first + m * step;
    const std::int64_t stride = s.stride[chain.dims - 1];
    return offset + (N >= 4 ? (stride ? column : 0) : column * stride);  // packs of four and more are neighbours, or one for all
  }
};

// A row in the registers of LANES threads of a warp or, where LANES is 0, of a whole block: PACKS packs of N elements each. Few registers matter
// most here: a row is loaded, summed and stored in turn, and only other rows' threads fill the memory's time meanwhile.
template <typename T, int N, int PACKS, int LANES, ChainKind KIND>
__global__ void __launch_bounds__(LANES ? 128 : PACKS == 1 ? 1024 : 512)
row_norm(const __grid_constant__ RowNorm n, const __grid_constant__ RowNormOperands o) {
  constexpr bool kWide = KIND != ChainKind::plain;
  constexpr int kRows = LANES ? 128 / LANES : 1;
  const int threads = LANES ? LANES : static_cast<int>(blockDim.x), thread = LANES ? threadIdx.x % LANES : threadIdx.x;
  const int columns = static_cast<int>(n.columns), packs = columns / N;
  const std::int64_t given = std::int64_t{blockIdx.x} * kRows + (LANES ? threadIdx.x / LANES : 0);
  const std::int64_t row = given < n.rows ? given : n.rows - 1;  // what has no row computes the last one too, and keeps it to itself
  const std::int64_t base = row * columns;
  const auto column = [&](int k) { return (thread + k * threads) * N; };
  bool there[PACKS];
  float v[PACKS][N];
#pragma unroll
  for (int k = 0; k < PACKS; ++k) {
    there[k] = thread + k * threads < packs;
    if (there[k]) load_floats<T, N>(o.x, base + column(k), kWide && n.x_wide, v[k]);
  }
  if (n.pre.count > 0) {
    apply_chain<T, N, PACKS, KIND>(n.pre, o.pre, RowPacks<N>(n.pre, row, thread * N, threads * N), there, v);
#pragma unroll
    for (int k = 0; k < PACKS; ++k) {
      if (!there[k] || !o.y) continue;
      if (!(kWide && n.y_wide))  // the norm sees y as its other readers do
#pragma unroll
        for (int i = 0; i < N; ++i) v[k][i] = to_float(from_float<T>(v[k][i]));
      if (given < n.rows) store_floats<T, N>(o.y, base + column(k), kWide && n.y_wide, v[k]);
    }
  }
  float mean = 0, scale;
  if (o.moments) {
    const float2 m = merged(n, o.moments, row);
    mean = m.x;
    scale = m.y;
  } else {
    const auto found = row_statistics<N, PACKS, LANES>(v, there, packs, n.centred, n.epsilon);
    mean = found.mean;
    scale = found.scale;
  }
#pragma unroll
  for (int k = 0; k < PACKS; ++k) {
#pragma unroll
    for (int i = 0; i < N; ++i) v[k][i] = (v[k][i] - mean) * scale;
    float parameter[N];
    if (o.weight && there[k]) {
      load_floats<T, N>(o.weight, column(k), kWide && n.weight_wide, parameter);
#pragma unroll
      for (int i = 0; i < N; ++i) v[k][i] *= parameter[i];
    }
    if (o.bias && there[k]) {
      load_floats<T, N>(o.bias, column(k), kWide && n.bias_wide, parameter);
#pragma unroll
      for (int i = 0; i < N; ++i) v[k][i] += parameter[i];
    }
  }
  if (n.post.count > 0) apply_chain<T, N, PACKS, KIND>(n.post, o.post, RowPacks<N>(n.post, row, thread * N, threads * N), there, v);
#pragma unroll
  for (int k = 0; k < PACKS; ++k)
    if (there[k] && given < n.rows) store_floats<T, N>(o.z, base + column(k), kWide && n.z_wide, v[k]);
}

// Rows of any length, N elements at a time (two where a step takes pairs); y holds the result of the chain before the norm, which runs again
// for every look at it if nobody wants y.
template <typename T, int N>
__global__ void __launch_bounds__(256) any_row_norm(const __grid_constant__ RowNorm n, const __grid_constant__ RowNormOperands o) {
  __shared__ float shared[8];
  const std::int64_t row = blockIdx.x, base = row * n.columns;
  const bool there[1] = {true};
  const auto chained = [&](const Chain& chain, const ChainOperands& operands, std::int64_t c, float (&v)[1][N]) {
    apply_chain<T, N, 1, ChainKind::any>(chain, operands, RowPacks<N>(chain, row, static_cast<unsigned>(c), 0), there, v);
  };
  float v[1][N];
  const auto load_x = [&](std::int64_t c) {
    load_floats<T, N>(o.x, base + c, n.x_wide, v[0]);
    if (n.pre.count > 0) chained(n.pre, o.pre, c, v);
  };
  if (o.y) {
    for (std::int64_t c = threadIdx.x * N; c < n.columns; c += 256 * N) {
      load_x(c);
      store_floats<T, N>(o.y, base + c, n.y_wide, v[0]);
    }
    __syncthreads();
  }
  const auto load = [&](std::int64_t c) {
    if (o.y)
      load_floats<T, N>(o.y, base + c, n.y_wide, v[0]);
    else
      load_x(c);
  };
  float shift = 0;
  if (n.centred && !o.moments) {
    load(0);
    shift = v[0][0];
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
      load(c);
#pragma unroll
      for (int i = 0; i < N; ++i) sum += v[0][i] - shift;
    }
    mean = n.centred ? join_threads<256>(sum, shared, Sum()) / count : 0.f;
    for (std::int64_t c = threadIdx.x * N; c < n.columns; c += 256 * N) {
      load(c);
#pragma unroll
      for (int i = 0; i < N; ++i) squares += (v[0][i] - shift - mean) * (v[0][i] - shift - mean);
    }
    scale = rsqrtf(join_threads<256>(squares, shared, Sum()) / count + n.epsilon);
  }
  for (std::int64_t c = threadIdx.x * N; c < n.columns; c += 256 * N) {
    load(c);
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

// Of both chains and the norm between them.
ChainKind kind_of(const RowNorm& n) {
  const auto kind = std::max(n.pre.kind(), n.post.kind());
  const bool wide = n.x_wide || n.weight_wide || n.bias_wide || n.y_wide || n.z_wide;
  return wide ? std::max(kind, ChainKind::wide) : kind;
}

template <typename T, int PACKS, int LANES>
void launch(const RowNorm& n, const RowNormOperands& o, cudaStream_t stream) {
  constexpr int N = Pack<T>::size, rows = LANES ? 128 / LANES : 1;
  const auto threads = LANES ? 128u : static_cast<unsigned>((n.columns / N + PACKS * 32 - 1) / (PACKS * 32) * 32);
  const auto blocks = static_cast<unsigned>((n.rows + rows - 1) / rows);
  switch (kind_of(n)) {
    case ChainKind::plain: return row_norm<T, N, PACKS, LANES, ChainKind::plain><<<blocks, threads, 0, stream>>>(n, o);
    case ChainKind::wide: return row_norm<T, N, PACKS, LANES, ChainKind::wide><<<blocks, threads, 0, stream>>>(n, o);
    case ChainKind::any: return row_norm<T, N, PACKS, LANES, ChainKind::any><<<blocks, threads, 0, stream>>>(n, o);
  }
}

}  // namespace

cudaError_t launch_row_norm(const RowNorm& n, const RowNormOperands& o, DType dtype, cudaStream_t stream) {
  if (n.rows == 0 || n.columns == 0) return cudaSuccess;
  if (n.rows >= std::int64_t{1} << 31 || n.columns >= std::int64_t{1} << 31) return cudaErrorInvalidValue;
  const bool all_aligned = aligned(o.x) && aligned(o.weight) && aligned(o.bias) && aligned(o.y) && aligned(o.z) && o.pre.aligned() && o.post.aligned();
  if (const auto heads = as_head_norm(n, dtype); heads && all_aligned && !o.y && !o.bias) return launch_head_norm(*heads, o, dtype, stream);
  if (const auto modulated = as_modulated_norm(n, dtype); modulated && all_aligned) return launch_modulated_norm(*modulated, o, dtype, stream);
  const bool known = with_real(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int N = Pack<T>::size;
    const std::int64_t packs = n.columns / N;
    const bool fits = all_aligned && n.columns % N == 0 && n.pre.packs_of(N) && n.post.packs_of(N);
    // A pack a thread, for the registers' sake, as long as few rows fill a multiprocessor; what is not plain takes more of them.
    const int most = kind_of(n) == ChainKind::plain ? 1024 : 512;
    if (fits && packs <= 16) launch<T, 1, 16>(n, o, stream);
    else if (fits && packs <= 32) launch<T, 1, 32>(n, o, stream);
    else if (fits && packs <= 64) launch<T, 2, 32>(n, o, stream);
    else if (fits && packs <= most) launch<T, 1, 0>(n, o, stream);
    else if (fits && packs <= 1024) launch<T, 2, 0>(n, o, stream);
    else if (fits && packs <= 2048) launch<T, 4, 0>(n, o, stream);
    else if (n.columns % 2 == 0 && (n.pre.pairs() || n.post.pairs())) any_row_norm<T, 2><<<static_cast<unsigned>(n.rows), 256, 0, stream>>>(n, o);
    else any_row_norm<T, 1><<<static_cast<unsigned>(n.rows), 256, 0, stream>>>(n, o);
  });
  return known ? cudaGetLastError() : cudaErrorInvalidValue;
}

}  // namespace comfytp::backend::cuda
