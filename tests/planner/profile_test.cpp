#include "planner/profile.h"

#include <gtest/gtest.h>

#include "base/error.h"

namespace comfytp::planner {
namespace {

constexpr std::int64_t kGiB = std::int64_t{1} << 30;

TEST(Profile, OfAKnownCardNeedsItsModelAlone) {
  const auto profile = profile_from_json(
      R"({"version":1,"devices":[{"name":"cuda:0","model":"NVIDIA GeForce RTX 4090"},
                                 {"name":"cuda:1","model":"RTX 4060 Ti","memory_bytes":8589934592,"flops_bf16":5e13}],
          "link_bytes_per_second":12e9})");
  const auto first = profile_of({"cuda", 0, 0}, profile), second = profile_of({"cuda", 1, 0}, profile);
  EXPECT_EQ(first->memory_bytes, 24 * kGiB);
  EXPECT_FALSE(first->assumed);
  EXPECT_EQ(second->memory_bytes, 8 * kGiB);
  EXPECT_DOUBLE_EQ(compute_seconds(*second, 1e14, DType::bf16), 2);
  EXPECT_DOUBLE_EQ(compute_seconds(*second, 2.2e13, DType::f32), 1);
  EXPECT_DOUBLE_EQ(link_bytes_per_second(profile), 12e9);
}

TEST(Profile, OfACardThatNobodyNamedIsAssumed) {
  const auto assumed = profile_of({"cuda", 3, 0}, {});
  ASSERT_TRUE(assumed);
  EXPECT_TRUE(assumed->assumed);
  EXPECT_GT(assumed->memory_bytes, 0);
  EXPECT_FALSE(profile_of({"cpu", 0, 0}, {}));
  EXPECT_GT(link_bytes_per_second({}), 0);
}

TEST(Profile, OfAnUnknownCardHasWhatIsSaid) {
  const auto profile = profile_from_json(R"({"version":1,"devices":[{"name":"cpu:0","model":"a desk","memory_bytes":4096}]})");
  EXPECT_EQ(profile_of({"cpu", 0, 0}, profile)->memory_bytes, 4096);
  EXPECT_EQ(compute_seconds(*profile_of({"cpu", 0, 0}, profile), 1e9, DType::f32), 0);
}

TEST(Profile, ALaunchTakesWhatItsArithmeticOrItsMemoryTakes) {
  const auto h100 = *card("NVIDIA H100 80GB HBM3");
  const auto seconds = [&](double flops, std::int64_t bytes) { return expected_seconds(h100, {{flops, bytes}}, DType::bf16); };
  EXPECT_DOUBLE_EQ(seconds(1e13, 1000), seconds(1e13, 2000));
  EXPECT_GT(seconds(1e13, 0), 1e13 / h100.flops_bf16);
  EXPECT_GT(seconds(1e6, 1 << 30), seconds(1e6, 1 << 29));
  EXPECT_GT(seconds(0, 0), 0) << "a launch is never free";
  EXPECT_EQ(expected_seconds({}, {{1e13, 1000}}, DType::bf16), 0);
}

TEST(Profile, FetchesUseTheMemoryTwice) {
  const auto h100 = *card("NVIDIA H100 80GB HBM3");
  EXPECT_EQ(fetching_seconds(h100, 0), 0);
  EXPECT_GT(fetching_seconds(h100, 1 << 30), 2.0 * (1 << 30) / h100.bytes_per_second);
  EXPECT_DOUBLE_EQ(fetching_seconds(h100, 2 << 20), 2 * fetching_seconds(h100, 1 << 20));
  EXPECT_EQ(fetching_seconds({}, 1 << 30), 0);
}

class BadProfile : public testing::TestWithParam<std::pair<const char*, const char*>> {};
TEST_P(BadProfile, IsAnErrorNamingTheField) {
  try {
    profile_from_json(GetParam().first);
    FAIL() << "no error";
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find(GetParam().second), std::string::npos) << error.what();
  }
}
INSTANTIATE_TEST_SUITE_P(
    Fields, BadProfile,
    testing::Values(std::pair{"", "JSON"}, std::pair{"[]", "JSON"}, std::pair{"{}", "'version'"}, std::pair{R"({"version":1})", "'devices'"},
                    std::pair{R"({"version":1,"devices":[3]})", "'devices[0]'"}, std::pair{R"({"version":1,"devices":[{}]})", "'devices[0].model'"},
                    std::pair{R"({"version":1,"devices":[{"model":"A100"}]})", "'devices[0].name'"},
                    std::pair{R"({"version":1,"devices":[{"model":"A100","name":"cuda:0","memory_bytes":-1}]})", "'devices[0].memory_bytes'"},
                    std::pair{R"({"version":1,"devices":[{"model":"A100","name":"cuda:0","flops_f32":"fast"}]})", "'devices[0].flops_f32'"},
                    std::pair{R"({"version":1,"devices":[{"model":"A100","name":"cuda:0"},{"model":"A100","name":"cuda:0"}]})", "'cuda:0'"},
                    std::pair{R"({"version":1,"devices":[],"link_bytes_per_second":0})", "'link_bytes_per_second'"}));

}  // namespace
}  // namespace comfytp::planner
