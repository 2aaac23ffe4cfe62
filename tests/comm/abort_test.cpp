// A wait ends when a peer fails, does something else, does not come, or the caller cancels; and the group works again afterwards.
#include <gtest/gtest.h>

#include "base/error.h"
#include "ranks.h"

namespace comfytp::test {
namespace {

using comm::Abort;
using comm::Communicator;

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

// Ones on every rank, where it computes, and the place for their sum.
struct Numbers {
  std::vector<Tensor> in, out;
  explicit Numbers(const Group& group, std::int64_t count = 1) {
    for (std::size_t r = 0; r < group.ranks.size(); ++r) {
      in.emplace_back(Shape{count}, DType::f32);
      out.emplace_back(Shape{count}, DType::f32);
      for (std::int64_t i = 0; i < count; ++i) store_element(in.back().view.data, DType::f32, i, 1);
    }
  }
  void expect_sum() const {
    for (const auto& sum : out)
      for (const auto i : {std::int64_t{0}, sum.view.numel() - 1}) EXPECT_EQ(sum.value(i), static_cast<float>(out.size()));
  }
};

void expect_works(Group& group) {
  group.abort->reset();
  Numbers numbers(group);
  group.call(by_rank(numbers.in, numbers.out), [&](Communicator& c, const std::vector<TensorView>& views) {
    for (int i = 0; i < 3; ++i) c.all_reduce(views[0], views[1]);
  });
  numbers.expect_sum();
}

std::vector<Members> groups_of(std::vector<Members> groups, const std::function<bool(int size)>& wanted) {
  std::erase_if(groups, [&](const Members& m) { return !wanted(m.size()); });
  return groups;
}

TEST(Abort, ADeviceThatNeverComesIsNamedInATimeout) {
  Group group(on_host(3), 0.05);
  const auto errors = group.on_ranks([&](Communicator& c, backend::Device*) {
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
    Group group(on_host(size));
    const auto errors = group.on_ranks([&](Communicator& c, backend::Device*) {
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
  Group group(on_host(4));
  const auto errors = group.on_ranks([&](Communicator& c, backend::Device*) {
    if (c.rank() == 3)
      group.abort->raise(Abort::Kind::cancelled, "cancelled");
    else
      reduce(c, 1);
  });
  for (std::size_t r = 0; r < 3; ++r) EXPECT_TRUE(is_a<Cancelled>(errors[r])) << message(errors[r]);
  expect_works(group);
}

class Pairs : public OnGroup {};
INSTANTIATE_TEST_SUITE_P(Groups, Pairs, ::testing::ValuesIn(groups_of(all_groups(), [](int size) { return size == 2; })), label);

// The arguments are on the host: nobody comes so far as to read them.
TEST_P(Pairs, CallsThatDoNotMatchAreErrorsOnEveryRank) {
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
  Group group(GetParam());
  for (std::size_t i = 0; i < pairs.size(); ++i) {
    const auto errors = group.on_ranks([&](Communicator& c, backend::Device*) { (c.rank() == 0 ? pairs[i].first : pairs[i].second)(c); });
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
  Group group(on_host(1));
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

TEST(Abort, DevicesOfTwoKindsAreNoGroup) {
  int somewhere = 0;
  try {
    comm::device_group({{"cpu:0"}, {"cuda:0", 0, &somewhere}}, std::make_shared<Abort>(), std::chrono::minutes(5));
    FAIL() << "expected an Error";
  } catch (const Error& e) {
    EXPECT_STREQ(e.what(), "[comm] expected devices of one kind in a group but got cpu:0 and cuda:0");
  }
}

// The ranks have met on the host, and wait on their devices.
class OnDevice : public OnGroup {};
INSTANTIATE_TEST_SUITE_P(Groups, OnDevice, ::testing::ValuesIn(groups_of(cuda_groups(), [](int size) { return size > 1; })), label);

class RecordedSum {
 public:
  explicit RecordedSum(Group& group, std::int64_t count = 1) : group_(group), numbers_(group, count), views_(group.put(by_rank(numbers_.in, numbers_.out))), recordings_(views_.size()) {
    group_.run([&](Communicator& c, backend::Device* device) {
      const auto& v = views_[static_cast<std::size_t>(c.rank())];
      recordings_[static_cast<std::size_t>(c.rank())] = device->record([&] { c.all_reduce(v[0], v[1]); });
    });
  }
  // All but the last rank, which does something else.
  std::vector<std::exception_ptr> replay_without_last(const std::function<void()>& last) {
    return group_.on_ranks([&](Communicator& c, backend::Device* device) {
      if (c.rank() + 1 == c.size()) return last();
      replay(c, *device);
    });
  }
  std::vector<std::exception_ptr> replay_while(const std::function<void()>& other) {
    std::thread thread(other);
    auto errors = group_.on_ranks([&](Communicator& c, backend::Device* device) { replay(c, *device); });
    thread.join();
    return errors;
  }
  // All; the recordings are gone then.
  void expect_works() {
    group_.abort->reset();
    group_.run([&](Communicator& c, backend::Device* device) {
      replay(c, *device);
      recordings_[static_cast<std::size_t>(c.rank())].reset();
    });
    group_.get();
    numbers_.expect_sum();
  }

 private:
  void replay(Communicator& c, backend::Device& device) {
    for (int i = 0; i < 3; ++i) recordings_[static_cast<std::size_t>(c.rank())]->replay();
    device.synchronize();
    c.check();
  }

  Group& group_;
  Numbers numbers_;
  std::vector<std::vector<TensorView>> views_;
  std::vector<std::unique_ptr<backend::Recording>> recordings_;
};

TEST_P(OnDevice, ADeviceThatNeverComesIsNamedInATimeout) {
  Group group(GetParam(), 2);
  RecordedSum sum(group);
  const auto errors = sum.replay_without_last([] {});
  EXPECT_FALSE(errors.back());
  for (std::size_t r = 0; r + 1 < errors.size(); ++r) {
    EXPECT_TRUE(is_a<Timeout>(errors[r])) << message(errors[r]);
    const auto what = message(errors[r]);
    EXPECT_EQ(what.find("[all_reduce] cuda:"), 0u) << what;
    EXPECT_NE(what.find(" waited 2 s for " + GetParam().devices.back()), std::string::npos) << what;
  }
  sum.expect_works();
  expect_works(group);
}

TEST_P(OnDevice, AFailingRankWakesItsPeersWithItsReason) {
  Group group(GetParam());
  RecordedSum sum(group);
  const auto errors = sum.replay_without_last([&] { group.abort->raise(Abort::Kind::error, "it broke"); });
  for (std::size_t r = 0; r + 1 < errors.size(); ++r) EXPECT_EQ(message(errors[r]), "it broke");
  sum.expect_works();
  expect_works(group);
}

TEST_P(OnDevice, CancellingWakesAllRanks) {
  Group group(GetParam());
  RecordedSum sum(group);
  const auto errors = sum.replay_without_last([&] { group.abort->raise(Abort::Kind::cancelled, "cancelled"); });
  for (std::size_t r = 0; r + 1 < errors.size(); ++r) EXPECT_TRUE(is_a<Cancelled>(errors[r])) << message(errors[r]);
  sum.expect_works();
  expect_works(group);
}

// Some threads of a block are rounds ahead of the others when they are told to stop.
TEST_P(OnDevice, CancellingAmongManyRoundsEndsThemAll) {
  for (int i = 0; i < 12; ++i) {
    Group group(GetParam());
    RecordedSum sum(group, 6 << 20);
    const auto errors = sum.replay_while([&] {
      std::this_thread::sleep_for(std::chrono::microseconds(100 * i));
      group.abort->raise(Abort::Kind::cancelled, "cancelled");
    });
    for (const auto& error : errors) EXPECT_TRUE(!error || is_a<Cancelled>(error)) << message(error);
    sum.expect_works();
  }
}

}  // namespace
}  // namespace comfytp::test
