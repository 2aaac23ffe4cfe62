#include "comm/cuda/fetch.h"

#include <algorithm>

namespace comfytp::comm::cuda {
namespace {

constexpr int kThreads = 512, kBlocks = 32, kAhead = 4;

__global__ void __launch_bounds__(kThreads) fetch_words(const uint4* from, uint4* to, std::int64_t count) {
  const std::int64_t step = std::int64_t{gridDim.x} * kThreads;
  std::int64_t i = blockIdx.x * std::int64_t{kThreads} + threadIdx.x;
  for (; i + (kAhead - 1) * step < count; i += kAhead * step) {
    uint4 v[kAhead];
#pragma unroll
    for (int a = 0; a < kAhead; ++a) v[a] = from[i + a * step];
#pragma unroll
    for (int a = 0; a < kAhead; ++a) to[i + a * step] = v[a];
  }
  for (; i < count; i += step) to[i] = from[i];
}

__global__ void fetch_bytes(const char* from, char* to, std::int64_t count) {
  for (std::int64_t i = blockIdx.x * std::int64_t{kThreads} + threadIdx.x; i < count; i += std::int64_t{gridDim.x} * kThreads) to[i] = from[i];
}

int blocks_for(std::int64_t threads) { return static_cast<int>(std::clamp<std::int64_t>((threads + kThreads - 1) / kThreads, 1, kBlocks)); }

}  // namespace

cudaError_t launch_fetch(const void* from, void* to, std::int64_t bytes, cudaStream_t stream) {
  if (bytes == 0) return cudaSuccess;
  const bool aligned = (reinterpret_cast<std::uintptr_t>(from) | reinterpret_cast<std::uintptr_t>(to)) % 16 == 0;
  const std::int64_t words = aligned ? bytes / 16 : 0, rest = bytes - words * 16;
  if (words > 0) fetch_words<<<blocks_for(words), kThreads, 0, stream>>>(static_cast<const uint4*>(from), static_cast<uint4*>(to), words);
  if (rest > 0)
    fetch_bytes<<<blocks_for(rest), kThreads, 0, stream>>>(static_cast<const char*>(from) + words * 16, static_cast<char*>(to) + words * 16, rest);
  return cudaGetLastError();
}

}  // namespace comfytp::comm::cuda
