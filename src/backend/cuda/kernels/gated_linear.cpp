// gated_linear: on Hopper a kernel that multiplies and gates at once, where that is faster than two matmuls and a pass.
#include "backend/gated_linear.h"

#include "backend/cuda/chain_plan.h"
#include "backend/cuda/hopper/gated_linear.h"
#include "backend/cuda/kernel_table.h"
#include "backend/cuda/kernels/linear.h"
#include "backend/cuda/status.h"
#include "backend/cuda/stopwatch.h"
#include "backend/cuda/tuning.h"
#include "graph/ops/glu.h"

namespace comfytp::backend::cuda {
namespace {

// From what is remembered of this device, else by timing both.
bool is_faster(const Site& site, const hopper::GatedLinear& linear, Kernel& composed) {
  auto& tuning = tuning_of(site.context);
  const auto biases = graph::glu_biases(site.attrs(), 3);
  const auto key = fmt::format("gated_linear {} {}x{}->{} {} {}", name_of(linear.dtype), linear.rows, linear.inner, linear.outputs,
                               site.attrs().text("activation"), site.attrs().text("biases"));
  if (const auto known = tuning.find(key)) return *known == "own";
  Stopwatch watch(site.context.stream);
  const auto element = static_cast<std::int64_t>(size_of(linear.dtype)), weight_bytes = linear.inner * linear.outputs * element;
  hopper::GatedLinearOperands o;
  o.x = watch.allocate(linear.rows * linear.inner * element);
  o.value = watch.allocate(weight_bytes);
  o.gate = watch.allocate(weight_bytes);
  o.y = watch.allocate(site.out[0].type.bytes());
  void *bias = watch.allocate(linear.outputs * element), *workspace = watch.allocate(composed.workspace_bytes());
  if (!o.x || !o.value || !o.gate || !o.y || !bias || !workspace) return false;  // not timed, and so not remembered
  if (biases.value) o.value_bias = bias;
  if (biases.gate) o.gate_bias = bias;
  std::vector<const void*> in = {o.x, o.value, o.gate};
  in.resize(site.in.size(), bias);
  const float own = watch.time([&] { return hopper::launch_gated_linear(linear, o, site.context.stream) == cudaSuccess; });
  const float others = watch.time([&] {
    composed.run(in, std::array{o.y}, workspace);
    return true;
  });
  tuning.store(key, own < others ? "own" : "library");
  return own < others;
}

std::unique_ptr<Kernel> make(const Site& site) {
  const DType dtype = site.in[0].type.dtype;
  expect_real(site, dtype);
  auto composed = std::make_unique<ComposedGatedLinear>(site.node, site.in, site.out, [&](const graph::Node& node, std::span<const Operand> in, std::span<const Operand> out) {
    return find_kernel(node.op->name())->make({node, in, out, site.context});
  });
  hopper::GatedLinear linear;
  linear.dtype = dtype;
  linear.inner = site.shape(1)[1];
  linear.outputs = site.shape(1)[0];
  linear.rows = linear.outputs ? numel(site.out[0].type.shape) / linear.outputs : 0;
  linear.activation = step_kind(site.attrs().text("activation"));
  if (linear.rows <= kFewRows || !hopper::takes(linear, site.context.properties) || !is_faster(site, linear, *composed)) return composed;
  const auto biases = graph::glu_biases(site.attrs(), 3);
  return make_kernel([=, stream = site.context.stream](auto in, auto out, void*) {
    const auto bias = [&](std::size_t i) { return i ? in[i] : nullptr; };
    check(hopper::launch_gated_linear(linear, {in[0], in[1], in[2], bias(biases.value), bias(biases.gate), out[0]}, stream), "gated_linear");
  });
}

const bool registered = register_kernel("gated_linear", {make, {}});

}  // namespace
}  // namespace comfytp::backend::cuda
