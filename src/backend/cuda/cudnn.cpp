#include "backend/cuda/cudnn.h"

#include <cudnn_frontend.h>

#include <functional>
#include <string>
#include <unordered_map>

#include "backend/cuda/status.h"

namespace comfytp::backend::cuda {
namespace {

namespace fe = cudnn_frontend;
using Tensor = std::shared_ptr<fe::graph::Tensor_attributes>;

fe::DataType_t type_of(DType dtype) {
  return dtype == DType::f32 ? fe::DataType_t::FLOAT : dtype == DType::f16 ? fe::DataType_t::HALF : fe::DataType_t::BFLOAT16;
}

constexpr std::int64_t kMostWorkspace = std::int64_t{1} << 30;  // some algorithms want hundreds of gigabytes

enum Uid : std::int64_t { kA = 1, kB, kC, kD, kOut };

class Plan final : public CudnnPlan {
 public:
  Plan(Context& context, DType dtype) : context_(context), exact_(dtype == DType::f32) {
    graph.set_io_data_type(type_of(dtype)).set_intermediate_data_type(fe::DataType_t::FLOAT).set_compute_data_type(fe::DataType_t::FLOAT);
  }
  Tensor tensor(std::int64_t uid, const Shape& shape, const Shape& strides) {
    return graph.tensor(fe::graph::Tensor_attributes().set_uid(uid).set_dim(shape).set_stride(strides));
  }
  void output(const Tensor& t, const Shape& shape, const Shape& strides) { t->set_output(true).set_uid(kOut).set_dim(shape).set_stride(strides); }
  // Says why not, or "".
  std::string build() {
    for (const std::function<fe::error_t()>& step : std::initializer_list<std::function<fe::error_t()>>{
             [&] { return graph.validate(); }, [&] { return graph.build_operation_graph(context_.cudnn); },
             [&] { return graph.create_execution_plans({fe::HeurMode_t::A, fe::HeurMode_t::FALLBACK}); },
             [&] {
               if (exact_) graph.deselect_numeric_notes({fe::NumericalNote_t::TENSOR_CORE});  // TF32 is no fp32
               graph.deselect_workspace_greater_than(kMostWorkspace);
               return graph.check_support(context_.cudnn);
             },
             [&] { return graph.build_plans(context_.cudnn, fe::BuildPlanPolicy_t::HEURISTICS_CHOICE); }})
      if (auto error = step(); error.is_bad()) return error.get_message().empty() ? "no reason given" : error.get_message();
    workspace_ = graph.get_workspace_size();
    return {};
  }
  std::int64_t workspace_bytes() const override { return workspace_; }
  void run(const void* a, const void* b, const void* c, void* out, void* workspace, const void* d) override {
    std::unordered_map<std::int64_t, void*> tensors = {{kA, const_cast<void*>(a)}, {kB, const_cast<void*>(b)}, {kOut, out}};
    if (c) tensors[kC] = const_cast<void*>(c);
    if (d) tensors[kD] = const_cast<void*>(d);
    auto error = graph.execute(context_.cudnn, tensors, workspace);
    require(error.is_good(), "[cuda] cuDNN: {}", error.get_message());
  }
  fe::graph::Graph graph;

 private:
  Context& context_;
  bool exact_;
  std::int64_t workspace_ = 0;
};

// Plans of one device by what they do; those that nobody uses any more are forgotten with their users.
std::shared_ptr<CudnnPlan> shared_plan(Context& context, const std::string& key, const std::function<std::shared_ptr<Plan>()>& make) {
  auto& known = context.plans[key];
  if (auto plan = std::static_pointer_cast<CudnnPlan>(known.lock())) return plan;
  auto plan = make();
  known = std::static_pointer_cast<CudnnPlan>(plan);
  return plan;
}

std::vector<std::int64_t> list(const Shape& shape) { return {shape.begin(), shape.end()}; }

}  // namespace

std::shared_ptr<CudnnPlan> plan_convolution(Context& context, const Convolution& c) {
  const auto key = fmt::format("convolution {} {} {} {} {} {} {} {} {} {}", name_of(c.dtype), to_string(c.x), to_string(c.x_strides), to_string(c.filter),
                               to_string(c.filter_strides), to_string(c.y), to_string(c.y_strides), to_string(c.stride), to_string(c.before), to_string(c.after));
  return shared_plan(context, key, [&]() -> std::shared_ptr<Plan> {
    auto plan = std::make_shared<Plan>(context, c.dtype);
    const auto x = plan->tensor(kA, c.x, c.x_strides), filter = plan->tensor(kB, c.filter, c.filter_strides);
    const auto y = plan->graph.conv_fprop(x, filter, fe::graph::Conv_fprop_attributes()
                                                         .set_pre_padding(list(c.before))
                                                         .set_post_padding(list(c.after))
                                                         .set_stride(list(c.stride))
                                                         .set_dilation(std::vector<std::int64_t>(c.stride.size(), 1)));
    plan->output(y, c.y, c.y_strides);
    return plan->build().empty() ? plan : nullptr;
  });
}

std::shared_ptr<CudnnPlan> plan_attention(Context& context, const AttentionSizes& a) {
  const auto key = fmt::format("attention {} {} {} {} {} {} {} {} {} {} {} {}", name_of(a.dtype), to_string(a.q), to_string(a.q_strides), to_string(a.k),
                               to_string(a.k_strides), to_string(a.v), to_string(a.v_strides), to_string(a.out), to_string(a.out_strides), to_string(a.mask),
                               to_string(a.mask_strides), a.scale);
  return shared_plan(context, key, [&]() -> std::shared_ptr<Plan> {
    auto plan = std::make_shared<Plan>(context, a.dtype);
    const auto q = plan->tensor(kA, a.q, a.q_strides), k = plan->tensor(kB, a.k, a.k_strides), v = plan->tensor(kC, a.v, a.v_strides);
    auto attributes = fe::graph::SDPA_attributes().set_name("attention").set_generate_stats(false).set_attn_scale(static_cast<float>(a.scale));
    if (!a.mask.empty()) attributes.set_bias(plan->tensor(kD, a.mask, a.mask_strides));
    auto [out, statistics] = plan->graph.sdpa(q, k, v, attributes);
    plan->output(out, a.out, a.out_strides);
    return plan->build().empty() ? plan : nullptr;
  });
}

}  // namespace comfytp::backend::cuda
