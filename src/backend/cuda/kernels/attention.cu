#include "backend/cuda/kernels/attention.h"

#include "backend/cuda/elements.cuh"

namespace comfytp::backend::cuda {
namespace {

constexpr int kWarps = 4;

// One warp a query. It takes 32 keys at a time, a lane each, keeps the running maximum and sum (Milakov & Gimelshein 2018), and lanes
// share the columns of the values.
template <typename T, int COLUMNS>
__global__ void __launch_bounds__(32 * kWarps) any_attention(const __grid_constant__ AnyAttention a, const T* q, const T* k, const T* v, const void* mask,
                                                             T* out) {
  extern __shared__ float queries[];  // [kWarps][d]
  const std::int64_t query = blockIdx.x * std::int64_t{kWarps} + threadIdx.x / 32, head = blockIdx.y, n = blockIdx.z;
  const int lane = threadIdx.x % 32;
  if (query >= a.queries) return;
  float* mine = queries + (threadIdx.x / 32) * a.d;
  const T* from = q + n * a.q[0] + head * a.q[1] + query * a.q[2];
  for (std::int64_t i = lane; i < a.d; i += 32) mine[i] = to_float(from[i]) * a.scale;
  __syncwarp();
  const std::int64_t group = head / (a.heads / a.groups);
  const T *keys = k + n * a.k[0] + group * a.k[1], *values = v + n * a.v[0] + group * a.v[1];
  const std::int64_t mask_at = n * a.mask_strides[0] + head * a.mask_strides[1] + query * a.mask_strides[2];
  float top = -INFINITY, sum = 0, acc[COLUMNS] = {};
  for (std::int64_t first = 0; first < a.keys; first += 32) {
    const std::int64_t key = first + lane;
    float score = -INFINITY;
    if (key < a.keys) {
      score = 0;
      const T* row = keys + key * a.k[2];
      for (std::int64_t i = 0; i < a.d; ++i) score += mine[i] * to_float(row[i]);
      if (a.mask == AnyAttention::Mask::boolean && !static_cast<const bool*>(mask)[mask_at + key]) score = -INFINITY;
      if (a.mask == AnyAttention::Mask::added) score += to_float(static_cast<const T*>(mask)[mask_at + key]);
    }
    float most = score;
#pragma unroll
    for (int s = 16; s > 0; s /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, s));
    most = fmaxf(most, top);
    if (most == -INFINITY) continue;
    const float p = expf(score - most), shrink = expf(top - most);
    top = most;
    float all = p;
#pragma unroll
    for (int s = 16; s > 0; s /= 2) all += __shfl_xor_sync(~0u, all, s);
    sum = sum * shrink + all;
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) acc[c] *= shrink;
    const int count = static_cast<int>(min(std::int64_t{32}, a.keys - first));
    for (int j = 0; j < count; ++j) {
      const float weight = __shfl_sync(~0u, p, j);
      const T* row = values + (first + j) * a.v[2];
#pragma unroll
      for (int c = 0; c < COLUMNS; ++c)
        if (lane + 32 * c < a.e) acc[c] += weight * to_float(row[lane + 32 * c]);
    }
  }
  T* to = out + n * a.out[0] + head * a.out[1] + query * a.out[2];
#pragma unroll
  for (int c = 0; c < COLUMNS; ++c)
    if (lane + 32 * c < a.e) to[lane + 32 * c] = from_float<T>(sum > 0 ? acc[c] / sum : 0.f);
}

// A block a row.
template <typename T>
__global__ void __launch_bounds__(256) added_mask(std::int64_t keys, const bool* mask, T* added, bool* sees) {
  const bool* row = mask + blockIdx.x * keys;
  bool any = false;
  for (std::int64_t i = threadIdx.x; i < keys; i += 256) any = any || row[i];
  any = __syncthreads_or(any);
  const float nothing = sizeof(T) == 2 && std::is_same_v<T, __half> ? -60000.f : -1e30f;
  for (std::int64_t i = threadIdx.x; i < keys; i += 256) added[blockIdx.x * keys + i] = from_float<T>(any && !row[i] ? nothing : 0.f);
  if (threadIdx.x == 0) sees[blockIdx.x] = any;
}

// A warp a query of a head.
template <typename T>
__global__ void __launch_bounds__(32 * kWarps) clear_unseeing(const __grid_constant__ AnyAttention a, const bool* sees, T* out) {
  const std::int64_t query = blockIdx.x * std::int64_t{kWarps} + threadIdx.x / 32, head = blockIdx.y, n = blockIdx.z;
  if (query >= a.queries || sees[n * a.mask_strides[0] + head * a.mask_strides[1] + query * a.mask_strides[2]]) return;
  T* to = out + n * a.out[0] + head * a.out[1] + query * a.out[2];
  for (std::int64_t i = threadIdx.x % 32; i < a.e; i += 32) to[i] = from_float<T>(0.f);
}

}  // namespace

cudaError_t launch_mask(DType dtype, std::int64_t rows, std::int64_t keys, const void* mask, void* added, bool* sees, cudaStream_t stream) {
  if (rows == 0) return cudaSuccess;
  if (rows >= std::int64_t{1} << 31) return cudaErrorInvalidValue;
  const auto blocks = static_cast<unsigned>(rows);
  const auto* from = static_cast<const bool*>(mask);
  if (dtype == DType::f16) added_mask<<<blocks, 256, 0, stream>>>(keys, from, static_cast<__half*>(added), sees);
  else if (dtype == DType::bf16) added_mask<<<blocks, 256, 0, stream>>>(keys, from, static_cast<__nv_bfloat16*>(added), sees);
  else return cudaErrorInvalidValue;
  return cudaGetLastError();
}

cudaError_t launch_clear_unseeing(const AnyAttention& a, DType dtype, const bool* sees, void* out, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>((a.queries + kWarps - 1) / kWarps), static_cast<unsigned>(a.heads), static_cast<unsigned>(a.n));
  const bool known = with_real(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    clear_unseeing<T><<<grid, 32 * kWarps, 0, stream>>>(a, sees, static_cast<T*>(out));
  });
  return known ? cudaGetLastError() : cudaErrorInvalidValue;
}

cudaError_t launch_any_attention(const AnyAttention& a, DType dtype, const void* q, const void* k, const void* v, const void* mask, void* out,
                                 cudaStream_t stream) {
  if (a.n * a.heads * a.queries * a.e == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>((a.queries + kWarps - 1) / kWarps), static_cast<unsigned>(a.heads), static_cast<unsigned>(a.n));
  const auto bytes = static_cast<std::size_t>(kWarps * a.d) * sizeof(float);
  const bool known = with_real(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto run = [&](auto kernel) {
      kernel<<<grid, 32 * kWarps, bytes, stream>>>(a, static_cast<const T*>(q), static_cast<const T*>(k), static_cast<const T*>(v), mask, static_cast<T*>(out));
    };
    if (a.e <= 64)
      run(any_attention<T, 2>);
    else if (a.e <= 160)
      run(any_attention<T, 5>);
    else
      run(any_attention<T, 16>);
  });
  return known ? cudaGetLastError() : cudaErrorInvalidValue;
}

}  // namespace comfytp::backend::cuda
