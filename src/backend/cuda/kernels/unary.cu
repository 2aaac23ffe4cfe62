#include "backend/cuda/kernels/unary.h"

#include <algorithm>

#include "backend/cuda/chain.cuh"

namespace comfytp::backend::cuda {
namespace {

constexpr int kThreads = 256, kPacks = 2;

#define COMFYTP_UNARY(NAME, VALUE) \
  struct NAME##_function { static __device__ __forceinline__ float of(float x) { return VALUE; } };
COMFYTP_UNARY(silu, silu_of(x))
COMFYTP_UNARY(gelu, gelu_of(x))
COMFYTP_UNARY(gelu_tanh, gelu_tanh_of(x))
COMFYTP_UNARY(sigmoid, sigmoid_of(x))
COMFYTP_UNARY(tanh, tanhf(x))
COMFYTP_UNARY(exp, expf(x))
COMFYTP_UNARY(log, logf(x))
COMFYTP_UNARY(sin, sinf(x))
COMFYTP_UNARY(cos, cosf(x))
COMFYTP_UNARY(sqrt, sqrtf(x))
COMFYTP_UNARY(rsqrt, rsqrtf(x))
COMFYTP_UNARY(relu, x < 0.f ? 0.f : x)
COMFYTP_UNARY(abs, fabsf(x))
COMFYTP_UNARY(neg, -x)
COMFYTP_UNARY(logical_not, x == 0.f ? 1.f : 0.f)
#undef COMFYTP_UNARY

// kPacks packs a thread; the elements behind the last pack go to the first block.
template <typename T, typename F>
__global__ void __launch_bounds__(kThreads) unary(const T* x, T* y, std::int64_t count, bool aligned) {
  constexpr int N = Pack<T>::size;
  const std::int64_t packs = count / N, first = std::int64_t{blockIdx.x} * kThreads * kPacks + threadIdx.x;
  float v[kPacks][N];
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    const std::int64_t pack = first + k * kThreads;
    if (pack >= packs) continue;
    if (aligned) {
      load_floats<T, N>(x + pack * N, v[k]);
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) v[k][i] = to_float(x[pack * N + i]);
    }
  }
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    const std::int64_t pack = first + k * kThreads;
    if (pack >= packs) continue;
#pragma unroll
    for (int i = 0; i < N; ++i) v[k][i] = F::of(v[k][i]);
    if (aligned) {
      store_floats<T, N>(y + pack * N, v[k]);
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) y[pack * N + i] = from_float<T>(v[k][i]);
    }
  }
  const std::int64_t last = packs * N + threadIdx.x;
  if (blockIdx.x == 0 && last < count) y[last] = from_float<T>(F::of(to_float(x[last])));
}

template <typename F>
cudaError_t launch(DType dtype, std::int64_t count, const void* x, void* y, cudaStream_t stream) {
  const bool aligned = (reinterpret_cast<std::uintptr_t>(x) | reinterpret_cast<std::uintptr_t>(y)) % 16 == 0;
  const bool known = with_real(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr std::int64_t kBlock = std::int64_t{kThreads} * kPacks * Pack<T>::size;
    unary<T, F><<<static_cast<unsigned>((count + kBlock - 1) / kBlock), kThreads, 0, stream>>>(static_cast<const T*>(x), static_cast<T*>(y), count, aligned);
  });
  return known ? cudaGetLastError() : cudaErrorInvalidValue;
}

template <typename T>
__global__ void whole_unary(UnaryKind kind, const T* x, T* y, std::int64_t count) {
  for (std::int64_t i = blockIdx.x * std::int64_t{blockDim.x} + threadIdx.x; i < count; i += std::int64_t{gridDim.x} * blockDim.x) {
    const T v = x[i];
    const bool below = std::is_signed_v<T> && !(v > T(0)), change = kind == UnaryKind::neg || below;
    y[i] = kind == UnaryKind::logical_not ? T(v == T(0)) : kind == UnaryKind::relu ? (below ? T(0) : v) : change ? T(-v) : v;
  }
}

cudaError_t launch_whole(UnaryKind kind, DType dtype, std::int64_t count, const void* x, void* y, cudaStream_t stream) {
  if (kind < UnaryKind::relu) return cudaErrorInvalidValue;
  cudaError_t status = cudaErrorInvalidValue;
  with_any(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if constexpr (std::is_integral_v<T>) {
      const int blocks = blocks_for(count, 256, 16);
      whole_unary<T><<<blocks, 256, 0, stream>>>(kind, static_cast<const T*>(x), static_cast<T*>(y), count);
      status = cudaGetLastError();
    }
  });
  return status;
}

}  // namespace

cudaError_t launch_unary(UnaryKind kind, DType dtype, std::int64_t count, const void* x, void* y, cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  if (!is_float(dtype)) return launch_whole(kind, dtype, count, x, y, stream);
  switch (kind) {
#define COMFYTP_UNARY(NAME) \
  case UnaryKind::NAME: return launch<NAME##_function>(dtype, count, x, y, stream);
    COMFYTP_UNARY(silu)
    COMFYTP_UNARY(gelu)
    COMFYTP_UNARY(gelu_tanh)
    COMFYTP_UNARY(sigmoid)
    COMFYTP_UNARY(tanh)
    COMFYTP_UNARY(exp)
    COMFYTP_UNARY(log)
    COMFYTP_UNARY(sin)
    COMFYTP_UNARY(cos)
    COMFYTP_UNARY(sqrt)
    COMFYTP_UNARY(rsqrt)
    COMFYTP_UNARY(relu)
    COMFYTP_UNARY(abs)
    COMFYTP_UNARY(neg)
    COMFYTP_UNARY(logical_not)
#undef COMFYTP_UNARY
  }
  return cudaErrorInvalidValue;
}

}  // namespace comfytp::backend::cuda
