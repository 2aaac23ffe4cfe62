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
  return x * sigmoid_of(1.59576912160573072f * (x + 0.044715f * x * x * x));  // half of 1 + tanh is a sigmoid of twice as much
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

/// N elements of memory as floats: 16 bytes at a time where they are as many, and then aligned to that.
template <typename T, int N>
__device__ __forceinline__ void load_floats(const T* p, float (&v)[N]) {
  constexpr int each = Pack<T>::size;
  if constexpr (N % each == 0) {
#pragma unroll
    for (int k = 0; k < N; k += each) {
      const auto pack = load_pack(p + k);
#pragma unroll
      for (int i = 0; i < each; ++i) v[k + i] = to_float(pack.v[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = to_float(p[i]);
  }
}
template <typename T, int N>
__device__ __forceinline__ void store_floats(T* p, const float (&v)[N]) {
  constexpr int each = Pack<T>::size;
  if constexpr (N % each == 0) {
#pragma unroll
    for (int k = 0; k < N; k += each) {
      Pack<T> pack;
#pragma unroll
      for (int i = 0; i < each; ++i) pack.v[i] = from_float<T>(v[k + i]);
      store_pack(p + k, pack);
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) p[i] = from_float<T>(v[i]);
  }
}

/// The same from element `at` on of T, or where `wide` of f32.
template <typename T, int N>
__device__ __forceinline__ void load_floats(const void* p, std::int64_t at, bool wide, float (&v)[N]) {
  if (wide)
    load_floats<float, N>(static_cast<const float*>(p) + at, v);
  else
    load_floats<T, N>(static_cast<const T*>(p) + at, v);
}
template <typename T, int N>
__device__ __forceinline__ void store_floats(void* p, std::int64_t at, bool wide, const float (&v)[N]) {
  if (wide)
    store_floats<float, N>(static_cast<float*>(p) + at, v);
  else
    store_floats<T, N>(static_cast<T*>(p) + at, v);
}

/// Neighbours of `v` turn by the angles whose cosines and sines begin at element `at`; N is even.
template <typename T, int N>
__device__ __forceinline__ void apply_rope(const void* cosines, const void* sines, std::int64_t at, bool wide, bool halved, float (&v)[N]) {
  float c[N], s[N];
  if (halved) {
    float half[N / 2];
    load_floats<T, N / 2>(cosines, at, wide, half);
#pragma unroll
    for (int i = 0; i < N; ++i) c[i] = half[i / 2];
    load_floats<T, N / 2>(sines, at, wide, half);
#pragma unroll
    for (int i = 0; i < N; ++i) s[i] = half[i / 2];
  } else {
    load_floats<T, N>(cosines, at, wide, c);
    load_floats<T, N>(sines, at, wide, s);
  }
#pragma unroll
  for (int i = 0; i < N; i += 2) {
    const float x0 = v[i], x1 = v[i + 1];
    v[i] = x0 * c[i] - x1 * s[i];
    v[i + 1] = x1 * c[i + 1] + x0 * s[i + 1];
  }
}

/// `v` holds M packs of N neighbours along the innermost dimension; `at.offset(chain, step, m)` tells where a step's operand begins for
/// a pack, in its elements. Packs that are not `there` are left alone. All packs' operands of a step are on their way before the first is used.
template <typename T, int N, int M, ChainKind KIND, typename Index>
__device__ __forceinline__ void apply_chain(const Chain& chain, const ChainOperands& operands, const Index& at, const bool (&there)[M], float (&v)[M][N]) {
  for (int s = 0; s < chain.count; ++s) {
    const ChainStep& step = chain.steps[s];
    const StepKind kind = step.kind;
    if (step.operand < 0) {
#pragma unroll
      for (int m = 0; m < M; ++m) apply_activation<N>(kind, v[m]);
      continue;
    }
    const void* from = operands.at[step.operand];
    if constexpr (KIND == ChainKind::any && N > 1) {
      if (kind == StepKind::rope) {
#pragma unroll
        for (int m = 0; m < M; ++m)
          if (there[m]) apply_rope<T, N>(from, operands.at[step.operand + 1], at.offset(chain, step, m), step.wide, step.halved, v[m]);
        continue;
      }
    }
    const bool single = KIND == ChainKind::any && N > 1 && step.stride[chain.dims - 1] == 0;
    float o[M][N];
#pragma unroll
    for (int m = 0; m < M; ++m) {
      if (!there[m]) continue;
      const std::int64_t offset = at.offset(chain, step, m);
      if (single) {
        float all[1];
        load_floats<T, 1>(from, offset, step.wide, all);
#pragma unroll
        for (int i = 0; i < N; ++i) o[m][i] = all[0];
      } else if (KIND == ChainKind::any && N == 2 && step.stride[chain.dims - 1] != 1) {  // two at a time for another step's sake: these are no neighbours
#pragma unroll
        for (int i = 0; i < N; ++i) {
          float one[1];
          load_floats<T, 1>(from, offset + i * step.stride[chain.dims - 1], step.wide, one);
          o[m][i] = one[0];
        }
      } else {
        load_floats<T, N>(from, offset, KIND != ChainKind::plain && step.wide, o[m]);
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

/// Where a pack that begins with element `i` stands in a chain's value, which has less than 2^32 elements.
struct PackIndex {
  unsigned index[kChainDims];
  __device__ __forceinline__ PackIndex(const Chain& chain, unsigned i) {
#pragma unroll
    for (int d = kChainDims - 1; d > 0; --d) {
      index[d] = 0;
      if (d >= chain.dims) continue;
      const unsigned size = static_cast<unsigned>(chain.size[d]), q = i / size;
      index[d] = i - q * size;
      i = q;
    }
    index[0] = i;
  }
  __device__ __forceinline__ std::int64_t offset(const Chain& chain, const ChainStep& step, int) const {
    std::int64_t offset = 0;
#pragma unroll
    for (int d = 0; d < kChainDims; ++d)  // indices behind the last dimension are 0
      offset += (step.halved && d == chain.dims - 1 ? index[d] / 2 : index[d]) * step.stride[d];
    return offset;
  }
};

}  // namespace comfytp::backend::cuda
