// Buffers in use at the same time never overlap, and the memory is reused where it can be.
#include "runtime/memory_plan.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>

namespace comfytp::test {
namespace {

using runtime::Buffer;

bool together(const Buffer& a, const Buffer& b) { return a.first <= b.last && b.first <= a.last; }

std::int64_t peak(const std::vector<Buffer>& buffers, int end) {
  std::int64_t peak = 0;
  for (int t = 0; t <= end; ++t) {
    std::int64_t used = 0;
    for (const auto& b : buffers) used += b.first <= t && t <= b.last ? runtime::aligned(b.bytes) : 0;
    peak = std::max(peak, used);
  }
  return peak;
}

TEST(MemoryPlan, BuffersInUseTogetherNeverOverlap) {
  std::mt19937 random(3);
  for (int round = 0; round < 200; ++round) {
    std::vector<Buffer> buffers(1 + random() % 60);
    for (auto& b : buffers) {
      b.first = static_cast<int>(random() % 40);
      b.last = b.first + static_cast<int>(random() % (round % 2 ? 5 : 30));
      b.bytes = random() % 5 == 0 ? 0 : static_cast<std::int64_t>(random() % 5000);
    }
    const auto total = runtime::assign_offsets(buffers);
    std::int64_t sum = 0;
    for (const auto& a : buffers) {
      sum += runtime::aligned(a.bytes);
      EXPECT_EQ(a.offset % runtime::kAlignment, 0);
      EXPECT_LE(a.bytes == 0 ? 0 : a.offset + a.bytes, total);
      for (const auto& b : buffers) {
        const bool both = &a != &b && together(a, b) && a.bytes > 0 && b.bytes > 0;
        ASSERT_TRUE(!both || a.offset + a.bytes <= b.offset || b.offset + b.bytes <= a.offset) << "round " << round;
      }
    }
    EXPECT_GE(total, peak(buffers, 80));
    EXPECT_LE(total, sum);
  }
}

TEST(MemoryPlan, AChainNeedsTheMemoryOfItsWidestPlace) {
  std::vector<Buffer> chain;
  for (int i = 0; i < 50; ++i) chain.push_back({64 * (1 + i % 7), i, i + 1, 0});
  EXPECT_EQ(runtime::assign_offsets(chain), peak(chain, 51));
}

TEST(MemoryPlan, NothingNeedsNothing) {
  std::vector<Buffer> none, empty = {{0, 0, 5, 0}};
  EXPECT_EQ(runtime::assign_offsets(none), 0);
  EXPECT_EQ(runtime::assign_offsets(empty), 0);
}

}  // namespace
}  // namespace comfytp::test
