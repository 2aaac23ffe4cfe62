#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace comfytp::comm::cuda {

/// Queues a copy of dense bytes from a peer's memory by a kernel of few blocks: the copy engines wait for kernels that wait for a peer.
cudaError_t launch_fetch(const void* from, void* to, std::int64_t bytes, cudaStream_t stream);

}  // namespace comfytp::comm::cuda
