#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace comfytp::comm::cuda {

constexpr int kMostParts = 16;

/// Dense pieces of memory, each with its place.
struct FetchParts {
  int count = 0;
  const void* from[kMostParts] = {};
  void* to[kMostParts] = {};
  std::int64_t bytes[kMostParts] = {};
};

/// Queues the copies, some of them from peers' memory, as one kernel: copies between devices inside a graph stand still beside kernels
/// that wait for a peer.
cudaError_t launch_fetch(const FetchParts& parts, cudaStream_t stream);

}  // namespace comfytp::comm::cuda
