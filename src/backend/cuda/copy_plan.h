// From shapes and strides to a StridedCopy with as few dimensions as possible.
#pragma once

#include "backend/cuda/copy.h"
#include "base/shape.h"

namespace comfytp::backend::cuda {

/// Throws Error when more than kMaxRank dimensions are left.
StridedCopy plan_copy(const Shape& shape, DType source, const Shape& from, DType target, const Shape& to);

}  // namespace comfytp::backend::cuda
