#include "base/dtype.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <numeric>
#include <string>
#include <vector>

namespace comfytp {
namespace {

class Decoding : public testing::TestWithParam<DType> {};

// Every code, in one call (which may be vectorised) and one by one.
TEST_P(Decoding, InBulkGivesWhatOneByOneGives) {
  const DType from = GetParam();
  const std::int64_t count = std::int64_t{1} << (8 * size_of(from));
  std::vector<std::uint8_t> narrow(static_cast<std::size_t>(count));
  std::vector<std::uint16_t> wide(static_cast<std::size_t>(count));
  std::iota(narrow.begin(), narrow.end(), std::uint8_t{0});
  std::iota(wide.begin(), wide.end(), std::uint16_t{0});
  const void* codes = size_of(from) == 1 ? static_cast<const void*>(narrow.data()) : wide.data();
  std::vector<float> bulk(static_cast<std::size_t>(count));
  convert(codes, from, bulk.data(), DType::f32, count);
  for (std::int64_t i = 0; i < count; ++i) {
    const double one = load_element(codes, from, i);
    const float value = bulk[static_cast<std::size_t>(i)];
    if (std::isnan(one))
      EXPECT_TRUE(std::isnan(value)) << "code " << i;
    else
      EXPECT_TRUE(value == one && std::signbit(value) == std::signbit(one)) << "code " << i << ": " << value << " for " << one;
  }
}

INSTANTIATE_TEST_SUITE_P(All, Decoding, testing::Values(DType::f8_e4m3, DType::f8_e5m2, DType::f16, DType::bf16),
                         [](const auto& info) { return std::string(name_of(info.param)); });

class Rounding : public testing::TestWithParam<DType> {};

// A value that the narrow type holds stays; halfway between two neighbours the even one is taken, beyond it the nearer one.
TEST_P(Rounding, IsToTheNearestAndToEvenInTheMiddle) {
  const DType to = GetParam();
  for (std::uint16_t code = 0; code < 0x7bff; ++code) {
    const std::uint16_t next = code + 1;
    const auto low = static_cast<float>(load_element(&code, to, 0)), high = static_cast<float>(load_element(&next, to, 0));
    if (!std::isfinite(high)) break;
    const float middle = static_cast<float>((static_cast<double>(low) + high) / 2);
    const float values[] = {low, std::nextafter(middle, low), middle, std::nextafter(middle, high)};
    std::uint16_t rounded[4];
    convert(values, DType::f32, rounded, to, 4);
    const std::uint16_t expected[] = {code, code, static_cast<std::uint16_t>(code + code % 2), next};
    ASSERT_EQ(std::memcmp(rounded, expected, sizeof rounded), 0) << "between codes " << code << " and " << next;
  }
}

INSTANTIATE_TEST_SUITE_P(All, Rounding, testing::Values(DType::f16, DType::bf16),
                         [](const auto& info) { return std::string(name_of(info.param)); });

}  // namespace
}  // namespace comfytp
