// linear: cuBLASLt with a bias at most; few rows by a kernel that does the whole epilogue.
#include "backend/cuda/kernels/linear.h"

#include "backend/cuda/kernels/contraction.h"
#include "backend/cuda/matmul.h"
#include "backend/cuda/status.h"
#include "graph/ops/epilogue.h"

namespace comfytp::backend::cuda {
namespace {

std::unique_ptr<Kernel> make(const Site& site) {
  const DType dtype = site.in[0].type.dtype;
  expect_real(site, dtype);
  const auto& y = site.out[0].type.shape;
  const auto outputs = y.back(), inner = site.shape(1)[1], rows = outputs ? numel(y) / outputs : 0;
  const auto channel = y.size() - 1;
  const auto stream = site.context.stream;
  if (inner == 0) {
    const Epilogue epilogue(site, channel);
    return make_kernel([=, bytes = site.out[0].type.bytes()](auto in, auto out, void*) {
      check(cudaMemsetAsync(out[0], 0, static_cast<std::size_t>(bytes), stream), "linear");
      epilogue.run(in, out[0]);
    });
  }
  if (rows <= kFewRows && inner * size_of(dtype) % 16 == 0 && inner < (1 << 30)) {
    const Epilogue epilogue(site, channel);
    return make_kernel([=](auto in, auto out, void*) {
      check(launch_few_rows(dtype, rows, inner, outputs, in[0], in[1], epilogue.chain(), chain_operands(epilogue.chain(), in, 2), out[0], stream), "linear");
    });
  }
  const auto steps = graph::epilogue_of(site.attrs());
  const bool bias = !steps.empty() && steps[0] == "bias";
  MatmulSizes sizes;
  sizes.dtype = dtype;
  sizes.rows = rows;
  sizes.inner = inner;
  sizes.outputs = outputs;
  sizes.bias = bias;
  const Epilogue epilogue(site, channel, bias ? 1 : 0);
  auto matmul = std::make_shared<Matmul>(site.context, sizes);
  const auto workspace = matmul->workspace_bytes();
  return make_kernel(
      [=](auto in, auto out, void* work) {
        matmul->run(in[0], in[1], bias ? in[2] : nullptr, out[0], work);
        epilogue.run(in, out[0]);
      },
      workspace);
}

const bool registered = register_kernel("linear", {make, {}});

}  // namespace
}  // namespace comfytp::backend::cuda
