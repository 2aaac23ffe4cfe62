// Errors of the CUDA libraries as Errors of ours.
#pragma once

#include <cublasLt.h>
#include <cuda_runtime.h>
#include <cudnn.h>

#include "base/error.h"

namespace comfytp::backend::cuda {

/// Throws an Error "[cuda] <what>: <reason>" unless the call succeeded: OutOfMemory, DeviceFailure, or where a library only does not do what it
/// was asked for, an Error and no more.
inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // so that the next call does not report it again
  const auto text = fmt::format("[cuda] {}: {}", what, cudaGetErrorString(status));
  if (status == cudaErrorMemoryAllocation) throw OutOfMemory(text);
  if (status == cudaErrorNoKernelImageForDevice || status == cudaErrorInvalidDeviceFunction || status == cudaErrorNotSupported ||
      status == cudaErrorLaunchOutOfResources)
    throw Error(text);
  throw DeviceFailure(text);
}
inline void check(cublasStatus_t status, const char* what) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  const auto text = fmt::format("[cuda] {}: {}", what, cublasLtGetStatusString(status));
  if (status == CUBLAS_STATUS_ALLOC_FAILED) throw OutOfMemory(text);
  if (status == CUBLAS_STATUS_NOT_SUPPORTED || status == CUBLAS_STATUS_INVALID_VALUE || status == CUBLAS_STATUS_ARCH_MISMATCH) throw Error(text);
  throw DeviceFailure(text);
}
inline void check(cudnnStatus_t status, const char* what) {
  if (status == CUDNN_STATUS_SUCCESS) return;
  const auto text = fmt::format("[cuda] {}: {}", what, cudnnGetErrorString(status));
  if (status == CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED || status == CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED)
    throw OutOfMemory(text);
  const auto category = status / 1000;  // a thousand numbers each
  if (category == CUDNN_STATUS_BAD_PARAM / 1000 || category == CUDNN_STATUS_NOT_SUPPORTED / 1000) throw Error(text);
  throw DeviceFailure(text);
}

}  // namespace comfytp::backend::cuda
