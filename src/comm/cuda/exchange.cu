// One kernel a rank and collective.
//
// Rounds are counted by `epoch`, which the kernels count on themselves in device memory, so that they can be recorded and replayed. The
// givers of a block are up to A = kAhead rounds ahead of its takers: they give for round m when their takers are through with round m-A-1.
//
// Giving for round m writes to buffer m % B of what a peer reads, B = kBuffers, last used in round m-B. Nobody reads that any more: the
// takers of this block have seen the peers' flags of round m-A-1, and a peer's givers set those when its takers were through with round
// m-2A-2; B >= 2A+2. That holds from one kernel to the next as well: a stream does not begin with one before the last is through, and
// blocks that a kernel does not have are counted on, so that all blocks of a group are always in the same round. A sum that is given
// in turn (phase 1 of round m) goes to the same buffer, when the flags of phase 0 of round m have been seen, so when the peers were
// through with m-A-1.
//
// Seen from a rank whose takers wait for round e, a peer may have given for e+2A+1, no more: for that one its takers saw this rank's flag
// of e+A, for which those here were through with e-1. So a flag that is up to B-1 ahead means that round e is there.
#include "comm/cuda/exchange.cuh"

namespace comfytp::comm::cuda {
namespace {

using backend::cuda::from_float;
using backend::cuda::Pack;
using backend::cuda::to_float;

// How far one half of a block is, in shared memory for the other.
struct Progress {
  // That it is through with, and beside that count kStopped when it gave up: the count never falls, so that all threads that ask whether it
  // is enough for their round are told the same, however late.
  std::uint32_t rounds;
  static constexpr std::uint32_t kStopped = 1u << 31;

  __device__ void set(std::uint32_t value) { asm volatile("st.release.cta.shared.u32 [%0], %1;" ::"r"(address()), "r"(value) : "memory"); }
  __device__ std::uint32_t get() const {
    std::uint32_t value;
    asm volatile("ld.acquire.cta.shared.u32 %0, [%1];" : "=r"(value) : "r"(address()) : "memory");
    return value;
  }

