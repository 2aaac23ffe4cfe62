// One kernel a rank and collective.
//
// Rounds are counted by `epoch`, which the kernels count on themselves in device memory, so that they can be recorded and replayed.
// Round e stages in half e % 2. Its last use was round e-2, and nobody reads that any more: this rank has seen its peers' flags of
// round e-1, of every block that this took part in it, and a peer's block sets that flag behind its reads of round e-2 (in the same
// kernel), or in a later kernel than those, which the stream has not begun before they were done. Blocks that a kernel does not have are
// counted on as well: all blocks of a group are always in the same half.
//
// A peer may be one round ahead, never two, so a flag is there when it is e or e+1.
#include "backend/cuda/elements.cuh"
#include "comm/cuda/exchange.h"

namespace comfytp::comm::cuda {
namespace {

using backend::cuda::from_float;
using backend::cuda::Pack;
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

// From staging, which others write: never from a cache that does not know.
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
__device__ __forceinline__ std::int64_t offset_of(const Strided& v, std::uint32_t i) {
  std::int64_t offset = 0;
  for (int d = v.dims - 1; d > 0; --d) {
    const std::uint32_t q = i / v.size[d];
    offset += (i - q * v.size[d]) * v.stride[d];
    i = q;
  }
  return offset + i * v.stride[0];
}

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

// `bytes` bytes of v from byte `lo` on, into staging.
__device__ void stage(const Strided& v, std::int64_t lo, std::uint32_t bytes, char* to) {
  with_word(v.word, [&](auto tag) {
    using W = decltype(tag);
    const W* from = reinterpret_cast<const W*>(v.data);
    const std::uint32_t first = v.begin + static_cast<std::uint32_t>(lo / sizeof(W)), words = bytes / sizeof(W);
    for (std::uint32_t i = threadIdx.x; i < words; i += kThreads * kAhead) {
      W x[kAhead];
#pragma unroll
      for (int k = 0; k < kAhead; ++k)
        if (i + k * kThreads < words) x[k] = from[offset_of(v, first + i + k * kThreads)];
#pragma unroll
      for (int k = 0; k < kAhead; ++k)
        if (i + k * kThreads < words) reinterpret_cast<W*>(to)[i + k * kThreads] = x[k];
    }
    const char* rest = reinterpret_cast<const char*>(from + first);
    for (std::uint32_t i = words * sizeof(W) + threadIdx.x; i < bytes; i += kThreads) to[i] = rest[i];
  });
}

// The way back.
__device__ void unstage(const char* from, const Strided& v, std::int64_t lo, std::uint32_t bytes) {
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
    for (std::uint32_t i = me; i < words; i += threads) to[offset_of(b, i)] = from[offset_of(a, i)];
    for (std::int64_t i = std::int64_t{words} * sizeof(W) + me; i < a.bytes; i += threads) b.data[i] = a.data[i];
  });
}

