// gated_linear: two linears and a glu; fusing more would keep the projections in the cache only where rows are few.
#include "backend/gated_linear.h"

#include "backend/cpu/kernel_table.h"

namespace comfytp::backend::cpu {
namespace {

std::unique_ptr<Kernel> make(const Site& site) {
  expect_real(site, site.in[0].type.dtype);
  return std::make_unique<ComposedGatedLinear>(site.node, site.in, site.out, [&](const graph::Node& node, std::span<const Operand> in, std::span<const Operand> out) {
    return find_kernel(node.op->name())->make({node, in, out, site.threads});
  });
}

const bool registered = register_kernel("gated_linear", {make});

}  // namespace
}  // namespace comfytp::backend::cpu