 private:
  __device__ std::uint32_t address() const { return static_cast<std::uint32_t>(__cvta_generic_to_shared(&rounds)); }
};

template <typename T>
__device__ __forceinline__ void add(const uint4& bits, float* sum, bool begin) {
  Pack<T> p;
  *reinterpret_cast<uint4*>(&p) = bits;
#pragma unroll
  for (int j = 0; j < Pack<T>::size; ++j) sum[j] = begin ? to_float(p.v[j]) : sum[j] + to_float(p.v[j]);
}

template <typename T>
__device__ __forceinline__ Pack<T> rounded(const float* sum) {
  Pack<T> p;
#pragma unroll
  for (int j = 0; j < Pack<T>::size; ++j) p.v[j] = from_float<T>(sum[j]);
  return p;
}

// Byte `lo` of own_to on becomes the sum of `bytes` bytes of own_from and what the peers gave for it at `at`, in the order of the ranks; also
// given to `readers`.
template <typename T, bool RUNS>
__device__ void sum_given(const Exchange& x, std::int64_t lo, std::int64_t at, std::uint32_t bytes, Readers readers) {
  constexpr int kSize = Pack<T>::size;
  const World& w = x.world;
  const Strided &own = x.own_from, &v = x.own_to;
  const bool packed = RUNS || own.word == 16;
  const auto first_of = [&](const Strided& s) { return s.begin + static_cast<std::uint32_t>(lo / (RUNS ? 16 : s.word)); };
  const std::uint32_t from = first_of(own), to = first_of(v), packs = packed ? bytes / 16 : 0;
  const auto each_reader = [&](const auto& body) {
    for (int r = readers.first; r < readers.last; ++r)
      if (r != w.rank) body(w.out[r] + at + place(x, 1, w.rank, r));
  };
  const auto given = [&](int r) { return w.in[r] + at + place(x, 0, r, w.rank); };
  const auto load = [&](int r, std::uint32_t i) {
    return r == w.rank ? reinterpret_cast<const uint4*>(own.data)[offset_of<RUNS>(own, from + i)]
                       : load_staged(reinterpret_cast<const uint4*>(given(r)) + i);
  };
  constexpr int kAtOnce = RUNS ? 2 : 1;
  for (std::uint32_t i = taker(); i < packs; i += kTakers * kAtOnce) {
    float total[kAtOnce][kSize];
    for (int r = 0; r < w.ranks; r += 2) {  // two ranks' loads at once
      const bool two = r + 1 < w.ranks;
      uint4 a[kAtOnce] = {}, b[kAtOnce] = {};
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k)
        if (i + k * kTakers < packs) {
          a[k] = load(r, i + k * kTakers);
          if (two) b[k] = load(r + 1, i + k * kTakers);
        }
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        add<T>(a[k], total[k], r == 0);
        if (two) add<T>(b[k], total[k], false);
      }
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k)
      if (const std::uint32_t n = i + k * kTakers; n < packs) {
        const Pack<T> sum = rounded<T>(total[k]);
        reinterpret_cast<Pack<T>*>(v.data)[offset_of<RUNS>(v, to + n)] = sum;
        each_reader([&](char* there) { reinterpret_cast<Pack<T>*>(there)[n] = sum; });
      }
  }
  if constexpr (!RUNS)
    for (std::uint32_t i = packs * kSize + taker(); i < bytes / sizeof(T); i += kTakers) {
      float sum = 0;
      for (int r = 0; r < w.ranks; ++r) {
        // Of its own: behind the last whole 16 bytes of what is dense, or anywhere.
        const std::int64_t n = packed ? std::int64_t{from} * kSize + i : offset_of<RUNS>(own, from + i);
        const float value = r == w.rank ? to_float(reinterpret_cast<const T*>(own.data)[n]) : staged_float<T>(given(r) + i * sizeof(T));
        sum = r == 0 ? value : sum + value;
      }
      const T result = from_float<T>(sum);
      reinterpret_cast<T*>(v.data)[packed ? std::int64_t{to} * kSize + i : offset_of<RUNS>(v, to + i)] = result;
      each_reader([&](char* there) { reinterpret_cast<T*>(there)[i] = result; });
    }
}

__device__ __forceinline__ int flag_of(int phase, int rank) { return (phase * kBlocks + static_cast<int>(blockIdx.x)) * kMaxRanks + rank; }

// Tells the peers that what their half of the block, which must have joined, wrote for them is done.
__device__ void signal(const World& w, int phase, std::uint32_t epoch, std::uint32_t thread) {
  const int peer = static_cast<int>(thread);
  if (peer < w.ranks && peer != w.rank) store_release(w.flags[peer] + flag_of(phase, w.rank), epoch);
}

// Every block asks the host's memory so seldom, since the GPU takes its commands over the same bus: when all asked all the time, copies
// between the GPUs took several times as long.
constexpr std::uint64_t kLook = 1'000'000;  // ns

