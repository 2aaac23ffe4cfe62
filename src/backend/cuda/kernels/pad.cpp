#include "backend/cuda/kernels/pad.h"

#include "backend/cuda/kernel_table.h"
#include "backend/cuda/status.h"

namespace comfytp::backend::cuda {
namespace {

std::unique_ptr<Kernel> make(const Site& site) {
  const auto &in = site.shape(0), &out = site.out[0].type.shape;
  const auto& mode = site.attrs().text("mode");
  Pad pad;
  pad.mode = mode == "constant" ? PadMode::constant : mode == "replicate" ? PadMode::replicate : PadMode::circular;
  pad.element = size_of(site.out[0].type.dtype);
  if (pad.mode == PadMode::constant) store_element(pad.value, site.out[0].type.dtype, 0, site.attrs().real("value"));
  // Neighbours that are not padded are one dimension.
  bool whole = false;
  for (int o : site.out[0].order) {
    const auto d = static_cast<std::size_t>(o);
    if (out[d] == 1 && in[d] == 1) continue;
    if (whole && in[d] == out[d]) {
      pad.in[pad.rank - 1] *= in[d];
      pad.out[pad.rank - 1] *= out[d];
      continue;
    }
    require(pad.rank < kMaxRank, "[pad] expected at most {} dimensions on {}", kMaxRank, site.context.name);
    pad.in[pad.rank] = in[d];
    pad.out[pad.rank] = out[d];
    pad.before[pad.rank++] = site.attrs().ints("before")[d];
    whole = in[d] == out[d];
  }
  return make_kernel([pad, stream = site.context.stream](auto in, auto out, void*) { check(launch_pad(pad, in[0], out[0], stream), "pad"); });
}

const bool registered = register_kernel("pad", {make, {}});

}  // namespace
}  // namespace comfytp::backend::cuda
