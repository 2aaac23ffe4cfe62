#include "backend/cuda/kernels/broadcasting.h"

#include <algorithm>
#include <array>
#include <vector>

#include "backend/cuda/kernel_table.h"
#include "backend/cuda/status.h"

namespace comfytp::backend::cuda {
namespace {

// The output's dimensions as they lie in its memory, without those of size 1, neighbours merged where every operand allows it.
Broadcast plan(const Site& site) {
  struct Dim {
    std::int64_t size = 1;
    std::array<std::int64_t, 3> stride{};
  };
  const auto& out = site.out[0];
  const auto& shape = out.type.shape;
  std::vector<Dim> merged;
  for (int o : out.order) {
    const auto d = static_cast<std::size_t>(o);
    if (shape[d] == 1) continue;
    Dim dim{shape[d], {}};
    for (std::size_t i = 0; i < site.in.size(); ++i) {
      const auto& own = site.shape(i);
      const auto skip = shape.size() - own.size();
      if (d >= skip && own[d - skip] != 1) dim.stride[i] = site.strides(i)[d - skip];
    }
    bool merges = !merged.empty();
    for (std::size_t i = 0; merges && i < 3; ++i) merges = merged.back().stride[i] == dim.stride[i] * dim.size;
    if (merges)
      merged.back() = {merged.back().size * dim.size, dim.stride};
    else
      merged.push_back(dim);
  }
  if (merged.empty()) merged.push_back({});
  require(merged.size() <= kMaxRank, "[{}] expected operands that broadcast along at most {} dimensions on {} but got {}", site.op(), kMaxRank,
          site.context.name, merged.size());
  Broadcast b;
  b.rank = static_cast<int>(merged.size());
  b.count = numel(shape);
  for (std::size_t d = 0; d < merged.size(); ++d) {
    b.size[d] = merged[d].size;
    for (std::size_t i = 0; i < 3; ++i) b.stride[i][d] = merged[d].stride[i];
  }
  return b;
}

template <BinaryKind kKind>
std::unique_ptr<Kernel> make(const Site& site) {
  const DType dtype = site.in[0].type.dtype;
  if (is_float(dtype)) expect_real(site, dtype);
  return make_kernel([dtype, b = plan(site), stream = site.context.stream](auto in, auto out, void*) {
    check(launch_binary(kKind, dtype, b, in[0], in[1], out[0], stream), "a broadcasting op");
  });
}

std::unique_ptr<Kernel> make_where(const Site& site) {
  return make_kernel([element = size_of(site.in[1].type.dtype), b = plan(site), stream = site.context.stream](auto in, auto out, void*) {
    check(launch_where(element, b, in[0], in[1], in[2], out[0], stream), "where");
  });
}

#define COMFYTP_REGISTER(NAME) register_kernel(#NAME, {make<BinaryKind::NAME>, {}})
const bool registered = COMFYTP_REGISTER(add) && COMFYTP_REGISTER(sub) && COMFYTP_REGISTER(mul) && COMFYTP_REGISTER(div) &&
                        COMFYTP_REGISTER(pow) && COMFYTP_REGISTER(maximum) && COMFYTP_REGISTER(minimum) && COMFYTP_REGISTER(equal) &&
                        COMFYTP_REGISTER(not_equal) && COMFYTP_REGISTER(less) && COMFYTP_REGISTER(less_equal) && COMFYTP_REGISTER(greater) &&
                        COMFYTP_REGISTER(greater_equal) && register_kernel("where", {make_where, {}});
#undef COMFYTP_REGISTER

}  // namespace
}  // namespace comfytp::backend::cuda
