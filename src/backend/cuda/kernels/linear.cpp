// linear: cuBLASLt with a bias at most, or with a bias and tanh gelu where that is faster than a pass; few rows by a kernel that does the whole
// epilogue.
#include "backend/cuda/kernels/linear.h"

#include <algorithm>
#include <array>
#include <vector>

#include "backend/cuda/kernels/contraction.h"
#include "backend/cuda/matmul.h"
#include "backend/cuda/status.h"
#include "backend/cuda/stopwatch.h"
#include "backend/cuda/tuning.h"
#include "graph/ops/epilogue.h"

namespace comfytp::backend::cuda {
namespace {

// The matmul does the bias and tanh gelu, as far as `sizes` says so, and a pass what is left.
std::unique_ptr<Kernel> make_matmul(const Site& site, std::shared_ptr<Matmul> matmul, const MatmulSizes& sizes) {
  const bool bias = sizes.bias;
  const Epilogue epilogue(site, site.out[0].type.shape.size() - 1, std::size_t{sizes.bias} + std::size_t{sizes.gelu});
  const auto workspace = matmul->workspace_bytes();
  return make_kernel(
      [=](auto in, auto out, void* work) {
        matmul->run(in[0], in[1], bias ? in[2] : nullptr, out[0], work);
        epilogue.run(in, out[0]);
      },
      workspace);
}

// Of two kernels of the site: from what is remembered of this device, else by timing both.
bool is_faster(const Site& site, const MatmulSizes& sizes, Kernel& kernel, Kernel& other) {
  auto& tuning = tuning_of(site.context);
  const auto key = fmt::format("linear {} {}x{}->{} {}", name_of(sizes.dtype), sizes.rows, sizes.inner, sizes.outputs, site.attrs().text("epilogue"));
  if (const auto known = tuning.find(key)) return *known == "matmul";
  Stopwatch watch(site.context.stream);
  std::vector<const void*> in;
  for (const auto& operand : site.in) in.push_back(watch.allocate(operand.type.bytes()));
  void *y = watch.allocate(site.out[0].type.bytes()), *work = watch.allocate(std::max(kernel.workspace_bytes(), other.workspace_bytes()));
  if (!y || !work || std::find(in.begin(), in.end(), nullptr) != in.end()) return false;  // not timed, and so not remembered
  const auto time = [&](Kernel& one) {
    return watch.time([&] {
      try {
        one.run(in, std::array{y}, work);
      } catch (const DeviceFailure&) {
        throw;
      } catch (const Error&) {
        return false;  // an algorithm that the library proposed and cannot run
      }
      return true;
    });
  };
  const bool faster = time(kernel) < time(other);
  tuning.store(key, faster ? "matmul" : "pass");
  return faster;
}

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
  const std::size_t bias = !steps.empty() && steps[0] == "bias";
  MatmulSizes sizes;
  sizes.dtype = dtype;
  sizes.rows = rows;
  sizes.inner = inner;
  sizes.outputs = outputs;
  sizes.bias = bias && steps.size() == 1;  // else the pass that is left adds it
  auto kernel = make_matmul(site, std::make_shared<Matmul>(site.context, sizes), sizes);
  if (steps.size() != bias + 1 || steps.back() != "gelu_tanh" || dtype == DType::f32) return kernel;
  sizes.bias = bias;
  sizes.gelu = true;
  const auto matmul = matmul_if_any(site.context, sizes);
  if (!matmul) return kernel;
  auto at_once = make_matmul(site, matmul, sizes);
  return is_faster(site, sizes, *at_once, *kernel) ? std::move(at_once) : std::move(kernel);
}

const bool registered = register_kernel("linear", {make, {}});

}  // namespace
}  // namespace comfytp::backend::cuda
