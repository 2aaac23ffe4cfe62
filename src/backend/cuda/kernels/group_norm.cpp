// group_norm: sums over pieces of every sample, then one pass that adds them up and norms; and group_moments.
#include "backend/cuda/kernels/group_norm.h"

#include "backend/cuda/kernel_table.h"
#include "backend/cuda/status.h"

namespace comfytp::backend::cuda {
namespace {

GroupNorm sizes_of(const Site& site) {
  const auto& x = site.shape(0);
  GroupNorm norm;
  norm.samples = x[0];
  norm.channels = x[1];
  norm.rows = 1;
  for (std::size_t d = 2; d < x.size(); ++d) norm.rows *= x[d];
  norm.groups = static_cast<int>(site.attrs().integer("groups"));
  divide(norm, site.in[0].type.dtype);
  return norm;
}

std::unique_ptr<Kernel> make_norm(const Site& site) {
  const DType dtype = site.in[0].type.dtype;
  expect_real(site, dtype);
  GroupNorm norm = sizes_of(site);
  norm.epsilon = static_cast<float>(site.attrs().real("epsilon"));
  norm.silu = site.attrs().text_or("activation", "") == "silu";
  const bool given = site.in.size() == 4;
  if (given) norm.parts = static_cast<int>(site.shape(3)[0]);
  return make_kernel(
      [=, stream = site.context.stream](auto in, auto out, void* workspace) {
        if (given)
          return check(launch_group_norm(norm, dtype, in[0], in[1], in[2], static_cast<const float*>(in[3]), nullptr, out[0], stream), "group_norm");
        float *sums = static_cast<float*>(workspace), *shifts = sums + 2 * norm.sets() * norm.pieces;
        check(launch_group_sums(norm, dtype, in[0], sums, shifts, stream), "group_norm");
        check(launch_group_norm(norm, dtype, in[0], in[1], in[2], sums, shifts, out[0], stream), "group_norm");
      },
      given ? 0 : norm.workspace_bytes());
}

std::unique_ptr<Kernel> make_moments(const Site& site) {
  const DType dtype = site.in[0].type.dtype;
  expect_real(site, dtype);
  const GroupNorm norm = sizes_of(site);
  return make_kernel(
      [=, stream = site.context.stream](auto in, auto out, void* workspace) {
        float *sums = static_cast<float*>(workspace), *shifts = sums + 2 * norm.sets() * norm.pieces;
        check(launch_group_sums(norm, dtype, in[0], sums, shifts, stream), "group_moments");
        check(launch_group_moments(norm, sums, shifts, static_cast<float*>(out[0]), stream), "group_moments");
      },
      norm.workspace_bytes());
}

const bool registered = register_kernel("group_norm", {make_norm, {}}) && register_kernel("group_moments", {make_moments, {}});

}  // namespace
}  // namespace comfytp::backend::cuda
