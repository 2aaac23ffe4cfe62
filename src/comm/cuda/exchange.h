// What the ranks of a group do in one collective, in one kernel a rank. Known to host and device code.
//
// Every rank publishes what its peers need of it in its own *staging* memory, tells them by a flag, waits for their flags, and takes
// what it needs from their staging. A message is cut into chunks; in a round every block stages one chunk, and waits for nothing but
// the same block of its peers: all ranks cut a message alike, so no barrier within a grid is needed.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "base/dtype.h"

namespace comfytp::comm::cuda {

constexpr int kMaxRanks = 16, kMaxDims = 6;
constexpr int kThreads = 512;
constexpr int kBlocks = 48;                         ///< at most: two ranks of one GPU must both find room on it
constexpr std::uint32_t kRegion = 128 << 10;        ///< bytes that a block stages in a round
constexpr std::int64_t kHalf = std::int64_t{kBlocks} * kRegion;
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

/// In a rank's device memory, for itself alone.
struct Local {
  std::uint32_t epoch[kBlocks];  ///< rounds that have been; the same for all blocks between two kernels
  std::uint32_t failed;
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
  char* staging[kMaxRanks] = {};        ///< two halves of kHalf bytes each, by rank
  std::uint32_t* flags[kMaxRanks] = {}; ///< kFlags, by the rank that waits for them
  Local* local = nullptr;
  Control* control = nullptr;
  std::uint64_t timeout_ns = 0;
};

enum class Kind {
  move,      ///< take[r] is what rank r publishes for this one
  sum,       ///< take[0] is the sum of what all ranks publish for this one
  sum_twice  ///< all_reduce in slices: every rank sums segment `rank`, publishes that, and takes the others'
};

struct Exchange {
  World world;
  Kind kind = Kind::move;
  DType dtype = DType::f32;
  std::uint32_t op = 0;       ///< for messages
  int blocks = 1, rounds = 1;
  std::uint32_t chunk = 0;    ///< bytes of each segment that a block stages in a round, a multiple of 16
  int segments = 1;           ///< that a rank publishes: one for all, or one for each rank
  int segment = 0;            ///< that this rank takes
  Strided give[kMaxRanks];    ///< the segments
  Strided take[kMaxRanks];
  Strided own_from, own_to;   ///< copied within the rank, in equal words
};
static_assert(sizeof(Exchange) <= 4096, "the parameters of a kernel");

/// Loads the kernels of the current device: done later, it could wait for a kernel that waits for this rank.
cudaError_t load_kernels();
cudaError_t launch(const Exchange& exchange, cudaStream_t stream);

}  // namespace comfytp::comm::cuda