// By the takers. False on every thread when a peer did not come or the host wants no more.
__device__ bool wait(const World& w, int phase, std::uint32_t epoch, std::uint32_t op) {
  const int peer = static_cast<int>(taker());
  bool failed = false;
  if (peer < w.ranks && peer != w.rank) {
    const std::uint32_t* flag = w.flags[w.rank] + flag_of(phase, peer);
    std::uint64_t begin = 0, looked = 0;
    for (std::uint32_t polls = 1; load_acquire(flag) - epoch >= kBuffers; ++polls) {
      if (polls % 64 != 0) continue;
      const std::uint64_t now = nanoseconds();
      if (begin == 0) begin = looked = now;
      bool aborted = false;
      if (now - looked > kLook) {
        looked = now;
        aborted = *static_cast<volatile std::uint32_t*>(&w.control->abort) != 0;
      }
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
  return !any_taker(failed);
}

// What the takers of a rank's first block spend on waiting, and on the rest.
class Watch {
 public:
  __device__ Watch() : on_(blockIdx.x == 0 && taker() == 0), begin_(on_ ? nanoseconds() : 0) {}
  __device__ void waits() { if (on_) since_ = nanoseconds(); }
  __device__ void goes_on() { if (on_) waiting_ += nanoseconds() - since_; }
  __device__ void stop(Spent& spent) {
    if (!on_) return;
    spent.waiting += waiting_;
    spent.moving += nanoseconds() - begin_ - waiting_;
    ++spent.calls;
  }

 private:
  const bool on_;
  const std::uint64_t begin_;
  std::uint64_t since_ = 0, waiting_ = 0;
};

// What a block knows of the rounds of a kernel.
struct Rounds {
  const Exchange& x;
  std::uint32_t before;  // epoch

  __device__ std::uint32_t epoch(int round) const { return before + 1 + static_cast<std::uint32_t>(round); }
  __device__ std::int64_t buffer(int round) const { return (std::int64_t{epoch(round) % kBuffers} * kBlocks + blockIdx.x) * x.world.region; }
  __device__ std::int64_t begin(int round) const { return (std::int64_t{round} * gridDim.x + blockIdx.x) * x.chunk; }
  __device__ std::uint32_t bytes(const Strided& v, int round) const {
    const std::int64_t lo = begin(round);
    return static_cast<std::uint32_t>(v.bytes <= lo ? 0 : v.bytes - lo < x.chunk ? v.bytes - lo : x.chunk);
  }
};

template <bool RUNS>
__device__ void give_all(const Exchange& x, const Rounds& rounds, const Progress& taken, Progress& given) {
  const World& w = x.world;
  for (int round = 0; round < x.rounds; ++round) {
    for (;;) {
      const std::uint32_t through = taken.get();
      if (static_cast<std::uint32_t>(round) <= kAhead + (through & ~Progress::kStopped)) break;
      if (through & Progress::kStopped) return;
    }
    const std::int64_t at = rounds.buffer(round), lo = rounds.begin(round);
    if (x.segments == 1) {
      give<RUNS>(w, x.give[0], lo, rounds.bytes(x.give[0], round), all_readers(w), at);
    } else {
      for (int i = 1; i < w.ranks; ++i) {
        const int r = (w.rank + i) % w.ranks;  // so that not all write to one
        const std::uint32_t bytes = rounds.bytes(x.give[r], round);
        if (bytes) give<RUNS>(w, x.give[r], lo, bytes, {r, r + 1}, at + place(x, 0, w.rank, r));
      }
    }
    join_givers();
    signal(w, 0, rounds.epoch(round), giver());
    if (giver() == kGivers - 1) given.set(static_cast<std::uint32_t>(round) + 1);
  }
}

// T is the type that is summed, or char where elements only move. False where a peer did not come.
template <typename T, bool RUNS>
__device__ bool take_round(const Exchange& x, const Rounds& rounds, int round, const Progress& given, Watch& watch) {
  const World& w = x.world;
  const std::int64_t at = rounds.buffer(round), lo = rounds.begin(round);
  const auto come = [&](int phase) {
    watch.waits();
    const bool there = wait(w, phase, rounds.epoch(round), x.op);
    watch.goes_on();
    return there;
  };
  const auto take_all = [&](int phase) {
    for (int i = 1; i < w.ranks; ++i) {
      const int r = (w.rank + i) % w.ranks;
      const std::uint32_t bytes = rounds.bytes(x.take[r], round);
      if (bytes) take<RUNS>(w.in[r] + at + place(x, phase, r, w.rank), x.take[r], lo, bytes);
    }
  };
  // What is taken may lie where this rank's givers read.
  while (given.get() <= static_cast<std::uint32_t>(round)) {
  }
  if (!come(0)) return false;
  if constexpr (std::is_same_v<T, char>) {
    take_all(0);
  } else {
    const bool twice = x.kind == Kind::sum_twice;
    const std::uint32_t bytes = rounds.bytes(x.own_to, round);
    if (bytes) sum_given<T, RUNS>(x, lo, at, bytes, twice ? all_readers(w) : Readers{0, 0});
    if (twice) {
      join_takers();
      signal(w, 1, rounds.epoch(round), taker());
      if (!come(1)) return false;
      take_all(1);
    }
  }
  return true;
}

template <typename T, bool RUNS>
__global__ void __launch_bounds__(kGivers + kTakers, 2) exchange(const __grid_constant__ Exchange x) {
  const World& w = x.world;
  __shared__ Progress given, taken;
  Watch watch;
  const Rounds rounds{x, *static_cast<volatile std::uint32_t*>(&w.local->epoch[blockIdx.x])};
  if (threadIdx.x == 0) given.set(0), taken.set(0);
  // What the block reads first is on its way while that is.
  if (const Strided& v = gives() ? x.give[0] : x.own_from; RUNS && (gives() ? x.segments == 1 : !std::is_same_v<T, char>))
    fetch_ahead(v, rounds.begin(0), rounds.bytes(v, 0), gives() ? giver() : taker(), gives() ? kGivers : kTakers);
  if (__syncthreads_or(*static_cast<volatile std::uint32_t*>(&w.local->failed) != 0)) return;  // until the host has put things right
  if (gives()) return give_all<RUNS>(x, rounds, taken, given);
  if constexpr (std::is_same_v<T, char>) {
    if (x.own_from.bytes) copy<RUNS>(x.own_from, x.own_to);
  }
  for (int round = 0; round < x.rounds; ++round) {
    const bool there = take_round<T, RUNS>(x, rounds, round, given, watch);
    if (there && round + kAhead + 1 >= x.rounds) continue;  // the givers are through
    join_takers();
    if (taker() == 0) taken.set(there ? static_cast<std::uint32_t>(round) + 1 : static_cast<std::uint32_t>(round) | Progress::kStopped);
    if (!there) return;
  }
  const auto after = rounds.before + static_cast<std::uint32_t>(x.rounds);
  if (taker() == 0) w.local->epoch[blockIdx.x] = after;
  if (blockIdx.x == 0)
    for (int b = static_cast<int>(gridDim.x + taker()); b < kBlocks; b += kTakers) w.local->epoch[b] = after;
  watch.stop(w.local->spent[x.op]);
}

// Calls body with the kernel for the elements that are summed, or char where they only move.
template <typename Body>
cudaError_t with_kernel(Kind kind, DType dtype, bool runs, const Body& body) {
  const auto either = [&](auto* with_runs, auto* anyhow) { return body(runs ? with_runs : anyhow); };
  if (kind == Kind::move) return either(&exchange<char, true>, &exchange<char, false>);
  switch (dtype) {
    case DType::f32: return either(&exchange<float, true>, &exchange<float, false>);
    case DType::f16: return either(&exchange<__half, true>, &exchange<__half, false>);
    case DType::bf16: return either(&exchange<__nv_bfloat16, true>, &exchange<__nv_bfloat16, false>);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t load_kernels() {
  cudaFuncAttributes attributes;
  const auto load = [&](auto* kernel) { return cudaFuncGetAttributes(&attributes, kernel); };
  for (const bool runs : {false, true}) {
    if (const auto status = with_kernel(Kind::move, DType::f32, runs, load)) return status;
    for (const DType dtype : {DType::f32, DType::f16, DType::bf16})
      if (const auto status = with_kernel(Kind::sum, dtype, runs, load)) return status;
  }
  return cudaSuccess;
}

cudaError_t launch(const Exchange& x, cudaStream_t stream) {
  return with_kernel(x.kind, x.dtype, x.runs, [&](auto* kernel) {
    kernel<<<x.blocks, kGivers + kTakers, 0, stream>>>(x);
    return cudaGetLastError();
  });
}

}  // namespace comfytp::comm::cuda
