// What begins and ends a call on the device. Known to host and device code.
#pragma once

#include "backend/call_queue.h"
#include "backend/cuda/copy.h"

namespace comfytp::backend::cuda {

constexpr int kDigestBlocks = 64;
constexpr int kMostFaults = 128;

/// Words in shared memory; one that is not zero: a collective has failed.
struct Faults {
  int count = 0;
  const std::uint32_t* words[kMostFaults] = {};
};

/// Queues the digest of what `tensor` copies from `data`, as kDigestBlocks digests to be added up.
cudaError_t launch_digest(const StridedCopy& tensor, const void* data, void* partial, cudaStream_t stream);
/// Queues the check of an output: NaN for all of it after a failure, and a note in `state` of failures and what is not finite.
cudaError_t launch_end(const StridedCopy& output, void* data, const Faults& faults, CallState* state, cudaStream_t stream);
cudaError_t launch_done(CallState* state, std::uint32_t number, cudaStream_t stream);

}  // namespace comfytp::backend::cuda