// The sum of `bytes` bytes at `at` of all ranks' staging, in the order of the ranks. Hands on 16 bytes (by their number) where `packed`,
// and single elements.
template <typename T, typename StorePack, typename StoreOne>
__device__ void sum_staged(const World& w, std::int64_t at, std::uint32_t bytes, bool packed, const StorePack& store_pack, const StoreOne& store_one) {
  constexpr int kSize = Pack<T>::size;
  const std::uint32_t packs = packed ? bytes / 16 : 0;
  for (std::uint32_t i = threadIdx.x; i < packs; i += kThreads * kAhead) {
    float total[kAhead][kSize];
    const auto add = [&](const uint4& bits, float* sum, bool first) {
      Pack<T> x;
      *reinterpret_cast<uint4*>(&x) = bits;
#pragma unroll
      for (int j = 0; j < kSize; ++j) sum[j] = first ? to_float(x.v[j]) : sum[j] + to_float(x.v[j]);
    };
    for (int r = 0; r < w.ranks; r += 2) {  // two ranks' loads at once
      const bool two = r + 1 < w.ranks;
      const auto* from = reinterpret_cast<const uint4*>(w.staging[r] + at);
      const auto* then = reinterpret_cast<const uint4*>(w.staging[two ? r + 1 : r] + at);
      uint4 x[kAhead], y[kAhead];
#pragma unroll
      for (int k = 0; k < kAhead; ++k)
        if (i + k * kThreads < packs) {
          x[k] = load_staged(from + i + k * kThreads);
          if (two) y[k] = load_staged(then + i + k * kThreads);
        }
#pragma unroll
      for (int k = 0; k < kAhead; ++k)
        if (i + k * kThreads < packs) {
          add(x[k], total[k], r == 0);
          if (two) add(y[k], total[k], false);
        }
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k)
      if (i + k * kThreads < packs) {
        Pack<T> sum;
#pragma unroll
        for (int j = 0; j < kSize; ++j) sum.v[j] = from_float<T>(total[k][j]);
        store_pack(i + k * kThreads, sum);
      }
  }
  for (std::uint32_t i = packs * kSize + threadIdx.x; i < bytes / sizeof(T); i += kThreads) {
    float sum = staged_float<T>(w.staging[0] + at + i * sizeof(T));
    for (int r = 1; r < w.ranks; ++r) sum += staged_float<T>(w.staging[r] + at + i * sizeof(T));
    store_one(i, from_float<T>(sum));
  }
}

__device__ __forceinline__ int flag_of(int phase, int rank) { return (phase * kBlocks + static_cast<int>(blockIdx.x)) * kMaxRanks + rank; }

// Tells the peers that all threads' writes to staging are done.
__device__ void signal(const World& w, int phase, std::uint32_t epoch) {
  __syncthreads();
  const int peer = static_cast<int>(threadIdx.x);
  if (peer < w.ranks && peer != w.rank) store_release(w.flags[peer] + flag_of(phase, w.rank), epoch);
}

// False on every thread when a peer did not come or the host wants no more.
__device__ bool wait(const World& w, int phase, std::uint32_t epoch, std::uint32_t op) {
  const int peer = static_cast<int>(threadIdx.x);
  bool failed = false;
  if (peer < w.ranks && peer != w.rank) {
    const std::uint32_t* flag = w.flags[w.rank] + flag_of(phase, peer);
    std::uint64_t begin = 0;
    for (std::uint32_t polls = 1; load_acquire(flag) - epoch > 1; ++polls) {
      if (polls % 64 != 0) continue;  // the host's memory is far away
      const std::uint64_t now = nanoseconds();
      if (begin == 0) begin = now;
      const bool aborted = *static_cast<volatile std::uint32_t*>(&w.control->abort) != 0;
      failed = aborted || now - begin > w.timeout_ns;
      if (failed) {
        if (atomicExch(&w.local->failed, 1u) == 0) {
          *static_cast<volatile std::uint32_t*>(&w.control->error) =
              fault(aborted ? Fault::aborted : Fault::timeout, static_cast<std::uint32_t>(peer), op);
          __threadfence_system();
        }
        break;
      }
      failed = *static_cast<volatile std::uint32_t*>(&w.local->failed) != 0;
      if (failed) break;
      __nanosleep(64);
    }
  }
  return __syncthreads_or(failed) == 0;
}

