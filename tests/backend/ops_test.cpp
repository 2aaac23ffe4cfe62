#include <gtest/gtest.h>

#include <algorithm>
#include <set>

#include "base/error.h"
#include "fixture.h"
#include "op_cases.h"

namespace comfytp::test {
namespace {

class Kernels : public testing::TestWithParam<std::tuple<std::pair<std::string, DType>, OpCase>> {};

TEST_P(Kernels, GiveWhatTheOpsReferenceGives) {
  const auto& [where, op_case] = GetParam();
  const auto device = open(where.first);
  const auto dtype = where.second;
  graph::Graph graph;
  graph::Builder builder(graph, dtype);
  graph.add_output("y", op_case.build(builder));
  const auto result = graph.type(graph.outputs()[0].value).dtype;
  const double tolerance = dtype == DType::bf16 || result == DType::bf16 ? 1.0 / 256 : result == DType::f16 ? 1.0 / 2048 : 1e-5;

  using enum DType;
  for (auto stored : op_case.weights ? std::vector<DType>{f32, f16, bf16, f8_e4m3, f8_e5m2, f64} : std::vector<DType>{f32})
    for (bool packable : {true, false}) {
      if (!packable && stored != dtype) continue;
      for (bool reversed : {false, true}) {
        if (reversed && stored != dtype) continue;
        SCOPED_TRACE(fmt::format("weights stored as {}, {}packable, inputs {}", name_of(stored), packable ? "" : "not ",
                                 reversed ? "reversed" : "row-major"));
        const bool fp8 = stored == f8_e4m3 || stored == f8_e5m2;
        expect_reference(*device, graph, {stored, packable, reversed}, fp8 ? std::max(tolerance, op_case.fp8_tolerance) : tolerance);
      }
    }
}

std::string case_name(const testing::TestParamInfo<Kernels::ParamType>& info) {
  auto [device, dtype] = std::get<0>(info.param);
  std::replace(device.begin(), device.end(), ':', '_');
  return fmt::format("{}_{}_{}", std::get<1>(info.param).name, name_of(dtype), device);
}

INSTANTIATE_TEST_SUITE_P(All, Kernels, testing::Combine(testing::ValuesIn(devices_here()), testing::ValuesIn(op_cases())), case_name);

TEST(KernelCases, OfCudaAreTested) {
  const auto here = devices_here();
  if (std::none_of(here.begin(), here.end(), [](const auto& d) { return d.first == "cuda:0"; })) GTEST_SKIP() << "no cuda:0 here";
}

TEST(KernelCases, CoverEveryOpThatComputes) {
  std::set<std::string_view> met;
  for (const auto& op_case : op_cases()) {
    graph::Graph graph;
    graph::Builder builder(graph, DType::f32);
    op_case.build(builder);
    for (const auto& node : graph.nodes()) met.insert(node.op->name());
  }
  for (const auto* op : graph::all_ops()) EXPECT_TRUE(op->collective() || met.contains(op->name())) << op->name();
}

}  // namespace
}  // namespace comfytp::test
