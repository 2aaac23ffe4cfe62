// One kernel a rank and collective.
//
// Rounds are counted by `epoch`, which the kernels count on themselves in device memory, so that they can be recorded and replayed. What
// a round exchanges is on its way while the one before it is taken: a block gives for round e+1, tells so, and then waits for round e.
// Round e+1 writes to buffer (e+1) % 4 of what a peer reads, last used in round e-3, which nobody reads any more: this rank has seen its
// peers' flags of round e-1, of every block that this took part in it, and a peer's block sets that flag behind its reads of round e-3 (in
// the same kernel), or in a later kernel than those, which the stream has not begun before they were done. Blocks that a kernel does not
// have are counted on as well: all blocks of a group are always in the same round.
//
// A peer may be three rounds ahead, no more: it gives for e+3 when it has seen e+1, and for e+4 it would have to see e+2.
#include "comm/cuda/exchange.cuh"

namespace comfytp::comm::cuda {
namespace {

using backend::cuda::from_float;
using backend::cuda::Pack;
using backend::cuda::to_float;

constexpr int kSumAhead = 2;  // loads in flight a thread, of each summand

// The sum of `bytes` bytes from byte `lo` of own_from on and what the peers gave for it at `at`, in the order of the ranks. Hands on 16
// bytes (by their number) and single elements.
template <typename T, typename StorePack, typename StoreOne>
__device__ void sum_given(const Exchange& x, std::int64_t lo, std::int64_t at, std::uint32_t bytes, const StorePack& store_pack,
                          const StoreOne& store_one) {
  constexpr int kSize = Pack<T>::size;
  const World& w = x.world;
  const Strided& own = x.own_from;
  const bool packed = own.word == 16;
  const std::uint32_t first = own.begin + static_cast<std::uint32_t>(lo / own.word), packs = packed ? bytes / 16 : 0;
  for (std::uint32_t i = threadIdx.x; i < packs; i += kThreads * kSumAhead) {
    float total[kSumAhead][kSize];
    const auto load = [&](int r, std::uint32_t n) {
      return r == w.rank ? reinterpret_cast<const uint4*>(own.data)[offset_of(own, first + n)]
                         : load_staged(reinterpret_cast<const uint4*>(w.in[r] + at + place(x, 0, r, w.rank)) + n);
    };
    const auto add = [&](const uint4& bits, float* sum, bool begin) {
      Pack<T> p;
      *reinterpret_cast<uint4*>(&p) = bits;
#pragma unroll
      for (int j = 0; j < kSize; ++j) sum[j] = begin ? to_float(p.v[j]) : sum[j] + to_float(p.v[j]);
    };
    for (int r = 0; r < w.ranks; r += 2) {  // two ranks' loads at once
      const bool two = r + 1 < w.ranks;
      uint4 a[kSumAhead], b[kSumAhead];
#pragma unroll
      for (int k = 0; k < kSumAhead; ++k)
        if (i + k * kThreads < packs) {
          a[k] = load(r, i + k * kThreads);
          if (two) b[k] = load(r + 1, i + k * kThreads);
        }
#pragma unroll
      for (int k = 0; k < kSumAhead; ++k)
        if (i + k * kThreads < packs) {
          add(a[k], total[k], r == 0);
          if (two) add(b[k], total[k], false);
        }
    }
#pragma unroll
    for (int k = 0; k < kSumAhead; ++k)
      if (i + k * kThreads < packs) {
        Pack<T> sum;
#pragma unroll
        for (int j = 0; j < kSize; ++j) sum.v[j] = from_float<T>(total[k][j]);
        store_pack(i + k * kThreads, sum);
      }
  }
  for (std::uint32_t i = packs * kSize + threadIdx.x; i < bytes / sizeof(T); i += kThreads) {
    float sum = 0;
    for (int r = 0; r < w.ranks; ++r) {
      // Of its own: behind the last whole 16 bytes of what is dense, or anywhere.
      const std::int64_t n = packed ? std::int64_t{first} * kSize + i : offset_of(own, first + i);
      const float v = r == w.rank ? to_float(reinterpret_cast<const T*>(own.data)[n])
                                  : staged_float<T>(w.in[r] + at + place(x, 0, r, w.rank) + i * sizeof(T));
      sum = r == 0 ? v : sum + v;
    }
    store_one(i, from_float<T>(sum));
  }
}

__device__ __forceinline__ int flag_of(int phase, int rank) { return (phase * kBlocks + static_cast<int>(blockIdx.x)) * kMaxRanks + rank; }

// Tells the peers that all threads' writes for them are done.
__device__ void signal(const World& w, int phase, std::uint32_t epoch) {
  __syncthreads();
  const int peer = static_cast<int>(threadIdx.x);
  if (peer < w.ranks && peer != w.rank) store_release(w.flags[peer] + flag_of(phase, w.rank), epoch);
}

// Every block asks the host's memory so seldom, since the GPU takes its commands over the same bus: when all asked all the time, copies
// between the GPUs took several times as long.
constexpr std::uint64_t kLook = 1'000'000;  // ns

// False on every thread when a peer did not come or the host wants no more.
__device__ bool wait(const World& w, int phase, std::uint32_t epoch, std::uint32_t op) {
  const int peer = static_cast<int>(threadIdx.x);
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
  return __syncthreads_or(failed) == 0;
}

// What the first block of a rank's kernel spends on waiting, and on the rest.
class Watch {
 public:
  __device__ Watch() : on_(blockIdx.x == 0 && threadIdx.x == 0), begin_(on_ ? nanoseconds() : 0) {}
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

// T is the type that is summed, or char where elements only move.
template <typename T>
__global__ void __launch_bounds__(kThreads, 2) exchange(const __grid_constant__ Exchange x) {
  const World& w = x.world;
  const int block = static_cast<int>(blockIdx.x);
  Watch watch;
  const std::uint32_t before = *static_cast<volatile std::uint32_t*>(&w.local->epoch[block]);
  if (__syncthreads_or(*static_cast<volatile std::uint32_t*>(&w.local->failed) != 0)) return;  // until the host has put things right
  const auto epoch_of = [&](int round) { return before + 1 + static_cast<std::uint32_t>(round); };
  const auto buffer_of = [&](int round) { return (std::int64_t{epoch_of(round) % kBuffers} * kBlocks + block) * w.region; };
  const auto begin_of = [&](int round) { return (std::int64_t{round} * gridDim.x + block) * x.chunk; };
  const auto bytes_of = [&](const Strided& v, int round) {
    const std::int64_t lo = begin_of(round);
    return static_cast<std::uint32_t>(v.bytes <= lo ? 0 : v.bytes - lo < x.chunk ? v.bytes - lo : x.chunk);
  };
  const auto give_all = [&](int round) {
    const std::int64_t at = buffer_of(round), lo = begin_of(round);
    if (x.segments == 1) {
      give(w, x.give[0], lo, bytes_of(x.give[0], round), all_readers(w), at);
    } else {
      for (int i = 1; i < w.ranks; ++i) {
        const int r = (w.rank + i) % w.ranks;  // so that not all write to one
        const std::uint32_t bytes = bytes_of(x.give[r], round);
        if (bytes) give(w, x.give[r], lo, bytes, {r, r + 1}, at + place(x, 0, w.rank, r));
      }
    }
    signal(w, 0, epoch_of(round));
  };
  for (int round = -1; round < x.rounds; ++round) {
    if (round + 1 < x.rounds) give_all(round + 1);
    if (round < 0) {
      if constexpr (std::is_same_v<T, char>) {
        if (x.own_from.bytes) copy(x.own_from, x.own_to);
      }
      continue;
    }
    const std::int64_t at = buffer_of(round), lo = begin_of(round);
    const auto come = [&](int phase) {
      watch.waits();
      const bool there = wait(w, phase, epoch_of(round), x.op);
      watch.goes_on();
      return there;
    };
    if (!come(0)) return;
    if constexpr (std::is_same_v<T, char>) {
      for (int i = 1; i < w.ranks; ++i) {
        const int r = (w.rank + i) % w.ranks;
        const std::uint32_t bytes = bytes_of(x.take[r], round);
        if (bytes) take(w.in[r] + at + place(x, 0, r, w.rank), x.take[r], lo, bytes);
      }
    } else {
      const bool twice = x.kind == Kind::sum_twice;
      const Strided& v = x.own_to;
      const std::uint32_t bytes = bytes_of(v, round), first = v.begin + static_cast<std::uint32_t>(lo / v.word);
      const Readers readers = twice ? all_readers(w) : Readers{0, 0};
      const auto each_reader = [&](const auto& body) {
        for (int r = readers.first; r < readers.last; ++r)
          if (r != w.rank) body(w.out[r] + at + place(x, 1, w.rank, r));
      };
      if (bytes)
        sum_given<T>(
            x, lo, at, bytes,
            [&](std::uint32_t i, const Pack<T>& sum) {
              reinterpret_cast<Pack<T>*>(v.data)[offset_of(v, first + i)] = sum;
              each_reader([&](char* to) { reinterpret_cast<Pack<T>*>(to)[i] = sum; });
            },
            [&](std::uint32_t i, T sum) {
              reinterpret_cast<T*>(v.data)[v.word == 16 ? std::int64_t{first} * Pack<T>::size + i : offset_of(v, first + i)] = sum;
              each_reader([&](char* to) { reinterpret_cast<T*>(to)[i] = sum; });
            });
      if (twice) {
        signal(w, 1, epoch_of(round));
        if (!come(1)) return;
        for (int i = 1; i < w.ranks; ++i) {
          const int r = (w.rank + i) % w.ranks;
          const std::uint32_t theirs = bytes_of(x.take[r], round);
          if (theirs) take(w.in[r] + at + place(x, 1, r, w.rank), x.take[r], lo, theirs);
        }
      }
    }
  }
  const auto after = before + static_cast<std::uint32_t>(x.rounds);
  if (threadIdx.x == 0) w.local->epoch[block] = after;
  if (block == 0)
    for (int b = static_cast<int>(gridDim.x + threadIdx.x); b < kBlocks; b += kThreads) w.local->epoch[b] = after;
  watch.stop(w.local->spent[x.op]);
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
