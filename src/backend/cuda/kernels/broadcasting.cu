#include "backend/cuda/kernels/broadcasting.h"

#include <algorithm>
#include <type_traits>

#include "backend/cuda/elements.cuh"

namespace comfytp::backend::cuda {
namespace {

constexpr int kThreads = 256, kPacks = 2;

// What an element is computed as: reals as float, the rest as itself.
template <typename T>
using Value = std::conditional_t<std::is_integral_v<T>, T, float>;
template <typename T>
__device__ __forceinline__ Value<T> value_of(T v) {
  if constexpr (std::is_integral_v<T>) return v;
  else return to_float(v);
}
template <typename T, typename V>
__device__ __forceinline__ T element_of(V v) {
  if constexpr (std::is_same_v<T, V>) return v;
  else return from_float<T>(v);
}

// N elements that lie one behind the other, aligned to their size in all.
template <typename T, int N>
struct alignas(sizeof(T) * N) Few { T v[N]; };
template <int BYTES>
using Word = std::conditional_t<BYTES == 16, uint4, std::conditional_t<BYTES == 8, uint2, std::conditional_t<BYTES == 4, unsigned, unsigned short>>>;
template <typename T, int N>
__device__ __forceinline__ Few<T, N> load_few(const T* p) {
  using W = Word<sizeof(T) * N>;
  Few<T, N> few;
  *reinterpret_cast<W*>(&few) = *reinterpret_cast<const W*>(p);
  return few;
}
template <typename T, int N>
__device__ __forceinline__ void store_few(T* p, const Few<T, N>& few) {
  using W = Word<sizeof(T) * N>;
  *reinterpret_cast<W*>(p) = *reinterpret_cast<const W*>(&few);
}

// Where element i of the result has its operands.
template <int K>
__device__ __forceinline__ void places(const Broadcast& b, std::int64_t i, std::int64_t (&at)[K]) {
  if (b.count < (std::int64_t{1} << 31)) {
    unsigned rest = static_cast<unsigned>(i), place[K] = {};
    for (int d = b.rank - 1; d > 0; --d) {
      const unsigned size = static_cast<unsigned>(b.size[d]), q = rest / size, r = rest - q * size;
#pragma unroll
      for (int k = 0; k < K; ++k) place[k] += r * static_cast<unsigned>(b.stride[k][d]);
      rest = q;
    }
#pragma unroll
    for (int k = 0; k < K; ++k) at[k] = place[k] + rest * static_cast<unsigned>(b.stride[k][0]);
    return;
  }
#pragma unroll
  for (int k = 0; k < K; ++k) at[k] = 0;
  for (int d = b.rank - 1; d > 0; --d) {
    const std::int64_t q = i / b.size[d], r = i - q * b.size[d];
#pragma unroll
    for (int k = 0; k < K; ++k) at[k] += r * b.stride[k][d];
    i = q;
  }
#pragma unroll
  for (int k = 0; k < K; ++k) at[k] += i * b.stride[k][0];
}

// N neighbours along the innermost dimension; `packed`: they lie one behind the other and are aligned.
template <typename T, int N>
__device__ __forceinline__ Few<T, N> load_operand(const T* p, std::int64_t stride, bool packed) {
  Few<T, N> few;
  if constexpr (N == 1) {
    few.v[0] = *p;
  } else if (packed) {
    few = load_few<T, N>(p);
  } else if (stride == 0) {
    const T all = *p;
#pragma unroll
    for (int i = 0; i < N; ++i) few.v[i] = all;
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) few.v[i] = p[i * stride];
  }
  return few;
}
template <typename T, int N>
__device__ __forceinline__ void store_result(T* p, const Few<T, N>& few, bool packed) {
  if constexpr (N == 1) {
    *p = few.v[0];
  } else if (packed) {
    store_few<T, N>(p, few);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) p[i] = few.v[i];
  }
}

