// Elements of every dtype in device code, and the dispatch from a DType to a type. For .cu files alone.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <algorithm>
#include <cstdint>

#include "base/dtype.h"

namespace comfytp::backend::cuda {

// ---- conversion through float; integers that a float cannot hold go through double where `double` is asked for
template <typename T>
__device__ __forceinline__ float to_float(T v) { return static_cast<float>(v); }
template <>
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
template <>
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

template <typename T>
__device__ __forceinline__ T from_float(float v) { return static_cast<T>(v); }
template <>
__device__ __forceinline__ __half from_float(float v) { return __float2half_rn(v); }
template <>
__device__ __forceinline__ __nv_bfloat16 from_float(float v) { return __float2bfloat16_rn(v); }

/// Neighbours in memory that are read and written together.
template <typename T, int N>
struct alignas(N * sizeof(T)) Elements {
  static constexpr int size = N;
  T v[N];
};
/// 16 bytes of elements.
template <typename T>
using Pack = Elements<T, 16 / sizeof(T)>;
template <typename T>
__device__ __forceinline__ Pack<T> load_pack(const T* p) {
  Pack<T> pack;
  *reinterpret_cast<uint4*>(&pack) = *reinterpret_cast<const uint4*>(p);
  return pack;
}
template <typename T>
__device__ __forceinline__ void store_pack(T* p, const Pack<T>& pack) {
  *reinterpret_cast<uint4*>(p) = *reinterpret_cast<const uint4*>(&pack);
}

/// Packs may begin at p; null is as good.
__host__ __device__ inline bool aligned(const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; }

/// Blocks that the current device runs side by side when every multiprocessor takes `each`.
inline std::int64_t blocks_at_once(int each) {
  int device = 0, multiprocessors = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  return std::int64_t{each} * multiprocessors;
}

/// Blocks of `threads` for a kernel whose threads go through `count` things in turn: enough for all, but no more than `each` a multiprocessor.
inline int blocks_for(std::int64_t count, int threads, int each) {
  return static_cast<int>(std::min((count + threads - 1) / threads, blocks_at_once(each)));
}

/// Of element `i` of a tensor, counted row-major: dimensions are outermost first.
template <typename Size, typename Index>
__device__ __forceinline__ std::int64_t offset_in(int rank, const Size* size, const std::int64_t* stride, Index i) {
  std::int64_t offset = 0;
  for (int d = rank - 1; d > 0; --d) {
    const Index q = i / size[d];
    offset += (i - q * size[d]) * stride[d];
    i = q;
  }
  return rank > 0 ? offset + i * stride[0] : 0;
}

template <typename T>
struct TypeTag { using type = T; };

/// Calls `body(TypeTag<T>)` for a dtype that kernels compute in. Returns false for any other.
template <typename Body>
bool with_real(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::f32: body(TypeTag<float>()); return true;
    case DType::f16: body(TypeTag<__half>()); return true;
    case DType::bf16: body(TypeTag<__nv_bfloat16>()); return true;
    default: return false;
  }
}

/// The same for every dtype.
template <typename Body>
void with_any(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::f64: return body(TypeTag<double>());
    case DType::f32: return body(TypeTag<float>());
    case DType::f16: return body(TypeTag<__half>());
    case DType::bf16: return body(TypeTag<__nv_bfloat16>());
    case DType::f8_e4m3: return body(TypeTag<__nv_fp8_e4m3>());
    case DType::f8_e5m2: return body(TypeTag<__nv_fp8_e5m2>());
    case DType::i64: return body(TypeTag<std::int64_t>());
    case DType::i32: return body(TypeTag<std::int32_t>());
    case DType::i16: return body(TypeTag<std::int16_t>());
    case DType::i8: return body(TypeTag<std::int8_t>());
    case DType::u8: return body(TypeTag<std::uint8_t>());
    case DType::boolean: return body(TypeTag<bool>());
    case DType::u64: return body(TypeTag<std::uint64_t>());
    case DType::u32: return body(TypeTag<std::uint32_t>());
    case DType::u16: return body(TypeTag<std::uint16_t>());
  }
}

}  // namespace comfytp::backend::cuda
