// How a block moves bytes between a rank's tensors and what it exchanges. For exchange.cu alone.
#pragma once

#include "backend/cuda/elements.cuh"
#include "comm/cuda/exchange.h"

namespace comfytp::comm::cuda {
namespace {

using backend::cuda::offset_in;
using backend::cuda::to_float;

constexpr int kAhead = 4;  // loads in flight a thread

__device__ __forceinline__ std::uint32_t load_acquire(const std::uint32_t* p) {
  std::uint32_t v;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}

__device__ __forceinline__ void store_release(std::uint32_t* p, std::uint32_t v) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}

__device__ __forceinline__ std::uint64_t nanoseconds() {
  std::uint64_t t;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
  return t;
}

// What others write: never from a cache that does not know.
template <typename W>
__device__ __forceinline__ W load_staged(const W* p) {
  return *const_cast<const volatile W*>(p);
}
template <>
__device__ __forceinline__ uint4 load_staged(const uint4* p) {
  uint4 v;
  asm volatile("ld.volatile.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
  return v;
}
template <typename T>
__device__ __forceinline__ float staged_float(const char* p) {
  if constexpr (sizeof(T) == 4) {
    return load_staged(reinterpret_cast<const float*>(p));
  } else {
    const std::uint16_t bits = load_staged(reinterpret_cast<const std::uint16_t*>(p));
    T v;
    memcpy(&v, &bits, sizeof(T));
    return to_float(v);
  }
}

// In words from v.data.
__device__ __forceinline__ std::int64_t offset_of(const Strided& v, std::uint32_t i) { return offset_in(v.dims, v.size, v.stride, i); }

template <typename Body>
__device__ __forceinline__ void with_word(int bytes, const Body& body) {
  switch (bytes) {
    case 16: return body(uint4{});
    case 8: return body(std::uint64_t{});
    case 4: return body(std::uint32_t{});
    case 2: return body(std::uint16_t{});
    default: return body(std::uint8_t{});
  }
}

// Where in a region rank `to` finds what `from` gives it, at first and then of the sum. A peer's own segment of shared memory is free for
// the sum: nobody is given that.
__device__ __forceinline__ std::int64_t place(const Exchange& x, int phase, int from, int to) {
  if (!x.world.shared) return std::int64_t{phase} * x.chunk;
  return phase ? std::int64_t{from} * x.chunk : x.segments > 1 ? std::int64_t{to} * x.chunk : 0;
}

// The peers [first, last) to whom the same is given, all but this rank itself; of memory that they share, one of them.
struct Readers {
  int first, last;
};
__device__ __forceinline__ Readers all_readers(const World& w) {
  const int one = w.rank == 0 ? 1 : 0;
  return w.ranks == 1 ? Readers{0, 0} : w.shared ? Readers{one, one + 1} : Readers{0, w.ranks};
}

// `bytes` bytes of v from byte `lo` on, to where the readers find it.
__device__ void give(const World& w, const Strided& v, std::int64_t lo, std::uint32_t bytes, Readers readers, std::int64_t at) {
  with_word(v.word, [&](auto tag) {
    using W = decltype(tag);
    const W* from = reinterpret_cast<const W*>(v.data);
    const std::uint32_t first = v.begin + static_cast<std::uint32_t>(lo / sizeof(W)), words = bytes / sizeof(W);
    for (std::uint32_t i = threadIdx.x; i < words; i += kThreads * kAhead) {
      W x[kAhead];
#pragma unroll
      for (int k = 0; k < kAhead; ++k)
        if (i + k * kThreads < words) x[k] = from[offset_of(v, first + i + k * kThreads)];
      for (int r = readers.first; r < readers.last; ++r) {
        if (r == w.rank) continue;
        W* to = reinterpret_cast<W*>(w.out[r] + at);
#pragma unroll
        for (int k = 0; k < kAhead; ++k)
          if (i + k * kThreads < words) to[i + k * kThreads] = x[k];
      }
    }
    const char* rest = reinterpret_cast<const char*>(from + first);
    for (std::uint32_t i = words * sizeof(W) + threadIdx.x; i < bytes; i += kThreads)
      for (int r = readers.first; r < readers.last; ++r)
        if (r != w.rank) w.out[r][at + i] = rest[i];
  });
}

// The way back.
__device__ void take(const char* from, const Strided& v, std::int64_t lo, std::uint32_t bytes) {
  with_word(v.word, [&](auto tag) {
    using W = decltype(tag);
    W* to = reinterpret_cast<W*>(v.data);
    const std::uint32_t first = v.begin + static_cast<std::uint32_t>(lo / sizeof(W)), words = bytes / sizeof(W);
    for (std::uint32_t i = threadIdx.x; i < words; i += kThreads * kAhead) {
      W x[kAhead];
#pragma unroll
      for (int k = 0; k < kAhead; ++k)
        if (i + k * kThreads < words) x[k] = load_staged(reinterpret_cast<const W*>(from) + i + k * kThreads);
#pragma unroll
      for (int k = 0; k < kAhead; ++k)
        if (i + k * kThreads < words) to[offset_of(v, first + i + k * kThreads)] = x[k];
    }
    char* rest = reinterpret_cast<char*>(to + first);
    for (std::uint32_t i = words * sizeof(W) + threadIdx.x; i < bytes; i += kThreads) rest[i] = load_staged(from + i);
  });
}

// By all blocks together.
__device__ void copy(const Strided& a, const Strided& b) {
  with_word(a.word, [&](auto tag) {
    using W = decltype(tag);
    const W* from = reinterpret_cast<const W*>(a.data);
    W* to = reinterpret_cast<W*>(b.data);
    const auto words = static_cast<std::uint32_t>(a.bytes / sizeof(W));
    const std::uint32_t threads = gridDim.x * kThreads, me = blockIdx.x * kThreads + threadIdx.x;
    for (std::uint32_t i = me; i < words; i += threads * kAhead) {
      W v[kAhead];
#pragma unroll
      for (int k = 0; k < kAhead; ++k)
        if (i + k * threads < words) v[k] = from[offset_of(a, i + k * threads)];
#pragma unroll
      for (int k = 0; k < kAhead; ++k)
        if (i + k * threads < words) to[offset_of(b, i + k * threads)] = v[k];
    }
    for (std::int64_t i = std::int64_t{words} * sizeof(W) + me; i < a.bytes; i += threads) b.data[i] = a.data[i];
  });
}

}  // namespace
}  // namespace comfytp::comm::cuda
