// Page-locked host memory, from and to which the copy engines run at full speed.
#pragma once

#include <cstdint>

#include "backend/cuda/status.h"

namespace comfytp::backend::cuda {

class PinnedBuffer {
 public:
  PinnedBuffer() = default;
  PinnedBuffer(const PinnedBuffer&) = delete;
  PinnedBuffer& operator=(const PinnedBuffer&) = delete;
  ~PinnedBuffer() { cudaFreeHost(data_); }

  /// At least so many bytes; what was in it is lost when it grows. Nothing may be using it then.
  char* reserve(std::int64_t bytes) {
    if (bytes <= bytes_) return data_;
    cudaFreeHost(data_);
    data_ = nullptr;
    bytes_ = 0;
    check(cudaHostAlloc(reinterpret_cast<void**>(&data_), static_cast<std::size_t>(bytes), cudaHostAllocDefault), "page-locked host memory");
    bytes_ = bytes;
    return data_;
  }
  std::int64_t bytes() const { return bytes_; }
  char* data() const { return data_; }

 private:
  char* data_ = nullptr;
  std::int64_t bytes_ = 0;
};

}  // namespace comfytp::backend::cuda
