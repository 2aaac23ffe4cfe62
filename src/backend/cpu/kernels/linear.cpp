// linear as a oneDNN matmul.
#include "backend/cpu/contraction.h"

namespace comfytp::backend::cpu {
namespace {

std::unique_ptr<Kernel> make(const Site& site) {
  const DType dtype = site.in[0].type.dtype;
  expect_real(site, dtype);
  ContractionSizes sizes;
  const auto& y = site.out[0].type.shape;
  sizes.rows = numel(Shape(y.begin(), y.end() - 1));
  sizes.outputs = y.back();
  sizes.weight = site.shape(1);
  sizes.zero = sizes.weight[1] == 0;
  if (sizes.zero) sizes.weight[1] = 1;
  sizes.source = {sizes.rows, sizes.weight[1]};
  return make_contraction(site, sizes, sizes.outputs ? matmul_contraction(dtype, sizes.rows, sizes.weight) : nullptr);
}

const bool registered = register_kernel("linear", {make, 1});

}  // namespace
}  // namespace comfytp::backend::cpu
