// Several linears of one x: one batched matmul where their weights lie as far from each other as their results do, otherwise one by one.
#include "backend/alignment.h"
#include "backend/cuda/kernel_table.h"
#include "backend/cuda/matmul.h"
#include "backend/linears.h"

namespace comfytp::backend::cuda {
namespace {

// Null where no matmul can do them all.
std::shared_ptr<Matmul> make_together(const Site& site, std::int64_t w_step, std::int64_t y_step) {
  const DType dtype = site.in[0].type.dtype;
  const auto count = site.out.size(), weights = site.in.size() - 1;
  for (std::size_t k = 0; k < count; ++k)
    if (weights != count || site.in[1 + k].type != site.in[1].type || site.strides(1 + k) != row_major_strides(site.shape(1)) ||
        site.out[k].order != graph::row_major(site.out[k].type.shape.size()) || site.dtype(1 + k) != dtype)
      return nullptr;
  if (site.in[0].order != graph::row_major(site.shape(0).size())) return nullptr;
  MatmulSizes sizes;
  sizes.dtype = dtype;
  sizes.outputs = site.shape(1)[0];
  sizes.inner = site.shape(1)[1];
  sizes.rows = sizes.outputs ? numel(site.out[0].type.shape) / sizes.outputs : 0;
  if (sizes.rows == 0 || sizes.inner == 0) return nullptr;
  sizes.batch = static_cast<std::int64_t>(count);
  sizes.w_stride = w_step / size_of(dtype);
  sizes.y_stride = y_step / size_of(dtype);
  return matmul_if_any(site.context, sizes);
}

// Whether pointers are `step` bytes apart.
template <typename Pointer>
bool in_steps(std::span<const Pointer> pointers, std::int64_t step) {
  for (std::size_t k = 1; k < pointers.size(); ++k)
    if (static_cast<const char*>(pointers[k]) != static_cast<const char*>(pointers[k - 1]) + step) return false;
  return true;
}

std::unique_ptr<Kernel> make(const Site& site) {
  const auto compile = [&](const graph::Node& node, std::span<const Operand> in, std::span<const Operand> out) {
    return find_kernel("linear")->make({node, in, out, site.context});
  };
  std::shared_ptr<Kernel> apart = std::make_unique<ComposedLinears>(site.node, site.in, site.out, compile);
  // As results are laid and weights loaded side by side.
  const auto w_step = aligned(site.in[1].type.bytes()), y_step = aligned(site.out[0].type.bytes());
  const auto together = make_together(site, w_step, y_step);
  const auto workspace = std::max(apart->workspace_bytes(), together ? together->workspace_bytes() : 0);
  return make_kernel(
      [=, count = site.out.size()](auto in, auto out, void* work) {
        const std::span<const void* const> weights = in.subspan(1, count);
        const std::span<void* const> results = out;
        if (together && in_steps(weights, w_step) && in_steps(results, y_step))
          together->run(in[0], in[1], nullptr, out[0], work);
        else
          apart->run(in, out, work);
      },
      workspace);
}

const bool registered = register_kernel("linears", {make, {}});

}  // namespace
}  // namespace comfytp::backend::cuda
