#include "backend/cuda/copy_plan.h"

#include <algorithm>
#include <vector>

#include "base/error.h"

namespace comfytp::backend::cuda {

StridedCopy plan_copy(const Shape& shape, DType source, const Shape& from, DType target, const Shape& to) {
  struct Dim {
    std::int64_t size, from, to;
  };
  std::vector<Dim> dims;
  for (std::size_t d = 0; d < shape.size(); ++d)
    if (shape[d] != 1) dims.push_back({shape[d], from[d], to[d]});
  // In the target's order, so that neighbouring threads write neighbouring elements.
  std::stable_sort(dims.begin(), dims.end(), [](const Dim& a, const Dim& b) { return a.to > b.to; });
  std::vector<Dim> merged;
  for (const auto& dim : dims) {
    if (!merged.empty() && merged.back().from == dim.from * dim.size && merged.back().to == dim.to * dim.size)
      merged.back() = {merged.back().size * dim.size, dim.from, dim.to};
    else
      merged.push_back(dim);
  }
  require(merged.size() <= kMaxRank, "[copy] expected at most {} dimensions but got {}", kMaxRank, merged.size());
  StridedCopy copy;
  copy.rank = static_cast<int>(merged.size());
  copy.source = source;
  copy.target = target;
  for (std::size_t d = 0; d < merged.size(); ++d) copy.size[d] = merged[d].size, copy.from[d] = merged[d].from, copy.to[d] = merged[d].to;
  return copy;
}

}  // namespace comfytp::backend::cuda
