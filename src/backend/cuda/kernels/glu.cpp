#include "backend/cuda/kernels/glu.h"

#include "backend/cuda/chain_plan.h"
#include "backend/cuda/kernel_table.h"
#include "backend/cuda/status.h"
#include "graph/ops/glu.h"

namespace comfytp::backend::cuda {
namespace {

std::unique_ptr<Kernel> make(const Site& site) {
  const DType dtype = site.in[0].type.dtype;
  expect_real(site, dtype);
  const auto kind = step_kind(site.attrs().text("activation"));
  const auto biases = graph::glu_biases(site.attrs(), 2);
  const auto columns = site.shape(0).back(), rows = columns ? numel(site.shape(0)) / columns : 0;
  return make_kernel([=, stream = site.context.stream](auto in, auto out, void*) {
    const auto bias = [&](std::size_t i) { return i ? in[i] : nullptr; };
    check(launch_glu(kind, dtype, rows, columns, in[0], in[1], bias(biases.value), bias(biases.gate), out[0], stream), "glu");
  });
}

const bool registered = register_kernel("glu", {make, {}});

}  // namespace
}  // namespace comfytp::backend::cuda
