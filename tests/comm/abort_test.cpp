// A wait ends when a peer fails, does something else, does not come, or the caller cancels; and the group works again afterwards.
#include <gtest/gtest.h>

#include "base/error.h"
#include "ranks.h"

namespace comfytp::test {
namespace {

using comm::Abort;
using comm::Communicator;

struct Group {
  std::shared_ptr<Abort> abort = std::make_shared<Abort>();
  std::vector<std::unique_ptr<Communicator>> ranks;
  explicit Group(int size, double timeout = 300) : ranks(comm::host_group(device_names(size), abort, std::chrono::duration<double>(timeout))) {}
};

std::string message(const std::exception_ptr& e) {
  if (!e) return "nothing was thrown";
  try {
    std::rethrow_exception(e);
  } catch (const std::exception& error) {
    return error.what();
  }
}

template <typename E>
bool is_a(const std::exception_ptr& e) {
  try {
    if (e) std::rethrow_exception(e);
  } catch (const E&) {
    return true;
  } catch (...) {
  }
  return false;
}

float reduce(Communicator& c, float value) {
  float result = 0;
  c.all_reduce(TensorView::dense(&value, DType::f32, {1}), TensorView::dense(&result, DType::f32, {1}));
  return result;
}

void expect_works(Group& group) {
  group.abort->reset();
  for (const auto& e : on_ranks(group.ranks, [&](Communicator& c) {
         for (int i = 0; i < 3; ++i) ASSERT_EQ(reduce(c, 1), static_cast<float>(c.size()));
       }))
    EXPECT_FALSE(e) << message(e);
}

TEST(Abort, ADeviceThatNeverComesIsNamedInATimeout) {
  Group group(3, 0.05);
  const auto errors = on_ranks(group.ranks, [&](Communicator& c) {
    if (c.rank() != 1) reduce(c, 1);
  });
  for (int r : {0, 2}) {
    EXPECT_TRUE(is_a<Timeout>(errors[static_cast<std::size_t>(r)]));
    const auto what = message(errors[static_cast<std::size_t>(r)]);
    EXPECT_TRUE(what == "[all_reduce] cpu:0 waited 0.05 s for cpu:1" || what == "[all_reduce] cpu:2 waited 0.05 s for cpu:1" ||
                what == "[all_reduce] cpu:0 waited 0.05 s for cpu:1, cpu:2" || what == "[all_reduce] cpu:2 waited 0.05 s for cpu:0, cpu:1")
        << what;
  }
}

TEST(Abort, AFailingRankWakesItsPeersWithItsReason) {
  for (int size : {2, 3, 8}) {
    Group group(size);
    const auto errors = on_ranks(group.ranks, [&](Communicator& c) {
      reduce(c, 1);
      if (c.rank() == 1)
        group.abort->raise(Abort::Kind::error, "cpu:1: it broke");
      else
        reduce(c, 1);
    });
    for (int r = 0; r < size; ++r) EXPECT_EQ(message(errors[static_cast<std::size_t>(r)]), r == 1 ? "nothing was thrown" : "cpu:1: it broke");
    expect_works(group);
  }
}

TEST(Abort, TheFirstReasonIsKept) {
  Abort abort;
  EXPECT_NO_THROW(abort.check());
  abort.raise(Abort::Kind::error, "first");
  abort.raise(Abort::Kind::cancelled, "second");
  try {
    abort.check();
    FAIL() << "expected an Error";
  } catch (const Error& e) {
    EXPECT_STREQ(e.what(), "first");
  }
  abort.reset();
  EXPECT_NO_THROW(abort.check());
}

TEST(Abort, CancellingWakesAllRanks) {
  Group group(4);
  const auto errors = on_ranks(group.ranks, [&](Communicator& c) {
    if (c.rank() == 3)
      group.abort->raise(Abort::Kind::cancelled, "cancelled");
    else
      reduce(c, 1);
  });
  for (std::size_t r = 0; r < 3; ++r) EXPECT_TRUE(is_a<Cancelled>(errors[r])) << message(errors[r]);
  expect_works(group);
}

TEST(Abort, CallsThatDoNotMatchAreErrorsOnEveryRank) {
  using Call = std::function<void(Communicator&)>;
  float a[8] = {}, b[8] = {};
  const auto view = [](float* data, Shape shape) { return TensorView::dense(data, DType::f32, std::move(shape)); };
  const auto half = [&](float* data, Shape shape) { return TensorView::dense(data, DType::f16, std::move(shape)); };
  const Call reduce4 = [&](Communicator& c) { c.all_reduce(view(a, {4}), view(b, {4})); };
  const Call gather = [&](Communicator& c) { c.all_gather(view(a, {2}), view(b, {4}), 0, {0, 2, 4}); };
  const std::vector<std::pair<Call, Call>> pairs = {
      {reduce4, gather},
      {reduce4, [&](Communicator& c) { c.all_reduce(view(a, {5}), view(b, {5})); }},
      {reduce4, [&](Communicator& c) { c.all_reduce(half(a, {4}), half(b, {4})); }},
      {reduce4, [&](Communicator& c) { c.all_reduce(view(a, {4}), view(b, {2, 2})); }},
      {gather, [&](Communicator& c) { c.all_gather(view(a, {3}), view(b, {4}), 0, {0, 1, 4}); }},
      {gather, [&](Communicator& c) { c.all_gather(view(a, {1}), view(b, {4}), 0, {0, 2, 4}); }},
      {[&](Communicator& c) { c.reduce_scatter(view(a, {4}), view(b, {2}), 0, {0, 2, 4}); },
       [&](Communicator& c) { c.reduce_scatter(view(a, {2, 2}), view(b, {1, 2}), 0, {0, 2, 4}); }},
      {[&](Communicator& c) { c.halo_exchange(view(a, {2}), view(b, {3}), 0, {0, 2, 4}, {0, 1}, {3, 4}); },
       [&](Communicator& c) { c.halo_exchange(view(a, {2}), view(b, {2}), 0, {0, 2, 4}, {0, 2}, {3, 4}); }},
  };
  Group group(2);
  for (std::size_t i = 0; i < pairs.size(); ++i) {
    const auto errors = on_ranks(group.ranks, [&](Communicator& c) { (c.rank() == 0 ? pairs[i].first : pairs[i].second)(c); });
    for (const auto& e : errors) {
      EXPECT_TRUE(is_a<Error>(e)) << "pair " << i;
      EXPECT_NE(message(e).find("expected"), std::string::npos) << message(e);
    }
    expect_works(group);
  }
}

TEST(Abort, WrongArgumentsAreErrors) {
  float a[8] = {}, b[8] = {};
  const auto view = [](float* data, Shape shape) { return TensorView::dense(data, DType::f32, std::move(shape)); };
  const auto ints = [](float* data, Shape shape) { return TensorView::dense(data, DType::i32, std::move(shape)); };
  const std::vector<std::function<void(Communicator&)>> calls = {
      [&](Communicator& c) { c.all_reduce(ints(a, {4}), ints(b, {4})); },
      [&](Communicator& c) { c.all_gather(view(a, {4}), view(b, {4}), 1, {0, 4}); },
      [&](Communicator& c) { c.all_gather(view(a, {4}), view(b, {4}), 0, {0, 2, 4}); },
      [&](Communicator& c) { c.reduce_scatter(view(a, {4}), view(b, {4}), 0, {1, 4}); },
      [&](Communicator& c) { c.halo_exchange(view(a, {4}), view(b, {4}), 0, {0, 4}, {1}, {5}); },
      [&](Communicator& c) { c.halo_exchange(view(a, {4}), view(b, {4}), 0, {0, 4}, {}, {}); },
  };
  Group group(1);
  for (std::size_t i = 0; i < calls.size(); ++i) EXPECT_THROW(calls[i](*group.ranks[0]), Error) << i;
}

TEST(Abort, AnAbortWakesAllItsGroups) {
  auto abort = std::make_shared<Abort>();
  const auto rows = comm::host_group({"cpu:0", "cpu:1"}, abort, std::chrono::minutes(5));
  const auto columns = comm::host_group({"cpu:0", "cpu:2"}, abort, std::chrono::minutes(5));
  std::exception_ptr first, second;
  std::thread a([&] {
    try {
      reduce(*rows[0], 1);
    } catch (...) {
      first = std::current_exception();
    }
  });
  std::thread b([&] {
    try {
      reduce(*columns[1], 1);
    } catch (...) {
      second = std::current_exception();
    }
  });
  abort->raise(Abort::Kind::cancelled, "cancelled");
  a.join();
  b.join();
  EXPECT_TRUE(is_a<Cancelled>(first));
  EXPECT_TRUE(is_a<Cancelled>(second));
}

}  // namespace
}  // namespace comfytp::test
