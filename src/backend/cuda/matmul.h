// Matrix products by cuBLASLt, each with an algorithm that was timed once and is remembered.
#pragma once

#include <cublasLt.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>

#include "backend/cuda/context.h"
#include "base/dtype.h"

namespace comfytp::backend::cuda {

/// y[b][r, o] = sum over i of x[b][r, i] w[b][o, i] (+ bias[o]), row-major, in fp32. Strides between batches are in elements.
struct MatmulSizes {
  DType dtype = DType::f16;
  std::int64_t rows = 0, inner = 0, outputs = 0;
  std::int64_t batch = 1, x_stride = 0, w_stride = 0, y_stride = 0;
  bool w_transposed = false;  ///< w is [i, o] instead of [o, i]
  bool bias = false;
  bool gelu = false;  ///< y goes through gelu in its tanh form, behind the bias
  /// Set: x is f8_e4m3, w is of this fp8 dtype, and y and the bias alone are of `dtype`. For GPUs from sm_89 on, and sizes of 16.
  std::optional<DType> fp8_weight;
};

class Matmul {
 public:
  /// Chooses the algorithm: from what is remembered of this device and library, else by timing the likely ones on scratch memory. Throws Error
  /// where the library has none.
  Matmul(Context& context, const MatmulSizes& sizes);
  ~Matmul();
  Matmul(const Matmul&) = delete;
  Matmul& operator=(const Matmul&) = delete;

  std::int64_t workspace_bytes() const { return workspace_; }
  /// x_scale: a factor for x on the device, with fp8_weight.
  void run(const void* x, const void* w, const void* bias, void* y, void* workspace, const float* x_scale = nullptr);

 private:
  void choose();
  void release();
  cublasStatus_t launch(const cublasLtMatmulAlgo_t& algorithm, const void* x, const void* w, const void* bias, void* y, void* workspace,
                        std::int64_t bytes, cudaStream_t stream, const float* x_scale);

  Context& context_;
  MatmulSizes sizes_;
  cublasLtMatmulDesc_t operation_ = nullptr;
  cublasLtMatrixLayout_t x_ = nullptr, w_ = nullptr, y_ = nullptr;
  cublasLtMatmulAlgo_t algorithm_{};
  std::int64_t workspace_ = 0;
};

/// Null where the library has no algorithm for these sizes.
std::shared_ptr<Matmul> matmul_if_any(Context& context, const MatmulSizes& sizes);

}  // namespace comfytp::backend::cuda
