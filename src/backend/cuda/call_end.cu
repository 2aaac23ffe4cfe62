#include "backend/cuda/call_end.h"

#include <algorithm>

#include "backend/cuda/elements.cuh"

namespace comfytp::backend::cuda {
namespace {

constexpr int kThreads = 256;

// The finaliser of splitmix64: every bit of the result hangs on every bit of x.
__device__ __forceinline__ std::uint64_t mix(std::uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

// An element is mixed with its place, so that sums in any order will do.
template <typename Word>
__global__ void __launch_bounds__(kThreads) digest(StridedCopy c, const Word* data, std::int64_t count, ulonglong2* partial) {
  std::uint64_t a = 0, b = 0;
  for (std::int64_t i = blockIdx.x * std::int64_t{kThreads} + threadIdx.x; i < count; i += std::int64_t{gridDim.x} * kThreads) {
    const auto v = static_cast<std::uint64_t>(data[offset_in(c.rank, c.size, c.from, i)]);
    a += mix(v ^ mix(static_cast<std::uint64_t>(i) + 0x9e3779b97f4a7c15ull));
    b += mix(v ^ mix(static_cast<std::uint64_t>(i) ^ 0xd1b54a32d192ed03ull));
  }
  __shared__ std::uint64_t sums[2][kThreads];
  sums[0][threadIdx.x] = a;
  sums[1][threadIdx.x] = b;
  for (int n = kThreads / 2; n > 0; n /= 2) {
    __syncthreads();
    if (threadIdx.x < n)
      for (auto& sum : sums) sum[threadIdx.x] += sum[threadIdx.x + n];
  }
  if (threadIdx.x == 0) partial[blockIdx.x] = make_ulonglong2(sums[0][0], sums[1][0]);
}

template <typename T>
__global__ void __launch_bounds__(kThreads) end(StridedCopy c, T* data, std::int64_t count, const __grid_constant__ Faults faults,
                                                CallState* state) {
  bool failed = threadIdx.x == 0 && *static_cast<volatile std::uint32_t*>(&state->cancelled) != 0;
  for (int f = static_cast<int>(threadIdx.x); f < faults.count; f += kThreads)
    failed |= *static_cast<const volatile std::uint32_t*>(faults.words[f]) != 0;
  failed = __syncthreads_or(failed) != 0;
  bool bad = false;
  for (std::int64_t i = blockIdx.x * std::int64_t{kThreads} + threadIdx.x; i < count; i += std::int64_t{gridDim.x} * kThreads) {
    T& element = data[offset_in(c.rank, c.size, c.from, i)];
    if (failed)
      element = from_float<T>(NAN);
    else
      bad |= !isfinite(to_float(element));
  }
  bad = __syncthreads_or(bad) != 0;
  if (threadIdx.x > 0) return;
  if (failed) *static_cast<volatile std::uint32_t*>(&state->failed) = 1;
  if (bad) *static_cast<volatile std::uint32_t*>(&state->not_finite) = 1;
}

__global__ void done(CallState* state, std::uint32_t number) { *static_cast<volatile std::uint32_t*>(&state->done) = number; }

}  // namespace

cudaError_t launch_digest(const StridedCopy& tensor, const void* data, void* partial, cudaStream_t stream) {
  const auto start = [&](auto word) {
    const auto* words = static_cast<const decltype(word)*>(data);
    digest<<<kDigestBlocks, kThreads, 0, stream>>>(tensor, words, count_of(tensor), static_cast<ulonglong2*>(partial));
  };
  switch (size_of(tensor.source)) {
    case 8: start(std::uint64_t{}); break;
    case 4: start(std::uint32_t{}); break;
    case 2: start(std::uint16_t{}); break;
    default: start(std::uint8_t{}); break;
  }
  return cudaGetLastError();
}

cudaError_t launch_end(const StridedCopy& output, void* data, const Faults& faults, CallState* state, cudaStream_t stream) {
  const auto count = count_of(output);
  const auto blocks = static_cast<int>(std::clamp<std::int64_t>((count + kThreads - 1) / kThreads, 1, 256));
  const auto start = [&](auto* elements) { end<<<blocks, kThreads, 0, stream>>>(output, elements, count, faults, state); };
  if (output.source == DType::f64)
    start(static_cast<double*>(data));
  else
    with_real(output.source, [&](auto tag) { start(static_cast<typename decltype(tag)::type*>(data)); });  // whole numbers cannot say it
  return cudaGetLastError();
}

cudaError_t launch_done(CallState* state, std::uint32_t number, cudaStream_t stream) {
  done<<<1, 1, 0, stream>>>(state, number);
  return cudaGetLastError();
}

}  // namespace comfytp::backend::cuda
