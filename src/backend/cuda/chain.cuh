// Applies a chain to values in registers. For .cu files alone.
#pragma once

#include "backend/cuda/chain.h"
#include "backend/cuda/elements.cuh"

namespace comfytp::backend::cuda {

// Within 2 units of the last place: an exact division would cost more than all else that a pass does.
__device__ __forceinline__ float sigmoid_of(float x) { return __fdividef(1.f, 1.f + __expf(-x)); }
__device__ __forceinline__ float silu_of(float x) { return x * sigmoid_of(x); }
/// x times the normal distribution, whose tail is exp(-x^2 / 2) times a polynomial in 1 / (1 + p |x|) within 8e-8 (Abramowitz and Stegun 1964,
/// 7.1.26); erff() takes thrice as long, which a pass and the end of a matrix product cannot hide.
__device__ __forceinline__ float gelu_of(float x) {
  const float size = fminf(fabsf(x), 30.f);  // infinity times nothing would be no number
  const float t = __fdividef(1.f, 1.f + 0.23164189f * size);
  const float tail = t * (0.12741484f + t * (-0.14224836f + t * (0.71070687f + t * (-0.72657602f + t * 0.53070271f))));
  return 0.5f * (x + fabsf(x)) - size * tail * __expf(-0.5f * size * size);
}
__device__ __forceinline__ float gelu_tanh_of(float x) {
  return 0.5f * x * (1.f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
}

template <int N>
__device__ __forceinline__ void apply_activation(StepKind kind, float (&v)[N]) {
  switch (kind) {
#define COMFYTP_STEP(name, expression)     \
  case StepKind::name:                     \
    _Pragma("unroll") for (int i = 0; i < N; ++i) { \
      const float x = v[i];                \
      v[i] = (expression);                 \
    }                                      \
    break;
    COMFYTP_STEP(silu, silu_of(x))
    COMFYTP_STEP(gelu, gelu_of(x))
    COMFYTP_STEP(gelu_tanh, gelu_tanh_of(x))
    COMFYTP_STEP(sigmoid, sigmoid_of(x))
    COMFYTP_STEP(tanh, tanhf(x))
    COMFYTP_STEP(relu, x < 0.f ? 0.f : x)  // of no number none
#undef COMFYTP_STEP
    default: break;
  }
}

/// N elements of memory as floats; N is 1 or a Pack's size.
template <typename T, int N>
__device__ __forceinline__ void load_floats(const T* p, float (&v)[N]) {
  if constexpr (N == 1) {
    v[0] = to_float(*p);
  } else {
    static_assert(N == Pack<T>::size);
    const auto pack = load_pack(p);
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = to_float(pack.v[i]);
  }
}
template <typename T, int N>
__device__ __forceinline__ void store_floats(T* p, const float (&v)[N]) {
  if constexpr (N == 1) {
    *p = from_float<T>(v[0]);
  } else {
    Pack<T> pack;
#pragma unroll
    for (int i = 0; i < N; ++i) pack.v[i] = from_float<T>(v[i]);
    store_pack(p, pack);
  }
}

/// `v` holds M packs of N neighbours along the innermost dimension, the first of a pack at `at` (its index in each of the chain's
/// dimensions); packs that are not `there` are left alone. All packs' operands of a step are on their way before the first is used.
template <typename T, int N, int M>
__device__ __forceinline__ void apply_chain(const Chain& chain, const ChainOperands& operands, const unsigned (&at)[M][kChainDims], const bool (&there)[M],
                                            float (&v)[M][N]) {
  for (int s = 0; s < chain.count; ++s) {
    const ChainStep& step = chain.steps[s];
    const StepKind kind = step.kind;
    if (step.operand < 0) {
#pragma unroll
      for (int m = 0; m < M; ++m) apply_activation<N>(kind, v[m]);
      continue;
    }
    const T* from = static_cast<const T*>(operands.at[step.operand]);
    const bool single = N > 1 && step.stride[chain.dims - 1] == 0;
    float o[M][N];
#pragma unroll
    for (int m = 0; m < M; ++m) {
      if (!there[m]) continue;
      std::int64_t offset = 0;
#pragma unroll
      for (int d = 0; d < kChainDims; ++d) offset += at[m][d] * step.stride[d];  // indices behind the last dimension are 0
      if (single) {
        const float all = to_float(from[offset]);
#pragma unroll
        for (int i = 0; i < N; ++i) o[m][i] = all;
      } else {
        load_floats<T, N>(from + offset, o[m]);
      }
    }
#pragma unroll
    for (int m = 0; m < M; ++m) {
      if (!there[m]) continue;
      if (kind == StepKind::add) {
#pragma unroll
        for (int i = 0; i < N; ++i) v[m][i] += o[m][i];
      } else if (kind == StepKind::mul) {
#pragma unroll
        for (int i = 0; i < N; ++i) v[m][i] *= o[m][i];
      } else {
#pragma unroll
        for (int i = 0; i < N; ++i) v[m][i] *= 1.f + o[m][i];
      }
    }
  }
}

/// The index in every dimension of element `i` of a chain's value, which has less than 2^32 of them.
__device__ __forceinline__ void chain_index(const Chain& chain, unsigned i, unsigned (&at)[kChainDims]) {
#pragma unroll
  for (int d = kChainDims - 1; d > 0; --d) {
    at[d] = 0;
    if (d >= chain.dims) continue;
    const unsigned size = static_cast<unsigned>(chain.size[d]), q = i / size;
    at[d] = i - q * size;
    i = q;
  }
  at[0] = i;
}

}  // namespace comfytp::backend::cuda
