#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "base/dtype.h"

namespace comfytp::backend::cuda {

/// Group norm of [samples, rows, channels], channels innermost, each group a run of channels.
struct GroupNorm {
  std::int64_t samples = 0, rows = 0, channels = 0;
  int groups = 0;
  float epsilon = 0;
  bool silu = false;
  int parts = 0;  ///< of the moments given: [parts, samples, groups, 3], count, mean and squared deviations

  /// The rows of a sample are measured in so many pieces.
  std::int64_t pieces() const;
  /// For the moments of the pieces.
  std::int64_t workspace_bytes() const { return samples * pieces() * groups * 3 * static_cast<std::int64_t>(sizeof(float)); }
};

/// The moments [pieces, samples, groups, 3] of x.
cudaError_t launch_group_moments(const GroupNorm& norm, DType dtype, const void* x, float* moments, cudaStream_t stream);
/// Merges [parts, samples, groups, 3] into [1, samples, groups, 3].
cudaError_t launch_merge_moments(int parts, std::int64_t groups, const float* moments, float* merged, cudaStream_t stream);
/// y = silu?((x - mean) * scale * weight + bias). y may be x.
cudaError_t launch_group_norm(const GroupNorm& norm, DType dtype, const void* x, const void* weight, const void* bias, const float* moments, void* y,
                              cudaStream_t stream);

}  // namespace comfytp::backend::cuda
