#include "comm/cuda/fetch.h"

#include <algorithm>

namespace comfytp::comm::cuda {
namespace {

constexpr int kThreads = 256, kBlocks = 64, kAhead = 8;  // so much is on its way at once: a link is far

__device__ __forceinline__ bool aligned(const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; }

// The parts stand side by side: blockIdx.y is one.
__global__ void __launch_bounds__(kThreads) fetch(const __grid_constant__ FetchParts parts) {
  const int part = blockIdx.y;
  const bool words = aligned(parts.from[part]) && aligned(parts.to[part]);
  const std::int64_t count = words ? parts.bytes[part] / 16 : 0, step = std::int64_t{gridDim.x} * kThreads;
  const std::int64_t first = blockIdx.x * std::int64_t{kThreads} + threadIdx.x;
  const auto* from = static_cast<const uint4*>(parts.from[part]);
  auto* to = static_cast<uint4*>(parts.to[part]);
  std::int64_t i = first;
  for (; i + (kAhead - 1) * step < count; i += kAhead * step) {
    uint4 v[kAhead];
#pragma unroll
    for (int a = 0; a < kAhead; ++a) v[a] = from[i + a * step];
#pragma unroll
    for (int a = 0; a < kAhead; ++a) to[i + a * step] = v[a];
  }
  uint4 rest[kAhead];
#pragma unroll
  for (int a = 0; a < kAhead; ++a)
    if (i + a * step < count) rest[a] = from[i + a * step];
#pragma unroll
  for (int a = 0; a < kAhead; ++a)
    if (i + a * step < count) to[i + a * step] = rest[a];
  for (std::int64_t b = count * 16 + first; b < parts.bytes[part]; b += step)
    static_cast<char*>(parts.to[part])[b] = static_cast<const char*>(parts.from[part])[b];
}

}  // namespace

cudaError_t launch_fetch(const FetchParts& parts, cudaStream_t stream) {
  std::int64_t most = 0;
  for (int p = 0; p < parts.count; ++p) most = std::max(most, parts.bytes[p]);
  if (most == 0) return cudaSuccess;
  const auto blocks = static_cast<unsigned>(std::clamp<std::int64_t>(most / 16 / kThreads, 1, kBlocks));
  fetch<<<dim3(blocks, static_cast<unsigned>(parts.count)), kThreads, 0, stream>>>(parts);
  return cudaGetLastError();
}

}  // namespace comfytp::comm::cuda