struct Add {
  template <typename V> __device__ __forceinline__ V operator()(V a, V b) const { return a + b; }
};
struct Mul {
  template <typename V> __device__ __forceinline__ V operator()(V a, V b) const { return a * b; }
};
struct Pow {
  __device__ __forceinline__ float operator()(float a, float b) const { return powf(a, b); }
};
struct Arithmetic {
  BinaryKind kind;
  __device__ __forceinline__ float operator()(float a, float b) const {
    return kind == BinaryKind::sub ? a - b : kind == BinaryKind::div ? a / b : kind == BinaryKind::maximum ? (a > b ? a : b) : (a < b ? a : b);
  }
};
struct Comparison {
  BinaryKind kind;
  template <typename V>
  __device__ __forceinline__ bool operator()(V a, V b) const {
    switch (kind) {
      case BinaryKind::equal: return a == b;
      case BinaryKind::not_equal: return a != b;
      case BinaryKind::less: return a < b;
      case BinaryKind::less_equal: return a <= b;
      case BinaryKind::greater: return a > b;
      default: return a >= b;
    }
  }
};
struct WholeArithmetic {
  BinaryKind kind;
  template <typename V>
  __device__ __forceinline__ V operator()(V a, V b) const {
    switch (kind) {
      case BinaryKind::add: return static_cast<V>(a + b);
      case BinaryKind::sub: return static_cast<V>(a - b);
      case BinaryKind::mul: return static_cast<V>(a * b);
      case BinaryKind::div: return b == V(0) ? V(0) : static_cast<V>(a / b);
      case BinaryKind::pow: return static_cast<V>(pow(static_cast<double>(a), static_cast<double>(b)));
      case BinaryKind::maximum: return a > b ? a : b;
      default: return a < b ? a : b;
    }
  }
};

template <typename F, typename T, typename Out>
__device__ __forceinline__ Out result(const F& function, T a, T b) {
  return element_of<Out>(function(value_of(a), value_of(b)));
}

// kPacks packs a thread. Elements behind the last pack there are in one dimension alone; they go to the first block.
template <typename T, typename Out, int N, typename F>
__global__ void __launch_bounds__(kThreads) binary(const __grid_constant__ Broadcast b, F function, unsigned packed, const T* x0, const T* x1, Out* y) {
  const std::int64_t packs = b.count / N, first = std::int64_t{blockIdx.x} * kThreads * kPacks + threadIdx.x;
  const int inner = b.rank - 1;
  Few<T, N> v0[kPacks], v1[kPacks];
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    const std::int64_t pack = first + k * kThreads;
    if (pack >= packs) continue;
    std::int64_t at[2];
    places<2>(b, pack * N, at);
    v0[k] = load_operand<T, N>(x0 + at[0], b.stride[0][inner], packed & 1);
    v1[k] = load_operand<T, N>(x1 + at[1], b.stride[1][inner], packed & 2);
  }
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    const std::int64_t pack = first + k * kThreads;
    if (pack >= packs) continue;
    Few<Out, N> r;
#pragma unroll
    for (int i = 0; i < N; ++i) r.v[i] = result<F, T, Out>(function, v0[k].v[i], v1[k].v[i]);
    store_result<Out, N>(y + pack * N, r, packed & 8);
  }
  const std::int64_t last = packs * N + threadIdx.x;
  if (N > 1 && blockIdx.x == 0 && last < b.count) y[last] = result<F, T, Out>(function, x0[last * b.stride[0][0]], x1[last * b.stride[1][0]]);
}

template <typename T, int N>
__global__ void __launch_bounds__(kThreads) where(const __grid_constant__ Broadcast b, unsigned packed, const std::uint8_t* condition, const T* x0,
                                                  const T* x1, T* y) {
  const std::int64_t packs = b.count / N, pack = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int inner = b.rank - 1;
  if (pack < packs) {
    std::int64_t at[3];
    places<3>(b, pack * N, at);
    const auto c = load_operand<std::uint8_t, N>(condition + at[0], b.stride[0][inner], packed & 1);
    const auto v0 = load_operand<T, N>(x0 + at[1], b.stride[1][inner], packed & 2);
    const auto v1 = load_operand<T, N>(x1 + at[2], b.stride[2][inner], packed & 4);
    Few<T, N> r;
#pragma unroll
    for (int i = 0; i < N; ++i) r.v[i] = c.v[i] ? v0.v[i] : v1.v[i];
    store_result<T, N>(y + pack * N, r, packed & 8);
  }
  const std::int64_t last = packs * N + threadIdx.x;
  if (N > 1 && blockIdx.x == 0 && last < b.count)
    y[last] = condition[last * b.stride[0][0]] ? x0[last * b.stride[1][0]] : x1[last * b.stride[2][0]];
}

// The result can be cut into packs of n.
bool packs_of(const Broadcast& b, int n) { return b.rank == 1 || b.size[b.rank - 1] % n == 0; }

