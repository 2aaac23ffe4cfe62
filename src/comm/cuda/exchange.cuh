// How a block moves bytes between a rank's tensors and what it exchanges. For exchange.cu alone.
#pragma once

#include "backend/cuda/elements.cuh"
#include "comm/cuda/exchange.h"

namespace comfytp::comm::cuda {
namespace {

using backend::cuda::offset_in;
using backend::cuda::to_float;

constexpr int kFlight = 4;  // loads in flight a thread

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

// RUNS: all tensors of the message are runs of whole 16 bytes (Exchange::runs), as nearly all are, and neither divisions nor other words
// are compiled.
template <bool RUNS>
__device__ __forceinline__ std::int64_t offset_of(const Strided& v, std::uint32_t i) {  // in words from v.data
  return RUNS ? std::int64_t{i} : offset_in(v.dims, v.size, v.stride, i);
}

template <bool RUNS, typename Body>
__device__ __forceinline__ void with_word(int bytes, const Body& body) {
  if constexpr (RUNS) {
    body(uint4{});
  } else {
    switch (bytes) {
      case 16: return body(uint4{});
      case 8: return body(std::uint64_t{});
      case 4: return body(std::uint32_t{});
      case 2: return body(std::uint16_t{});
      default: return body(std::uint8_t{});
    }
  }
}

// store(i, load(i)), with kFlight loads at once, by threads that are `step` apart.
template <typename W, typename Load, typename Store>
__device__ __forceinline__ void each_word(std::uint32_t begin, std::uint32_t words, std::uint32_t step, const Load& load, const Store& store) {
  for (std::uint32_t i = begin; i < words; i += step * kFlight) {
    W x[kFlight] = {};
#pragma unroll
    for (int k = 0; k < kFlight; ++k)
      if (i + k * step < words) x[k] = load(i + k * step);
#pragma unroll
    for (int k = 0; k < kFlight; ++k)
      if (i + k * step < words) store(i + k * step, x[k]);
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

// The two halves of a block, each with a barrier of its own. A thread's number within its half.
__device__ __forceinline__ bool gives() { return threadIdx.x < kGivers; }
__device__ __forceinline__ std::uint32_t giver() { return threadIdx.x; }
__device__ __forceinline__ std::uint32_t taker() { return threadIdx.x - kGivers; }
__device__ __forceinline__ void join_givers() { asm volatile("barrier.cta.sync 1, %0;" ::"n"(kGivers) : "memory"); }
__device__ __forceinline__ void join_takers() { asm volatile("barrier.cta.sync 2, %0;" ::"n"(kTakers) : "memory"); }
__device__ __forceinline__ bool any_taker(bool condition) {
  std::uint32_t any;
  asm volatile(
      "{ .reg .pred p, q; setp.ne.u32 p, %1, 0; barrier.cta.red.or.pred q, 2, %2, p; selp.u32 %0, 1, 0, q; }"
      : "=r"(any)
      : "r"(static_cast<std::uint32_t>(condition)), "n"(kTakers)
      : "memory");
  return any != 0;
}

// `bytes` bytes of v from byte `lo` on, to where the readers find it. By the givers.
template <bool RUNS>
__device__ void give(const World& w, const Strided& v, std::int64_t lo, std::uint32_t bytes, Readers readers, std::int64_t at) {
  with_word<RUNS>(v.word, [&](auto tag) {
    using W = decltype(tag);
    const W* from = reinterpret_cast<const W*>(v.data);
    const std::uint32_t first = v.begin + static_cast<std::uint32_t>(lo / sizeof(W)), words = bytes / sizeof(W);
    for (int r = readers.first; r < readers.last; ++r) {
      if (r == w.rank) continue;
      W* to = reinterpret_cast<W*>(w.out[r] + at);
      each_word<W>(giver(), words, kGivers, [&](std::uint32_t i) { return from[offset_of<RUNS>(v, first + i)]; },
                   [&](std::uint32_t i, const W& x) { to[i] = x; });
      if constexpr (!RUNS) {
        const char* rest = reinterpret_cast<const char*>(from + first);
        for (std::uint32_t i = words * sizeof(W) + giver(); i < bytes; i += kGivers) w.out[r][at + i] = rest[i];
      }
    }
  });
}

// The way back, by the takers.
template <bool RUNS>
__device__ void take(const char* from, const Strided& v, std::int64_t lo, std::uint32_t bytes) {
  with_word<RUNS>(v.word, [&](auto tag) {
    using W = decltype(tag);
    W* to = reinterpret_cast<W*>(v.data);
    const std::uint32_t first = v.begin + static_cast<std::uint32_t>(lo / sizeof(W)), words = bytes / sizeof(W);
    each_word<W>(taker(), words, kTakers, [&](std::uint32_t i) { return load_staged(reinterpret_cast<const W*>(from) + i); },
                 [&](std::uint32_t i, const W& x) { to[offset_of<RUNS>(v, first + i)] = x; });
    if constexpr (!RUNS) {
      char* rest = reinterpret_cast<char*>(to + first);
      for (std::uint32_t i = words * sizeof(W) + taker(); i < bytes; i += kTakers) rest[i] = load_staged(from + i);
    }
  });
}

// By the takers of all blocks together.
template <bool RUNS>
__device__ void copy(const Strided& a, const Strided& b) {
  with_word<RUNS>(a.word, [&](auto tag) {
    using W = decltype(tag);
    const W* from = reinterpret_cast<const W*>(a.data);
    W* to = reinterpret_cast<W*>(b.data);
    const auto words = static_cast<std::uint32_t>(a.bytes / sizeof(W));
    const std::uint32_t threads = gridDim.x * kTakers, me = blockIdx.x * kTakers + taker();
    each_word<W>(me, words, threads, [&](std::uint32_t i) { return from[offset_of<RUNS>(a, a.begin + i)]; },
                 [&](std::uint32_t i, const W& x) { to[offset_of<RUNS>(b, b.begin + i)] = x; });
    if constexpr (!RUNS)
      for (std::int64_t i = std::int64_t{words} * sizeof(W) + me; i < a.bytes; i += threads) b.data[i] = a.data[i];
  });
}

// Has what the threads load first on its way while other things are waited for.
__device__ __forceinline__ void fetch_ahead(const Strided& v, std::int64_t lo, std::uint32_t bytes, std::uint32_t thread, std::uint32_t threads) {
  const char* from = v.data + std::int64_t{v.begin} * v.word + lo;
  for (std::uint32_t i = thread * 128; i < bytes; i += threads * 128) asm volatile("prefetch.global.L1 [%0];" ::"l"(from + i));
}

}  // namespace
}  // namespace comfytp::comm::cuda
