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
  std::int64_t sets() const { return samples * groups; }
  /// For the moments of the pieces, and the values that they are relative to.
  std::int64_t workspace_bytes() const { return sets() * (3 * pieces() + 1) * static_cast<std::int64_t>(sizeof(float)); }
};

/// The moments [pieces, samples, groups, 3] of x - shifts, shifts [samples, groups] being the first value of each: so a large mean costs
/// no digits.
cudaError_t launch_group_moments(const GroupNorm& norm, DType dtype, const void* x, float* moments, float* shifts, cudaStream_t stream);
/// Merges [parts, samples, groups, 3] into [1, samples, groups, 3], and adds the shifts.
cudaError_t launch_merge_moments(int parts, std::int64_t sets, const float* moments, const float* shifts, float* merged, cudaStream_t stream);
/// y = silu?((x - shift - mean) * scale * weight + bias). y may be x; null shifts are 0.
cudaError_t launch_group_norm(const GroupNorm& norm, DType dtype, const void* x, const void* weight, const void* bias, const float* moments,
                              const float* shifts, void* y, cudaStream_t stream);

}  // namespace comfytp::backend::cuda
