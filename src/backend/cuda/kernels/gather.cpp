#include "backend/cuda/kernels/gather.h"

#include <cmath>

#include "backend/cuda/kernel_table.h"
#include "backend/cuda/status.h"

namespace comfytp::backend::cuda {
namespace {

std::unique_ptr<Kernel> make(const Site& site) {
  const auto dim = static_cast<std::size_t>(site.attrs().integer("dim"));
  const auto& x = site.shape(0);
  Gather g;
  g.size = x[dim];
  g.inner = numel(Shape(x.begin() + static_cast<std::ptrdiff_t>(dim) + 1, x.end()));
  g.outer = numel(Shape(x.begin(), x.begin() + static_cast<std::ptrdiff_t>(dim)));
  g.count = numel(site.shape(1));
  g.from = site.dtype(0);
  g.to = site.out[0].type.dtype;
  g.wide_index = site.in[1].type.dtype == DType::i64;
  if (is_float(g.to)) store_element(g.outside, g.to, 0, NAN);
  if (g.from != g.to) {
    expect_real(site, g.to);
    require(is_float(g.from), "[gather] expected a table of floats on {} but got {}", site.context.name, name_of(g.from));
  }
  if (auto* weight = site.in[0].weight) {
    require(!weight->format, "[gather] expected {} row-major on {} but it is packed as {}", weight->key, site.context.name,
            weight->format ? weight->format->id : "");
    weight->packable = false;
  }
  return make_kernel([g, stream = site.context.stream](auto in, auto out, void*) { check(launch_gather(g, in[0], in[1], out[0], stream), "gather"); });
}

const bool registered = register_kernel("gather", {make, {0}});

}  // namespace
}  // namespace comfytp::backend::cuda
