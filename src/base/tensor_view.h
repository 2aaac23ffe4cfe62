// A tensor in somebody else's memory.
#pragma once

#include "base/dtype.h"
#include "base/shape.h"

namespace comfytp {

/// Does not own its memory. Strides are in elements and may be anything, 0 included. Only views with `host` set may be looked into;
/// others lie on a device and are for backends.
struct TensorView {
  void* data = nullptr;
  DType dtype = DType::f32;
  Shape shape;
  Shape strides;
  bool host = true;
  int ordinal = 0;  ///< of the GPU that it lies on, where it is not the host's

  static TensorView dense(void* data, DType dtype, Shape shape) {
    auto strides = row_major_strides(shape);
    return {data, dtype, std::move(shape), std::move(strides)};
  }
  std::int64_t numel() const { return comfytp::numel(shape); }
  std::int64_t bytes() const { return numel() * size_of(dtype); }
};

/// The part of `view` inside `box`; no data moves.
TensorView part_of(const TensorView& view, const Box& box);
/// The part with [lo, hi) of dimension dim.
TensorView part_of(const TensorView& view, int dim, std::int64_t lo, std::int64_t hi);

/// Copies element by element with conversion of the type; shapes must be equal. Neighbouring dimensions that are
/// contiguous on both sides are moved as blocks.
void copy(const TensorView& source, const TensorView& target);

}  // namespace comfytp
