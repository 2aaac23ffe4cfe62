// Moving a tensor from one strided place to another, with conversion of the dtype, on all threads of the device.
#pragma once

#include <vector>

#include "base/dtype.h"
#include "base/shape.h"
#include "graph/op.h"

namespace comfytp::backend::cpu {

/// One dimension of a loop nest: its size and what a step in it moves each operand by, in elements.
template <int kOperands>
struct Loop {
  std::int64_t size = 1;
  std::int64_t step[kOperands] = {};
};

/// The loops over `shape`, outermost in `order` first, without dimensions of size 1 and with neighbours that are
/// contiguous in every operand merged. Never empty.
template <int kOperands>
std::vector<Loop<kOperands>> nest(const Shape& shape, const graph::Order& order, const Shape (&strides)[kOperands]) {
  std::vector<Loop<kOperands>> loops;
  for (int d : order) {
    if (shape[d] == 1) continue;
    Loop<kOperands> loop{shape[d], {}};
    bool merges = !loops.empty();
    for (int k = 0; k < kOperands; ++k) {
      loop.step[k] = strides[k][d];
      merges = merges && loops.back().step[k] == loop.step[k] * loop.size;
    }
    if (merges)
      loop.size *= loops.back().size, loops.back() = loop;
    else
      loops.push_back(loop);
  }
  if (loops.empty()) loops.emplace_back();
  return loops;
}

class CopyPlan {
 public:
  /// Strides in elements, by dimension. fp8 cannot be written from another type: throws Error.
  CopyPlan(const Shape& shape, DType from, const Shape& from_strides, DType to, const Shape& to_strides);
  void run(const void* source, void* target) const;

 private:
  void rows(const char* source, char* target) const;
  void tiles(const char* source, char* target) const;
  void offsets(std::int64_t index, std::int64_t& from, std::int64_t& to) const;

  DType from_, to_;
  std::vector<Loop<2>> outer_;  ///< all but the loops below
  Loop<2> inner_;               ///< contiguous in the target
  Loop<2> across_;              ///< contiguous in the source, where inner_ is not
  std::int64_t outer_size_ = 1;
  bool empty_ = false;
};

}  // namespace comfytp::backend::cpu
