// Convolutions and attention by cuDNN's graphs. The header of cudnn-frontend is large: one file reads it.
#pragma once

#include <cstdint>
#include <memory>

#include "backend/cuda/context.h"
#include "base/dtype.h"
#include "base/shape.h"

namespace comfytp::backend::cuda {

/// A cuDNN plan, ready to run. Plans of equal description are one.
class CudnnPlan {
 public:
  virtual ~CudnnPlan() = default;
  virtual std::int64_t workspace_bytes() const = 0;
  /// `a`, `b`, `c` are x and the filter, or q, k and v, and `d` what is added to the scores.
  virtual void run(const void* a, const void* b, const void* c, void* out, void* workspace, const void* d = nullptr) = 0;
};

/// Dimensions are logical: x [n, i, ..], filter [o, i/groups, ..], y [n, o, ..], with the strides in elements in which they lie.
struct Convolution {
  DType dtype = DType::f16;
  Shape x, x_strides, filter, filter_strides, y, y_strides;
  Shape stride, before, after;  ///< padding before and behind
};

/// q [n, heads, queries, d], k [n, groups, keys, d], v [n, groups, keys, e], out [n, heads, queries, e].
struct AttentionSizes {
  DType dtype = DType::f16;
  Shape q, q_strides, k, k_strides, v, v_strides, out, out_strides;
  Shape mask, mask_strides;  ///< [n|1, heads|1, queries|1, keys], of this dtype and added to the scores; empty: there is none
  double scale = 1;
};

/// Null where cuDNN has nothing for it on this device.
std::shared_ptr<CudnnPlan> plan_convolution(Context& context, const Convolution& convolution);
std::shared_ptr<CudnnPlan> plan_attention(Context& context, const AttentionSizes& attention);

}  // namespace comfytp::backend::cuda
