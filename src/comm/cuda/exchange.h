// What the ranks of a group do in one collective, in one kernel a rank. Known to host and device code.
//
// Every rank puts what a peer needs of it where that peer finds it, tells it by a flag, waits for the peers' flags, and takes what they
// put there for it. Between devices that reach each other that place is the reader's own memory: writes are on their way while more
// follow, where a read would wait for the link twice. Otherwise it is memory of the host. A message is cut into chunks; in a round every
// block gives one chunk, and waits for nothing but the same block of its peers: all ranks cut a message alike, so no barrier within a grid
// is needed. Some threads of a block give and the others take, so that the link is never idle while a rank sums or stores.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "base/dtype.h"

namespace comfytp::comm::cuda {

constexpr int kMaxRanks = 16, kMaxDims = 6;
constexpr int kGivers = 128, kTakers = 256;         ///< threads of a block: who write to the peers, and who wait for them
constexpr int kBlocks = 128;                        ///< at most: what waits must find room beside what it waits for
constexpr std::uint32_t kRegion = 16 << 10;         ///< bytes that a block gives in a round, to all its peers together
constexpr int kBuffers = 8;                         ///< that rounds take turns in
constexpr int kAhead = 3;                           ///< rounds that the givers may be ahead of their takers
static_assert(kBuffers >= 2 * kAhead + 2, "see exchange.cu");
constexpr std::int64_t kStaging = std::int64_t{kBuffers} * kBlocks * kRegion;  ///< a rank
constexpr int kFlags = 2 * kBlocks * kMaxRanks;     ///< by phase, block and the rank that sets it

/// A part of a tensor whose elements are counted in an order that all ranks agree on: dimensions, outermost first, in words.
struct Strided {
  char* data = nullptr;
  std::int64_t bytes = 0;
  std::uint32_t begin = 0;  ///< the word that it begins with
  int word = 16;            ///< bytes: 16, 8, 4, 2 or 1; one dense dimension may end within a word, others divide into words
  int dims = 1;
  std::uint32_t size[kMaxDims] = {};
  std::int64_t stride[kMaxDims] = {1};
};

/// Since the group was made: nanoseconds, and calls.
struct Spent {
  unsigned long long waiting, moving, calls;
};
constexpr int kOps = 4;
constexpr const char* kOpNames[kOps] = {"all_reduce", "reduce_scatter", "all_gather", "halo_exchange"};

/// In a rank's device memory, for itself alone.
struct Local {
  std::uint32_t epoch[kBlocks];  ///< rounds that have been; the same for all blocks between two kernels
  std::uint32_t failed;
  Spent spent[kOps];             ///< by op, as the first block sees it
};

/// In page-locked host memory.
struct Control {
  std::uint32_t abort;  ///< set by the host: whoever waits returns
  std::uint32_t error;  ///< set by the device: see fault()
};

enum class Fault : std::uint32_t { none, timeout, aborted };
__host__ __device__ constexpr std::uint32_t fault(Fault kind, std::uint32_t missing, std::uint32_t op) {
  return static_cast<std::uint32_t>(kind) | missing << 8 | op << 16;
}

/// A group as one of its ranks sees it.
struct World {
  int rank = 0, ranks = 0;
  char* out[kMaxRanks] = {};            ///< where rank r finds what this one gives it: kBuffers times kBlocks regions
  const char* in[kMaxRanks] = {};       ///< where this one finds what rank r gives it
  std::uint32_t region = 0;             ///< bytes, a multiple of 16
  bool shared = false;                  ///< all peers find it at one place
  std::uint32_t* flags[kMaxRanks] = {}; ///< kFlags, by the rank that waits for them
  Local* local = nullptr;
  Control* control = nullptr;
  std::uint64_t timeout_ns = 0;
};

enum class Kind {
  move,      ///< take[r] is what rank r gives this one
  sum,       ///< own_to is the sum of what all ranks give this one
  sum_twice  ///< all_reduce in slices: every rank sums segment `rank`, gives that to all, and takes the others'
};

struct Exchange {
  World world;
  Kind kind = Kind::move;
  DType dtype = DType::f32;
  std::uint32_t op = 0;       ///< for messages
  int blocks = 1, rounds = 1;
  std::uint32_t chunk = 0;    ///< bytes of each segment that a block gives in a round, a multiple of 16
  bool runs = false;          ///< all tensors are runs of whole 16 bytes
  int segments = 1;           ///< that a rank gives: give[0] to all, or give[r] to rank r
  Strided give[kMaxRanks];
  Strided take[kMaxRanks];
  Strided own_from, own_to;   ///< in equal words: copied within the rank, or its own summand and the sum
};
static_assert(sizeof(Exchange) <= 4096, "the parameters of a kernel");

/// Loads the kernels of the current device: done later, it could wait for a kernel that waits for this rank.
cudaError_t load_kernels();
cudaError_t launch(const Exchange& exchange, cudaStream_t stream);

}  // namespace comfytp::comm::cuda
