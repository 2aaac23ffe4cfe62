#include "backend/cuda/kernels/glu.h"

#include "backend/cuda/chain_plan.h"
#include "backend/cuda/kernel_table.h"
#include "backend/cuda/status.h"

namespace comfytp::backend::cuda {
namespace {

std::unique_ptr<Kernel> make(const Site& site) {
  const DType dtype = site.in[0].type.dtype;
  expect_real(site, dtype);
  const auto &activation = site.attrs().text("activation"), &biases = site.attrs().text("biases");
  const auto kind = step_kind(activation);
  const auto columns = site.shape(0).back(), rows = columns ? numel(site.shape(0)) / columns : 0;
  const bool value = biases.starts_with("value"), gate = biases.ends_with("gate");
  return make_kernel([=, stream = site.context.stream](auto in, auto out, void*) {
    check(launch_glu(kind, dtype, rows, columns, in[0], in[1], value ? in[2] : nullptr, gate ? in.back() : nullptr, out[0], stream), "glu");
  });
}

const bool registered = register_kernel("glu", {make, {}});

}  // namespace
}  // namespace comfytp::backend::cuda
