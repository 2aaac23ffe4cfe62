// attention: cuDNN's flash attention where it takes the case, a kernel of our own elsewhere.
#include "backend/cuda/kernels/attention.h"

#include <algorithm>

#include "backend/alignment.h"
#include "backend/cuda/cudnn.h"
#include "backend/cuda/kernel_table.h"
#include "backend/cuda/status.h"

namespace comfytp::backend::cuda {
namespace {

std::unique_ptr<Kernel> make(const Site& site) {
  const DType dtype = site.in[0].type.dtype;
  expect_real(site, dtype);
  const auto &q = site.shape(0), &k = site.shape(1), &v = site.shape(2);
  const auto out_strides = graph::strides_of(site.out[0].type.shape, site.out[0].order);
  const double scale = site.attrs().real("scale");
  const bool masked = site.in.size() == 4, boolean = masked && site.in[3].type.dtype == DType::boolean;
  AnyAttention a;
  a.n = q[0], a.heads = q[1], a.queries = q[2], a.d = q[3], a.groups = k[1], a.keys = k[2], a.e = v[3];
  require(a.d <= kMostHead && a.e <= kMostHead && a.heads <= 65535 && a.n <= 65535, "[attention] expected heads of at most {} channels but got {} and {}",
          kMostHead, a.d, a.e);
  a.scale = static_cast<float>(scale);
  const auto copy = [](std::int64_t (&to)[3], const Shape& from) { std::copy_n(from.begin(), 3, to); };
  copy(a.q, site.strides(0));
  copy(a.k, site.strides(1));
  copy(a.v, site.strides(2));
  copy(a.out, out_strides);
  if (masked) {
    a.mask = boolean ? AnyAttention::Mask::boolean : AnyAttention::Mask::added;
    const auto strides = site.strides(3);
    for (std::size_t d = 0; d < 3; ++d) a.mask_strides[d] = site.shape(3)[d] == 1 ? 0 : strides[d];
  }
  if (dtype != DType::f32 && numel(q) && numel(k) && numel(v) && q[3] % 8 == 0 && v[3] % 8 == 0) {
    AttentionSizes sizes{dtype, q, site.strides(0), k, site.strides(1), v, site.strides(2), site.out[0].type.shape, out_strides, {}, {}, scale};
    if (masked) sizes.mask = site.shape(3), sizes.mask_strides = site.strides(3);
    if (auto plan = plan_attention(site.context, sizes)) {
      const auto workspace = plan->workspace_bytes();
      if (!boolean)
        return make_kernel([plan, masked](auto in, auto out, void* work) { plan->run(in[0], in[1], in[2], out[0], work, masked ? in[3] : nullptr); }, workspace);
      // The rows of the mask one by one, as numbers of rows.
      const auto keys = k[2], rows = numel(site.shape(3)) / keys;
      AnyAttention by_row = a;
      for (auto& stride : by_row.mask_strides) stride /= keys;
      const auto added_at = aligned(workspace), sees_at = added_at + aligned(numel(site.shape(3)) * size_of(dtype));
      return make_kernel(
          [=, stream = site.context.stream](auto in, auto out, void* work) {
            char *added = static_cast<char*>(work) + added_at, *sees = static_cast<char*>(work) + sees_at;
            check(launch_mask(dtype, rows, keys, in[3], added, reinterpret_cast<bool*>(sees), stream), "attention");
            plan->run(in[0], in[1], in[2], out[0], work, added);
            check(launch_clear_unseeing(by_row, dtype, reinterpret_cast<const bool*>(sees), out[0], stream), "attention");
          },
          sees_at + rows);
    }
  }
  return make_kernel([=, stream = site.context.stream](auto in, auto out, void*) {
    check(launch_any_attention(a, dtype, in[0], in[1], in[2], masked ? in[3] : nullptr, out[0], stream), "attention");
  });
}

const bool registered = register_kernel("attention", {make, {}});

}  // namespace
}  // namespace comfytp::backend::cuda
