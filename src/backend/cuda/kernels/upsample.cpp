#include "backend/cuda/kernels/upsample.h"

#include "backend/cuda/kernel_table.h"
#include "backend/cuda/status.h"

namespace comfytp::backend::cuda {
namespace {

std::unique_ptr<Kernel> make(const Site& site) {
  const auto &x = site.shape(0), &y = site.out[0].type.shape;
  const auto& a = site.attrs();
  Upsample u;
  u.samples = x[0];
  u.pixel = x[1] * size_of(site.out[0].type.dtype);
  for (std::size_t d = 0; d < 2; ++d) {
    u.in[d] = x[2 + d];
    u.out[d] = y[2 + d];
    u.from[d] = a.ints("from")[d];
    u.to[d] = a.ints("to")[d];
    u.from_offset[d] = a.ints("from_offset")[d];
    u.to_offset[d] = a.ints("to_offset")[d];
  }
  return make_kernel([u, stream = site.context.stream](auto in, auto out, void*) { check(launch_upsample(u, in[0], out[0], stream), "upsample_nearest"); });
}

const bool registered = register_kernel("upsample_nearest", {make, {}});

}  // namespace
}  // namespace comfytp::backend::cuda
