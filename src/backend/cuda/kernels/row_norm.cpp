// layer_norm and rms_norm, and fused_norm with what stands before and behind one.
#include "backend/cuda/kernels/row_norm.h"

#include "backend/cuda/chain_plan.h"
#include "backend/cuda/kernel_table.h"
#include "backend/cuda/status.h"
#include "graph/ops/steps.h"

namespace comfytp::backend::cuda {
namespace {

// Where a norm's inputs stand: x, pre's operands, weight, bias, post's operands, moments.
struct Inputs {
  std::size_t pre = 0, parameters = 0, post = 0;
  bool moments = false;
};

std::unique_ptr<Kernel> make_norm(const Site& site, bool centred, std::string_view pre, std::string_view post, const Inputs& inputs) {
  const DType dtype = narrow_dtype(site);
  expect_real(site, dtype);
  const auto last = site.shape(0).size() - 1;
  RowNorm norm;
  norm.columns = site.shape(0).back();
  norm.rows = norm.columns ? numel(site.shape(0)) / norm.columns : 0;
  norm.centred = centred;
  norm.epsilon = static_cast<float>(site.attrs().real("epsilon"));
  norm.pre = plan_chain(pre, site.in[0], site.in.subspan(1, inputs.pre), last, true);
  norm.post = plan_chain(post, site.in[0], site.in.subspan(1 + inputs.pre + inputs.parameters, inputs.post), last, true);
  const auto wide = [](const Operand& operand) { return operand.type.dtype == DType::f32; };
  norm.x_wide = wide(site.in[0]);
  if (inputs.parameters > 0) norm.weight_wide = wide(site.in[1 + inputs.pre]);
  if (inputs.parameters > 1) norm.bias_wide = wide(site.in[2 + inputs.pre]);
  const bool both = site.out.size() == 2;
  norm.y_wide = both && wide(site.out[0]);
  norm.z_wide = wide(site.out.back());
  if (inputs.moments) norm.parts = static_cast<int>(site.shape(site.in.size() - 1)[0]);
  return make_kernel([=, stream = site.context.stream](auto in, auto out, void*) {
    RowNormOperands o;
    o.x = in[0];
    o.pre = chain_operands(norm.pre, in, 1);
    if (inputs.parameters > 0) o.weight = in[1 + inputs.pre];
    if (inputs.parameters > 1) o.bias = in[2 + inputs.pre];
    o.post = chain_operands(norm.post, in, 1 + inputs.pre + inputs.parameters);
    if (inputs.moments) o.moments = static_cast<const float*>(in.back());
    o.y = both ? out[0] : nullptr;
    o.z = out.back();
    check(launch_row_norm(norm, o, dtype, stream), "norm");
  });
}

std::unique_ptr<Kernel> make_layer_norm(const Site& site) { return make_norm(site, true, "", "", {0, 2, 0, site.in.size() == 4}); }
std::unique_ptr<Kernel> make_rms_norm(const Site& site) { return make_norm(site, false, "", "", {0, 1, 0, site.in.size() == 3}); }
std::unique_ptr<Kernel> make_fused_norm(const Site& site) {
  const auto &a = site.attrs();
  const auto &pre = a.text("pre"), &post = a.text("post");
  return make_norm(site, a.text("norm") == "layer_norm", pre, post,
                   {graph::operand_count(pre), graph::steps_of(a.text("affine")).size(), graph::operand_count(post), false});
}

const bool registered = register_kernel("layer_norm", {make_layer_norm, {}}) && register_kernel("rms_norm", {make_rms_norm, {}}) &&
                        register_kernel("fused_norm", {make_fused_norm, {}});

}  // namespace
}  // namespace comfytp::backend::cuda
