#include "planner/plan.h"

#include <gtest/gtest.h>

#include <functional>
#include <string>

#include "base/error.h"

namespace comfytp::planner {
namespace {

Plan make(const std::string& devices, const std::string& mesh, sharding::Placement placement = sharding::Placement::resident) {
  return {backend::parse_devices(devices), sharding::Mesh::parse(mesh), placement};
}

std::string error_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

struct Case {
  std::string devices, mesh;
  sharding::Placement placement;
};
class PlanJson : public testing::TestWithParam<Case> {};

TEST_P(PlanJson, ReadsBackWhatItWrote) {
  const auto& c = GetParam();
  const auto plan = make(c.devices, c.mesh, c.placement);
  const auto read = from_json(to_json(plan));
  ASSERT_EQ(read.devices.size(), plan.devices.size());
  for (std::size_t i = 0; i < plan.devices.size(); ++i) {
    EXPECT_EQ(read.devices[i].name(), plan.devices[i].name());
    EXPECT_EQ(read.devices[i].limit_bytes, plan.devices[i].limit_bytes);
  }
  EXPECT_EQ(read.mesh.to_string(), plan.mesh.to_string());
  EXPECT_EQ(read.placement, plan.placement);
}

INSTANTIATE_TEST_SUITE_P(Plans, PlanJson,
                         testing::Values(Case{"cpu:0", "tensor=1", sharding::Placement::resident},
                                         Case{"cpu:0,cpu:1", "tensor=2", sharding::Placement::gathered},
                                         Case{"cpu:1,cpu:0@3GiB", "tensor=2.5:1", sharding::Placement::resident},
                                         Case{"cpu:0,cpu:1,cpu:2,cpu:3", "batch=2,patch=2", sharding::Placement::gathered}));

TEST(PlanJsonOfOneDevice, NeedsNoAxis) {
  Plan plan;
  plan.devices = backend::parse_devices("cpu:0");
  plan.mesh = default_mesh(plan.devices);
  EXPECT_EQ(from_json(to_json(plan)).mesh.size(), 1);
}

TEST(PlanJsonCuts, AreReadBack) {
  auto plan = make("cpu:0,cpu:1", "tensor=2");
  plan.mesh.cuts["tensor"] = {{"a.weight[1]", "b.weight[0]@8"}, {"c.weight[0]"}};
  const auto read = from_json(to_json(plan));
  ASSERT_EQ(read.mesh.cuts.size(), 1u);
  EXPECT_EQ(read.mesh.cuts.at("tensor").groups, plan.mesh.cuts["tensor"].groups);
  EXPECT_EQ(read.mesh.cuts.at("tensor").alone, plan.mesh.cuts["tensor"].alone);
  EXPECT_TRUE(from_json(to_json(make("cpu:0,cpu:1", "tensor=2"))).mesh.cuts.empty());
}

TEST(RankNames, TellRanksOfOneDeviceApart) {
  const auto names = rank_names({{"cuda", 0, 0}, {"cuda", 1, 0}, {"cuda", 0, 0}});
  EXPECT_EQ(names, (std::vector<std::string>{"cuda:0#0", "cuda:1", "cuda:0#1"}));
}

TEST(PlanJsonFields, OfOtherNamesArePassedOver) {
  EXPECT_EQ(from_json(R"({"version":1,"devices":[{"name":"cpu:0","speed":2}],"mesh":"","weights":"resident","report":{}})").devices.size(),
            1u);
}

struct BadCase {
  std::string json, names;
};
class BadPlanJson : public testing::TestWithParam<BadCase> {};

TEST_P(BadPlanJson, IsAnErrorNamingTheField) {
  const auto message = error_of([] { from_json(GetParam().json); });
  EXPECT_NE(message.find(GetParam().names), std::string::npos) << message;
  EXPECT_EQ(message.find('\n'), std::string::npos) << message;
}

INSTANTIATE_TEST_SUITE_P(
    Fields, BadPlanJson,
    testing::Values(BadCase{"", "expected JSON"}, BadCase{"[1]", "expected a JSON object"}, BadCase{"{}", "'version'"},
                    BadCase{R"({"version":2})", "'version'"}, BadCase{R"({"version":1})", "'devices'"},
                    BadCase{R"({"version":1,"devices":[]})", "'devices'"}, BadCase{R"({"version":1,"devices":["cpu:0"]})", "'devices[0]'"},
                    BadCase{R"({"version":1,"devices":[{}]})", "'devices[0].name'"},
                    BadCase{R"({"version":1,"devices":[{"name":7}]})", "'devices[0].name'"},
                    BadCase{R"({"version":1,"devices":[{"name":"cpu:-1"}]})", "'devices[0].name'"},
                    BadCase{R"({"version":1,"devices":[{"name":"cpu:0,cpu:1"}]})", "'devices[0].name'"},
                    BadCase{R"({"version":1,"devices":[{"name":"cpu:0","limit_bytes":-1}]})", "'devices[0].limit_bytes'"},
                    BadCase{R"({"version":1,"devices":[{"name":"cpu:0","limit_bytes":18446744073709551615}]})", "'devices[0].limit_bytes'"},
                    BadCase{R"({"version":1,"devices":[{"name":"cpu:0"},{"name":"cpu:0"}],"mesh":"tensor=2"})", "'devices'"},
                    BadCase{R"({"version":1,"devices":[{"name":"cpu:0"}]})", "'mesh'"},
                    BadCase{R"({"version":1,"devices":[{"name":"cpu:0"}],"mesh":"pipe=1","weights":"resident"})", "'mesh'"},
                    BadCase{R"({"version":1,"devices":[{"name":"cpu:0"}],"mesh":"tensor=1"})", "'weights'"},
                    BadCase{R"({"version":1,"devices":[{"name":"cpu:0"}],"mesh":"tensor=1","weights":"mirrored"})", "'weights'"},
                    BadCase{R"({"version":1,"devices":[{"name":"cpu:0"},{"name":"cpu:1"}],"mesh":"tensor=2","weights":"resident","cuts":[]})", "'cuts'"},
                    BadCase{R"({"version":1,"devices":[{"name":"cpu:0"},{"name":"cpu:1"}],"mesh":"tensor=2","weights":"resident","cuts":{"batch":{}}})", "'batch'"},
                    BadCase{R"({"version":1,"devices":[{"name":"cpu:0"},{"name":"cpu:1"}],"mesh":"batch=2","weights":"resident","cuts":{"tensor":{}}})", "'cuts.tensor'"},
                    BadCase{R"({"version":1,"devices":[{"name":"cpu:0"},{"name":"cpu:1"}],"mesh":"tensor=2","weights":"resident","cuts":{"tensor":3}})", "'cuts.tensor'"},
                    BadCase{R"({"version":1,"devices":[{"name":"cpu:0"},{"name":"cpu:1"}],"mesh":"tensor=2","weights":"resident","cuts":{"tensor":{"groups":[1]}}})", "'cuts.tensor.groups'"},
                    BadCase{R"({"version":1,"devices":[{"name":"cpu:0"},{"name":"cpu:1"}],"mesh":"tensor=2","weights":"resident","cuts":{"tensor":{"alone":"x"}}})", "'cuts.tensor.alone'"},
                    BadCase{R"({"version":1,"devices":[{"name":"cpu:0"}],"mesh":"tensor=2","weights":"resident"})", "tensor=2"}));

TEST(DefaultMesh, SplitsByTensorOverAllDevices) {
  EXPECT_EQ(least_work(backend::parse_devices("cpu:0,cpu:1")), 0);
  EXPECT_GT(least_work(backend::parse_devices("cuda:0,cuda:1")), 1000);
  EXPECT_EQ(default_mesh(backend::parse_devices("cpu:0")).size(), 1);
  EXPECT_EQ(default_mesh(backend::parse_devices("cpu:0,cpu:1,cpu:2")).to_string(), "tensor=3");
}

TEST(Check, WantsOneDeviceACoordinate) {
  EXPECT_NO_THROW(check(make("cpu:0,cpu:1", "batch=2")));
  const auto message = error_of([] { check(make("cpu:0,cpu:1", "batch=2,tensor=2")); });
  EXPECT_NE(message.find("batch=2,tensor=2"), std::string::npos) << message;
  EXPECT_NE(message.find("cpu:0,cpu:1"), std::string::npos) << message;
}

}  // namespace
}  // namespace comfytp::planner
