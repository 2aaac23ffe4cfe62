// Applies a chain to values in registers. For .cu files alone.
#pragma once

#include "backend/cuda/chain.h"
#include "backend/cuda/elements.cuh"

namespace comfytp::backend::cuda {

__device__ __forceinline__ float sigmoid_of(float x) { return 1.f / (1.f + __expf(-x)); }
__device__ __forceinline__ float silu_of(float x) { return x * sigmoid_of(x); }
__device__ __forceinline__ float gelu_of(float x) { return 0.5f * x * (1.f + erff(x * 0.70710678118654752f)); }
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
    COMFYTP_STEP(relu, fmaxf(x, 0.f))
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

/// `v` holds N neighbours along the innermost dimension, the first at `at` (its index in each of the chain's dimensions).
template <typename T, int N>
__device__ __forceinline__ void apply_chain(const Chain& chain, const ChainOperands& operands, const std::int64_t (&at)[kChainDims], float (&v)[N]) {
  for (int s = 0; s < chain.count; ++s) {
    const ChainStep& step = chain.steps[s];
    if (step.operand < 0) {
      apply_activation<N>(step.kind, v);
      continue;
    }
    std::int64_t offset = 0;
    for (int d = 0; d < chain.dims; ++d) offset += at[d] * step.stride[d];
    const T* p = static_cast<const T*>(operands.at[step.operand]) + offset;
    float o[N];
    if (N > 1 && step.stride[chain.dims - 1] == 0) {
      const float all = to_float(*p);
#pragma unroll
      for (int i = 0; i < N; ++i) o[i] = all;
    } else {
      load_floats<T, N>(p, o);
    }
    const StepKind kind = step.kind;
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = kind == StepKind::add ? v[i] + o[i] : kind == StepKind::mul ? v[i] * o[i] : v[i] * (1.f + o[i]);
  }
}

/// The index in every dimension of element `i` of a chain's value.
__device__ __forceinline__ void chain_index(const Chain& chain, std::int64_t i, std::int64_t (&at)[kChainDims]) {
  if (i < (std::int64_t{1} << 31)) {
    unsigned rest = static_cast<unsigned>(i);
    for (int d = chain.dims - 1; d > 0; --d) {
      const unsigned size = static_cast<unsigned>(chain.size[d]), q = rest / size;
      at[d] = rest - q * size;
      rest = q;
    }
    at[0] = rest;
    return;
  }
  for (int d = chain.dims - 1; d > 0; --d) {
    const std::int64_t q = i / chain.size[d];
    at[d] = i - q * chain.size[d];
    i = q;
  }
  at[0] = i;
}

}  // namespace comfytp::backend::cuda
