// linears: one after the other, for on a CPU they have nothing to share.
#include "backend/linears.h"

#include "backend/cpu/kernel_table.h"

namespace comfytp::backend::cpu {
namespace {

std::unique_ptr<Kernel> make(const Site& site) {
  expect_real(site, site.in[0].type.dtype);
  const auto compile = [&](const graph::Node& node, std::span<const Operand> in, std::span<const Operand> out) {
    return find_kernel(node.op->name())->make({node, in, out, site.threads});
  };
  return std::make_unique<ComposedLinears>(site.node, site.in, site.out, compile);
}

const bool registered = register_kernel("linears", {make});

}  // namespace
}  // namespace comfytp::backend::cpu
