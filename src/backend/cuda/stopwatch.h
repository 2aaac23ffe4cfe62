// Times ways to do one thing on scratch memory, for a choice that is made once.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "backend/cuda/status.h"

namespace comfytp::backend::cuda {

class Stopwatch {
 public:
  static constexpr float kNever = 1e30f;

  explicit Stopwatch(cudaStream_t stream) : stream_(stream) {
    check(cudaEventCreate(&start_), "making an event");
    check(cudaEventCreate(&stop_), "making an event");
  }
  ~Stopwatch() {
    cudaStreamSynchronize(stream_);
    for (void* p : memory_) cudaFree(p);
    cudaEventDestroy(start_);
    cudaEventDestroy(stop_);
  }
  Stopwatch(const Stopwatch&) = delete;
  Stopwatch& operator=(const Stopwatch&) = delete;

  /// Filled with small positive numbers, whatever the dtype; null where there is too little memory.
  void* allocate(std::int64_t bytes) {
    void* p = nullptr;
    if (cudaMalloc(&p, static_cast<std::size_t>(std::max<std::int64_t>(bytes, 16))) != cudaSuccess) {
      cudaGetLastError();
      return nullptr;
    }
    memory_.push_back(p);
    cudaMemsetAsync(p, 0x2b, static_cast<std::size_t>(bytes), stream_);
    return p;
  }
  /// Milliseconds of some runs of `launch`, which returns false where it cannot run: then kNever.
  template <typename Launch>
  float time(const Launch& launch) {
    constexpr int kRuns = 4;
    float best = kNever;
    if (!launch()) return best;
    for (int round = 0; round < 2; ++round) {
      cudaEventRecord(start_, stream_);
      for (int i = 0; i < kRuns; ++i) launch();
      cudaEventRecord(stop_, stream_);
      if (cudaEventSynchronize(stop_) != cudaSuccess) return kNever;
      float ms = 0;
      cudaEventElapsedTime(&ms, start_, stop_);
      best = std::min(best, ms);
    }
    return best;
  }

 private:
  cudaStream_t stream_;
  cudaEvent_t start_ = nullptr, stop_ = nullptr;
  std::vector<void*> memory_;
};

}  // namespace comfytp::backend::cuda
