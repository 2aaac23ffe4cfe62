#include "planner/link.h"

#include <gtest/gtest.h>

#include "base/error.h"

namespace comfytp::planner {
namespace {

TEST(Link, IsRateAndLatency) {
  const auto nvlink = link_from("386GB/s,3us"), pcie = link_from("500MB/s,0.5ms"), without = link_from("1.5GB/s");
  EXPECT_DOUBLE_EQ(nvlink.bytes_per_second, 386e9);
  EXPECT_DOUBLE_EQ(nvlink.latency_seconds, 3e-6);
  EXPECT_DOUBLE_EQ(pcie.seconds(2, 500'000'000), 1.001);
  EXPECT_DOUBLE_EQ(without.latency_seconds, 0);
  for (const auto& link : {nvlink, pcie, without, link_from("1.5MB/s,2us")}) {
    EXPECT_DOUBLE_EQ(link_from(link.to_string()).bytes_per_second, link.bytes_per_second);
    EXPECT_DOUBLE_EQ(link_from(link.to_string()).latency_seconds, link.latency_seconds);
  }
}

TEST(Link, ThatIsNoneIsNamed) {
  for (const auto* text : {"", "386", "GB/s", "386GB/s,", "386GB/s,3", "-1GB/s", "386GB/s,3us,4", "386 GB/s", "0GB/s"}) {
    try {
      link_from(text);
      FAIL() << "no error for '" << text << "'";
    } catch (const Error& error) {
      EXPECT_NE(std::string(error.what()).find(std::string("'") + text + "'"), std::string::npos) << error.what();
    }
  }
}

TEST(Link, FetchesAreHiddenBehindTheArithmetic) {
  const Link link{1e9, 0};
  EXPECT_DOUBLE_EQ(predicted_seconds(2, {0, 0, 1, 1'000'000'000}, link), 2);
  EXPECT_DOUBLE_EQ(predicted_seconds(2, {0, 0, 1, 3'000'000'000}, link), 3);
  EXPECT_DOUBLE_EQ(predicted_seconds(2, {1, 1'000'000'000, 1, 3'000'000'000}, link), 4);
}

}  // namespace
}  // namespace comfytp::planner
