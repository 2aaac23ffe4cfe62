// Errors of the CUDA libraries as Errors of ours.
#pragma once

#include <cublasLt.h>
#include <cuda_runtime.h>
#include <cudnn.h>

#include "base/error.h"

namespace comfytp::backend::cuda {

/// Throws Error "[cuda] <what>: <reason>" unless the call succeeded.
inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // so that the next call does not report it again
  fail("[cuda] {}: {}", what, cudaGetErrorString(status));
}
inline void check(cublasStatus_t status, const char* what) {
  require(status == CUBLAS_STATUS_SUCCESS, "[cuda] {}: {}", what, cublasLtGetStatusString(status));
}
inline void check(cudnnStatus_t status, const char* what) {
  require(status == CUDNN_STATUS_SUCCESS, "[cuda] {}: {}", what, cudnnGetErrorString(status));
}

}  // namespace comfytp::backend::cuda