// T is the type that is summed, or char where elements only move.
template <typename T>
__global__ void __launch_bounds__(kThreads) exchange(const __grid_constant__ Exchange x) {
  const World& w = x.world;
  const int block = static_cast<int>(blockIdx.x);
  if (__syncthreads_or(*static_cast<volatile std::uint32_t*>(&w.local->failed) != 0)) return;  // until the host has put things right
  const std::uint32_t before = *static_cast<volatile std::uint32_t*>(&w.local->epoch[block]);
  for (int round = 0; round < x.rounds; ++round) {
    const std::uint32_t epoch = before + 1 + static_cast<std::uint32_t>(round);
    const std::int64_t region = (epoch & 1) * kHalf + std::int64_t{block} * kRegion;
    const std::int64_t lo = (std::int64_t{round} * gridDim.x + block) * x.chunk;
    const auto bytes_of = [&](const Strided& v) {
      return static_cast<std::uint32_t>(v.bytes <= lo ? 0 : v.bytes - lo < x.chunk ? v.bytes - lo : x.chunk);
    };
    for (int s = 0; s < x.segments; ++s) {
      const std::uint32_t bytes = bytes_of(x.give[s]);
      if (bytes) stage(x.give[s], lo, bytes, w.staging[w.rank] + region + std::int64_t{s} * x.chunk);
    }
    signal(w, 0, epoch);
    if (round == 0 && x.own_from.bytes) copy(x.own_from, x.own_to);
    if (!wait(w, 0, epoch, x.op)) return;
    const std::int64_t at = region + std::int64_t{x.segment} * x.chunk;
    if constexpr (std::is_same_v<T, char>) {
      for (int i = 1; i < w.ranks; ++i) {
        const int r = (w.rank + i) % w.ranks;  // so that not all read from one
        const std::uint32_t bytes = bytes_of(x.take[r]);
        if (bytes) unstage(w.staging[r] + at, x.take[r], lo, bytes);
      }
    } else if (x.kind == Kind::sum) {
      const Strided& v = x.take[0];
      const std::uint32_t bytes = bytes_of(v), first = v.begin + static_cast<std::uint32_t>(lo / v.word);
      const bool packed = v.word == 16;
      if (bytes)
        sum_staged<T>(
            w, at, bytes, packed, [&](std::uint32_t i, const Pack<T>& sum) { reinterpret_cast<Pack<T>*>(v.data)[offset_of(v, first + i)] = sum; },
            [&](std::uint32_t i, T sum) {
              // Behind the last whole 16 bytes of what is dense, or anywhere.
              reinterpret_cast<T*>(v.data)[packed ? std::int64_t{first} * Pack<T>::size + i : offset_of(v, first + i)] = sum;
            });
    } else {
      // Nobody else reads this rank's own segment of its own staging: the sum takes its place.
      const std::uint32_t mine = bytes_of(x.take[w.rank]);
      char* to = w.staging[w.rank] + at;
      if (mine)
        sum_staged<T>(
            w, at, mine, true, [&](std::uint32_t i, const Pack<T>& sum) { reinterpret_cast<Pack<T>*>(to)[i] = sum; },
            [&](std::uint32_t i, T sum) { reinterpret_cast<T*>(to)[i] = sum; });
      signal(w, 1, epoch);
      if (!wait(w, 1, epoch, x.op)) return;
      for (int i = 0; i < w.ranks; ++i) {
        const int r = (w.rank + i) % w.ranks;
        const std::uint32_t bytes = bytes_of(x.take[r]);
        if (bytes) unstage(w.staging[r] + region + std::int64_t{r} * x.chunk, x.take[r], lo, bytes);
      }
    }
  }
  const auto after = before + static_cast<std::uint32_t>(x.rounds);
  if (threadIdx.x == 0) w.local->epoch[block] = after;
  if (block == 0)
    for (int b = static_cast<int>(gridDim.x + threadIdx.x); b < kBlocks; b += kThreads) w.local->epoch[b] = after;
}

}  // namespace

cudaError_t load_kernels() {
  cudaFuncAttributes attributes;
  cudaError_t status = cudaSuccess;
  for (auto* kernel : {&exchange<char>, &exchange<float>, &exchange<__half>, &exchange<__nv_bfloat16>})
    if (status == cudaSuccess) status = cudaFuncGetAttributes(&attributes, kernel);
  return status;
}

cudaError_t launch(const Exchange& x, cudaStream_t stream) {
  const auto start = [&](auto* kernel) { kernel<<<x.blocks, kThreads, 0, stream>>>(x); };
  if (x.kind == Kind::move)
    start(&exchange<char>);
  else if (x.dtype == DType::f32)
    start(&exchange<float>);
  else if (x.dtype == DType::f16)
    start(&exchange<__half>);
  else if (x.dtype == DType::bf16)
    start(&exchange<__nv_bfloat16>);
  else
    return cudaErrorInvalidValue;
  return cudaGetLastError();
}

}  // namespace comfytp::comm::cuda
