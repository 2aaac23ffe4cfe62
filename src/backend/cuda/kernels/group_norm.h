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
  int at_once = 1; ///< groups that one block handles, a divisor of `groups`
  int pieces = 1;  ///< the rows of a sample are summed in so many pieces
  int parts = 0;   ///< of the moments, where they are given: [parts, samples, groups, 3], count, mean and squared deviations

  std::int64_t sets() const { return samples * groups; }
  /// For the sums of the pieces, and the values that they are relative to.
  std::int64_t workspace_bytes() const { return sets() * (2 * pieces + 1) * static_cast<std::int64_t>(sizeof(float)); }
};

/// Sets at_once and pieces: enough neighbouring channels in a block for whole lines of memory, enough blocks for the device.
void divide(GroupNorm& norm, DType dtype);

/// sums [samples, groups, pieces, 2]: of x - shift and of its square, shifts [samples, groups] being the first value of each group, so
/// that a large mean costs no digits.
cudaError_t launch_group_sums(const GroupNorm& norm, DType dtype, const void* x, float* sums, float* shifts, cudaStream_t stream);
/// The moments [1, samples, groups, 3] from these sums.
cudaError_t launch_group_moments(const GroupNorm& norm, const float* sums, const float* shifts, float* moments, cudaStream_t stream);
/// y = silu?((x - mean) / deviation * weight + bias) from sums and shifts, or where shifts are null from moments. y may be x.
cudaError_t launch_group_norm(const GroupNorm& norm, DType dtype, const void* x, const void* weight, const void* bias, const float* statistics,
                              const float* shifts, void* y, cudaStream_t stream);

}  // namespace comfytp::backend::cuda
