#include "backend/cuda/kernels/unary.h"

#include "backend/cuda/kernel_table.h"
#include "backend/cuda/status.h"

namespace comfytp::backend::cuda {
namespace {

template <UnaryKind kKind>
std::unique_ptr<Kernel> make(const Site& site) {
  const DType dtype = site.in[0].type.dtype;
  if (is_float(dtype) || kKind < UnaryKind::relu) expect_real(site, dtype);
  return make_kernel([dtype, count = numel(site.shape(0)), stream = site.context.stream](auto in, auto out, void*) {
    check(launch_unary(kKind, dtype, count, in[0], out[0], stream), "unary");
  });
}

#define COMFYTP_REGISTER(NAME) register_kernel(#NAME, {make<UnaryKind::NAME>, {}})
const bool registered = COMFYTP_REGISTER(silu) && COMFYTP_REGISTER(gelu) && COMFYTP_REGISTER(gelu_tanh) && COMFYTP_REGISTER(sigmoid) &&
                        COMFYTP_REGISTER(tanh) && COMFYTP_REGISTER(exp) && COMFYTP_REGISTER(log) && COMFYTP_REGISTER(sin) &&
                        COMFYTP_REGISTER(cos) && COMFYTP_REGISTER(sqrt) && COMFYTP_REGISTER(rsqrt) && COMFYTP_REGISTER(relu) &&
                        COMFYTP_REGISTER(abs) && COMFYTP_REGISTER(neg) && COMFYTP_REGISTER(logical_not);
#undef COMFYTP_REGISTER

}  // namespace
}  // namespace comfytp::backend::cuda
