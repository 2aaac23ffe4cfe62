#include "base/tensor_view.h"

#include <algorithm>
#include <numeric>

#include "base/error.h"

namespace comfytp {

TensorView part_of(const TensorView& view, const Box& box) {
  require(box.size() == view.shape.size(), "[slice] expected {} intervals but got {}", view.shape.size(), box.size());
  TensorView part = view;
  std::int64_t offset = 0;
  for (std::size_t d = 0; d < box.size(); ++d) {
    require(box[d].lo >= 0 && box[d].lo <= box[d].hi && box[d].hi <= view.shape[d],
            "[slice] expected an interval inside [0,{}) of dimension {} but got [{},{})", view.shape[d], d, box[d].lo, box[d].hi);
    offset += box[d].lo * view.strides[d];
    part.shape[d] = box[d].size();
  }
  part.data = static_cast<char*>(view.data) + offset * size_of(view.dtype);
  return part;
}

TensorView part_of(const TensorView& view, int dim, std::int64_t lo, std::int64_t hi) {
  Box box = whole_box(view.shape);
  box[static_cast<std::size_t>(dim)] = {lo, hi};
  return part_of(view, box);
}

namespace {

struct Loop {
  std::int64_t size, from, to;  // strides of source and target, in elements
};

void copy_loops(const char* source, DType s, char* target, DType t, const Loop* loops, std::size_t count) {
  if (count == 0) {
    convert(source, s, target, t, 1);
  } else if (count == 1 && loops->from == 1 && loops->to == 1) {
    convert(source, s, target, t, loops->size);
  } else {
    for (std::int64_t i = 0; i < loops->size; ++i)
      copy_loops(source + i * loops->from * size_of(s), s, target + i * loops->to * size_of(t), t, loops + 1, count - 1);
  }
}

}  // namespace

void copy(const TensorView& source, const TensorView& target) {
  require(source.host && target.host, "[copy] expected tensors in host memory but got one on a device");
  require(source.shape == target.shape, "[copy] expected shape {} but got {}", to_string(target.shape), to_string(source.shape));
  if (target.numel() == 0) return;
  std::vector<Loop> loops;
  for (std::size_t d = 0; d < source.shape.size(); ++d)
    if (source.shape[d] != 1) loops.push_back({source.shape[d], source.strides[d], target.strides[d]});
  // The target is written in the order it lies in memory.
  std::stable_sort(loops.begin(), loops.end(), [](const Loop& a, const Loop& b) { return a.to > b.to; });
  std::vector<Loop> merged;
  for (const auto& loop : loops) {
    if (!merged.empty() && merged.back().from == loop.from * loop.size && merged.back().to == loop.to * loop.size)
      merged.back() = {merged.back().size * loop.size, loop.from, loop.to};
    else
      merged.push_back(loop);
  }
  copy_loops(static_cast<const char*>(source.data), source.dtype, static_cast<char*>(target.data), target.dtype, merged.data(),
             merged.size());
}

}  // namespace comfytp
