// matmul of two activations, row-major, by cuBLASLt over the batch.
#include "backend/cuda/matmul.h"

#include "backend/cuda/kernel_table.h"
#include "backend/cuda/status.h"

namespace comfytp::backend::cuda {
namespace {

std::unique_ptr<Kernel> make(const Site& site) {
  const DType dtype = site.in[0].type.dtype;
  expect_real(site, dtype);
  const auto &a = site.shape(0), &y = site.out[0].type.shape;
  const auto bytes = static_cast<std::size_t>(site.out[0].type.bytes());
  MatmulSizes sizes;
  sizes.dtype = dtype;
  sizes.rows = y[y.size() - 2];
  sizes.inner = a.back();
  sizes.outputs = y.back();
  sizes.w_transposed = true;
  if (bytes == 0 || sizes.inner == 0)
    return make_kernel([bytes, stream = site.context.stream](auto, auto out, void*) {
      if (bytes) check(cudaMemsetAsync(out[0], 0, bytes, stream), "matmul");
    });
  sizes.batch = numel(Shape(y.begin(), y.end() - 2));
  sizes.x_stride = sizes.rows * sizes.inner;
  sizes.w_stride = sizes.inner * sizes.outputs;
  sizes.y_stride = sizes.rows * sizes.outputs;
  const auto matmul = std::make_shared<Matmul>(site.context, sizes);
  return make_kernel([matmul](auto in, auto out, void* workspace) { matmul->run(in[0], in[1], nullptr, out[0], workspace); }, matmul->workspace_bytes());
}

const bool registered = register_kernel("matmul", {make, {}});

}  // namespace
}  // namespace comfytp::backend::cuda
