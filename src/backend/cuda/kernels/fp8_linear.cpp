// A linear that asks for its product in fp8: by cuBLASLt, where the weight is stored in fp8 and the GPU and the sizes allow it. Otherwise the
// weight is decoded and all goes as in any other linear.
#include "backend/cuda/copy.h"
#include "backend/cuda/copy_plan.h"
#include "backend/cuda/kernels/contraction.h"
#include "backend/cuda/kernels/fp8.h"
#include "backend/cuda/kernels/linear.h"
#include "backend/cuda/matmul.h"
#include "backend/cuda/status.h"
#include "base/error.h"
#include "graph/ops/epilogue.h"

namespace comfytp::backend::cuda {
namespace {

constexpr std::int64_t rounded_up(std::int64_t bytes) { return (bytes + 255) / 256 * 256; }

std::unique_ptr<Kernel> make_decoding(const Site& site) {
  const auto& plain = *find_kernel("linear");
  const DType dtype = site.in[0].type.dtype;
  if (site.dtype(1) == dtype) return plain.make(site);
  std::vector<Operand> in(site.in.begin(), site.in.end());
  in[1] = {{dtype, site.shape(1)}, graph::row_major(2)};
  std::shared_ptr<Kernel> linear = plain.make({site.node, in, site.out, site.context});
  const auto copy = plan_copy(site.shape(1), site.dtype(1), site.strides(1), dtype, row_major_strides(site.shape(1)));
  const auto bytes = rounded_up(in[1].type.bytes());
  return make_kernel(
      [=, stream = site.context.stream](auto operands, auto out, void* workspace) {
        check(launch_copy(copy, operands[1], workspace, stream), "decoding a weight");
        std::vector<const void*> decoded(operands.begin(), operands.end());
        decoded[1] = workspace;
        linear->run(decoded, out, static_cast<char*>(workspace) + bytes);
      },
      bytes + linear->workspace_bytes());
}

std::unique_ptr<Kernel> make(const Site& site) {
  const DType dtype = site.in[0].type.dtype, stored = site.dtype(1);
  expect_real(site, dtype);
  const auto& y = site.out[0].type.shape;
  MatmulSizes sizes;
  sizes.dtype = dtype;
  sizes.outputs = site.shape(1)[0];
  sizes.inner = site.shape(1)[1];
  sizes.rows = sizes.outputs ? numel(y) / sizes.outputs : 0;
  sizes.fp8_weight = stored;
  const auto& gpu = site.context.properties;
  const bool multiplies = gpu.major > 8 || (gpu.major == 8 && gpu.minor == 9);
  const bool fp8 = stored == DType::f8_e4m3 || stored == DType::f8_e5m2;
  const bool as_stored = site.strides(1) == row_major_strides(site.shape(1));
  if (!multiplies || !fp8 || !as_stored || dtype == DType::f32 || sizes.rows <= kFewRows || sizes.inner == 0 || sizes.inner % 16 || sizes.outputs % 16)
    return make_decoding(site);
  const auto steps = graph::epilogue_of(site.attrs());
  sizes.bias = !steps.empty() && steps[0] == "bias";
  const Epilogue epilogue(site, y.size() - 1, sizes.bias ? 1 : 0);
  std::shared_ptr<Matmul> matmul;
  try {
    matmul = std::make_shared<Matmul>(site.context, sizes);
  } catch (const DeviceFailure&) {
    throw;
  } catch (const Error&) {  // the library has no algorithm for these sizes
    return make_decoding(site);
  }
  const auto count = sizes.rows * sizes.inner, bytes = rounded_up(count), before = bytes + rounded_up(2 * sizeof(float));
  return make_kernel(
      [=, bias = sizes.bias, stream = site.context.stream](auto in, auto out, void* workspace) {
        auto* memory = static_cast<char*>(workspace);
        auto* scale = reinterpret_cast<float*>(memory + bytes);
        check(launch_to_fp8(dtype, in[0], count, memory, scale, stream), "rounding to fp8");
        matmul->run(memory, in[1], bias ? in[2] : nullptr, out[0], memory + before, scale);
        epilogue.run(in, out[0]);
      },
      before + matmul->workspace_bytes());
}

const bool registered = register_kernel("linear in fp8", {make, {1}});

}  // namespace
}  // namespace comfytp::backend::cuda
