#include "backend/cuda/kernels/pointwise.h"

#include "backend/cuda/chain_plan.h"
#include "backend/cuda/kernel_table.h"
#include "backend/cuda/status.h"

namespace comfytp::backend::cuda {
namespace {

std::unique_ptr<Kernel> make(const Site& site) {
  const DType dtype = narrow_dtype(site), from = site.in[0].type.dtype, to = site.out[0].type.dtype;
  expect_real(site, dtype);
  const auto channel = static_cast<std::size_t>(site.attrs().integer_or("channel", 0));
  const auto chain = plan_chain(site.attrs().text("steps"), site.in[0], site.in.subspan(1), channel, false);
  return make_kernel([=, stream = site.context.stream](auto in, auto out, void*) {
    check(launch_pointwise(chain, chain_operands(chain, in, 1), from, to, dtype, in[0], out[0], stream), "pointwise");
  });
}

const bool registered = register_kernel("pointwise", {make, {}});

}  // namespace
}  // namespace comfytp::backend::cuda
