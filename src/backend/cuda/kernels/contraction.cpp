#include "backend/cuda/kernels/contraction.h"

#include <fmt/ranges.h>

#include "backend/cuda/kernels/pointwise.h"
#include "backend/cuda/status.h"
#include "graph/ops/epilogue.h"
#include "graph/ops/steps.h"

namespace comfytp::backend::cuda {

Epilogue::Epilogue(const Site& site, std::size_t channel, std::size_t done) : dtype_(site.out[0].type.dtype), stream_(site.context.stream) {
  auto steps = graph::epilogue_of(site.attrs());
  for (std::size_t s = 0; s < done; ++s) first_ += graph::takes_operand(steps[s]);
  steps.erase(steps.begin(), steps.begin() + static_cast<std::ptrdiff_t>(done));
  chain_ = plan_chain(fmt::format("{}", fmt::join(steps, ",")), site.out[0], site.in.subspan(first_), channel, false);
}

void Epilogue::run(std::span<const void* const> in, void* out) const {
  if (!empty()) check(launch_pointwise(chain_, chain_operands(chain_, in, first_), dtype_, dtype_, dtype_, out, out, stream_), "epilogue");
}

}  // namespace comfytp::backend::cuda
