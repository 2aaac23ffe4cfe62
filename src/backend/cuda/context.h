// What the kernels of one CUDA device share.
#pragma once

#include <cublasLt.h>
#include <cuda_runtime.h>
#include <cudnn.h>

#include <cstdint>
#include <map>
#include <memory>
#include <string>

namespace comfytp::backend::cuda {

/// Lives on the device's worker thread, whose current device it is.
struct Context {
  int ordinal = 0;
  std::string name;             ///< "cuda:0"
  cudaDeviceProp properties{};
  cudaStream_t stream = nullptr;  ///< everything runs on it, in the order of the calls
  cublasLtHandle_t cublas = nullptr;
  cudnnHandle_t cudnn = nullptr;
  std::map<std::string, std::weak_ptr<void>> plans;  ///< of cuDNN, by what they do

  int multiprocessors() const { return properties.multiProcessorCount; }
  /// From sm_89 on.
  bool multiplies_in_fp8() const { return properties.major > 8 || (properties.major == 8 && properties.minor >= 9); }
};

}  // namespace comfytp::backend::cuda