// Operand k can be read in packs of n elements of so many bytes.
bool packed_operand(const Broadcast& b, int k, const void* p, int n, int element) {
  bool fits = reinterpret_cast<std::uintptr_t>(p) % static_cast<unsigned>(n * element) == 0 && b.stride[k][b.rank - 1] == 1;
  for (int d = 0; fits && d < b.rank - 1; ++d) fits = b.stride[k][d] % n == 0;
  return fits;
}
bool packed_result(const void* p, int bytes) { return reinterpret_cast<std::uintptr_t>(p) % static_cast<unsigned>(bytes) == 0; }

unsigned blocks_for(std::int64_t packs, int each) { return static_cast<unsigned>(std::max<std::int64_t>(1, (packs + each - 1) / each)); }

template <typename T, typename Out, typename F>
void launch(const Broadcast& b, const F& function, const void* x0, const void* x1, void* y, cudaStream_t stream) {
  const auto *p0 = static_cast<const T*>(x0), *p1 = static_cast<const T*>(x1);
  auto* to = static_cast<Out*>(y);
  if constexpr (!std::is_integral_v<T>) {
    constexpr int N = Pack<T>::size;
    if (packs_of(b, N)) {
      const unsigned packed = packed_operand(b, 0, x0, N, sizeof(T)) | packed_operand(b, 1, x1, N, sizeof(T)) << 1 | packed_result(y, N * sizeof(Out)) << 3;
      binary<T, Out, N, F><<<blocks_for(b.count / N, kThreads * kPacks), kThreads, 0, stream>>>(b, function, packed, p0, p1, to);
      return;
    }
  }
  binary<T, Out, 1, F><<<blocks_for(b.count, kThreads * kPacks), kThreads, 0, stream>>>(b, function, 0, p0, p1, to);
}

template <typename T>
void launch_kind(BinaryKind kind, const Broadcast& b, const void* x0, const void* x1, void* y, cudaStream_t stream) {
  if (kind >= BinaryKind::equal) return launch<T, bool>(b, Comparison{kind}, x0, x1, y, stream);
  if constexpr (std::is_integral_v<T>) {
    launch<T, T>(b, WholeArithmetic{kind}, x0, x1, y, stream);
  } else {
    switch (kind) {
      case BinaryKind::add: return launch<T, T>(b, Add(), x0, x1, y, stream);
      case BinaryKind::mul: return launch<T, T>(b, Mul(), x0, x1, y, stream);
      case BinaryKind::pow: return launch<T, T>(b, Pow(), x0, x1, y, stream);
      default: return launch<T, T>(b, Arithmetic{kind}, x0, x1, y, stream);
    }
  }
}

}  // namespace

cudaError_t launch_binary(BinaryKind kind, DType dtype, const Broadcast& b, const void* x0, const void* x1, void* y, cudaStream_t stream) {
  if (b.count == 0) return cudaSuccess;
  cudaError_t status = cudaErrorInvalidValue;
  const auto body = [&](auto tag) {
    launch_kind<typename decltype(tag)::type>(kind, b, x0, x1, y, stream);
    status = cudaGetLastError();
  };
  if (!with_real(dtype, body)) with_any(dtype, [&](auto tag) {
      if constexpr (std::is_integral_v<typename decltype(tag)::type>) body(tag);
    });
  return status;
}

cudaError_t launch_where(int element, const Broadcast& b, const void* condition, const void* x0, const void* x1, void* y, cudaStream_t stream) {
  if (b.count == 0) return cudaSuccess;
  const auto body = [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int N = Pack<T>::size, size = sizeof(T);
    const auto *c = static_cast<const std::uint8_t*>(condition);
    const auto *p0 = static_cast<const T*>(x0), *p1 = static_cast<const T*>(x1);
    if (packs_of(b, N)) {
      const unsigned packed = packed_operand(b, 0, c, N, 1) | packed_operand(b, 1, x0, N, size) << 1 | packed_operand(b, 2, x1, N, size) << 2 | packed_result(y, 16) << 3;
      where<T, N><<<blocks_for(b.count / N, kThreads), kThreads, 0, stream>>>(b, packed, c, p0, p1, static_cast<T*>(y));
    } else {
      where<T, 1><<<blocks_for(b.count, kThreads), kThreads, 0, stream>>>(b, 0, c, p0, p1, static_cast<T*>(y));
    }
    return cudaGetLastError();
  };
  switch (element) {
    case 1: return body(TypeTag<std::uint8_t>());
    case 2: return body(TypeTag<std::uint16_t>());
    case 4: return body(TypeTag<std::uint32_t>());
    default: return body(TypeTag<std::uint64_t>());
  }
}

}  // namespace comfytp::backend::cuda
