#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "base/dtype.h"

namespace comfytp::backend::cuda {

/// q [n, heads, queries, d], k [n, groups, keys, d], v [n, groups, keys, e], out [n, heads, queries, e], d and e innermost and dense;
/// the other strides in elements.
struct AnyAttention {
  std::int64_t n = 0, heads = 0, groups = 0, queries = 0, keys = 0, d = 0, e = 0;
  std::int64_t q[3] = {}, k[3] = {}, v[3] = {}, out[3] = {};
  float scale = 1;
  enum class Mask : std::uint8_t { none, boolean, added } mask = Mask::none;
  std::int64_t mask_strides[3] = {};  ///< of n, heads, queries; 0 where it is broadcast
};

/// From a mask of rows (which keys are seen) to what is added to the scores, in f16 or bf16: 0, or so little that nothing is left. A row that sees
/// nothing has 0 everywhere, and `sees` says so.
cudaError_t launch_mask(DType dtype, std::int64_t rows, std::int64_t keys, const void* mask, void* added, bool* sees, cudaStream_t stream);
/// Zero in `out` for queries that see no key; the mask's rows have the strides of the attention.
cudaError_t launch_clear_unseeing(const AnyAttention& attention, DType dtype, const bool* sees, void* out, cudaStream_t stream);

constexpr std::int64_t kMostHead = 512;  ///< of d and e

/// In fp32, whatever the mask: for what cuDNN does not take.
cudaError_t launch_any_attention(const AnyAttention& attention, DType dtype, const void* q, const void* k, const void* v, const void* mask, void* out,
                                 cudaStream_t stream);

}  // namespace comfytp::backend::cuda
