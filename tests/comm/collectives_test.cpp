// The collectives equal their definition, whatever the parts' sizes, strides and types, and give the same bits every time.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <random>

#include "base/error.h"
#include "ranks.h"

namespace comfytp::test {
namespace {

using Random = std::mt19937;

std::int64_t pick(Random& random, std::int64_t lo, std::int64_t hi) { return std::uniform_int_distribution<std::int64_t>(lo, hi)(random); }

Shape random_shape(Random& random) {
  Shape shape(static_cast<std::size_t>(pick(random, 1, 4)));
  for (auto& s : shape) s = pick(random, 1, 9);
  return shape;
}

// A view with memory of its own: its dimensions lie in a random order, perhaps with gaps.
struct Tensor {
  std::vector<std::byte> memory;
  TensorView view;

  Tensor(Shape shape, DType dtype, Random& random, bool plain = false) {
    view.dtype = dtype;
    view.shape = std::move(shape);
    std::vector<std::size_t> order(view.shape.size());
    std::iota(order.begin(), order.end(), 0);
    if (!plain) std::shuffle(order.begin(), order.end(), random);
    view.strides.resize(order.size());
    std::int64_t step = 1;
    for (std::size_t i = order.size(); i-- > 0;) {
      view.strides[order[i]] = step;
      step *= view.shape[order[i]] + (plain ? 0 : pick(random, 0, 1));
    }
    memory.resize(static_cast<std::size_t>(std::max<std::int64_t>(step, 1)) * size_of(dtype), std::byte{0x5a});
    view.data = memory.data();
  }
  // Elements are named by their index in row-major order.
  std::byte* at(std::int64_t index) const {
    std::int64_t offset = 0;
    const auto dense = row_major_strides(view.shape);
    for (std::size_t d = 0; d < view.shape.size(); ++d) offset += index / dense[d] % view.shape[d] * view.strides[d];
    return static_cast<std::byte*>(view.data) + offset * size_of(view.dtype);
  }
  std::vector<std::byte> element(std::int64_t index) const { return {at(index), at(index) + size_of(view.dtype)}; }
  float value(std::int64_t index) const { return static_cast<float>(load_element(at(index), view.dtype, 0)); }

  void fill(Random& random) {
    for (std::int64_t i = 0; i < view.numel(); ++i) {
      if (view.dtype == DType::f32 || view.dtype == DType::f16 || view.dtype == DType::bf16) {
        store_element(at(i), view.dtype, 0, std::normal_distribution<double>()(random));
      } else {
        for (int b = 0; b < size_of(view.dtype); ++b) at(i)[b] = static_cast<std::byte>(random());
      }
    }
  }
};

Shape with(Shape shape, std::size_t dim, std::int64_t size) {
  shape[dim] = size;
  return shape;
}

// Index in `whole` of the element of a part that begins at `offset` in dimension dim.
std::int64_t index_in(const Shape& whole, const Shape& part, std::size_t dim, std::int64_t offset, std::int64_t i) {
  const auto from = row_major_strides(part), to = row_major_strides(whole);
  std::int64_t at = 0;
  for (std::size_t d = 0; d < part.size(); ++d) at += (i / from[d] % part[d] + (d == dim ? offset : 0)) * to[d];
  return at;
}

std::vector<std::int64_t> random_bounds(Random& random, std::int64_t size, int parts) {
  std::vector<std::int64_t> bounds = {0};
  for (int r = 1; r < parts; ++r) bounds.push_back(pick(random, 0, size));
  bounds.push_back(size);
  std::sort(bounds.begin(), bounds.end());
  return bounds;
}

struct Group {
  std::shared_ptr<comm::Abort> abort = std::make_shared<comm::Abort>();
  std::vector<std::unique_ptr<comm::Communicator>> ranks;
  explicit Group(int size) : ranks(comm::host_group(device_names(size), abort, std::chrono::minutes(5))) {}
  void run(const std::function<void(comm::Communicator&)>& body) {
    for (const auto& e : on_ranks(ranks, body))
      if (e) std::rethrow_exception(e);
  }
};

class Ranks : public ::testing::TestWithParam<int> {};
INSTANTIATE_TEST_SUITE_P(Sizes, Ranks, ::testing::Range(1, 9));

// The sum of element i over the ranks, in fp32 in their order, rounded to the type.
std::vector<std::byte> summed(const std::vector<Tensor>& in, std::int64_t i) {
  float total = in[0].value(i);
  for (std::size_t r = 1; r < in.size(); ++r) total += in[r].value(i);
  std::vector<std::byte> element(static_cast<std::size_t>(size_of(in[0].view.dtype)));
  store_element(element.data(), in[0].view.dtype, 0, total);
  return element;
}

TEST_P(Ranks, AllReduceGivesTheSumInTheOrderOfTheRanks) {
  const int n = GetParam();
  Group group(n);
  Random random(static_cast<unsigned>(n));
  for (int round = 0; round < 24; ++round) {
    const DType dtype = std::vector{DType::f32, DType::f16, DType::bf16}[static_cast<std::size_t>(round % 3)];
    const bool plain = round % 2, in_place = round % 4 == 3;
    // Some larger than what is summed in one shot.
    const Shape shape = round % 6 == 0 ? Shape{} : round < 12 ? random_shape(random) : Shape{pick(random, 3, 7), 1, pick(random, 1200, 1500)};
    std::vector<Tensor> in, out;
    for (int r = 0; r < n; ++r) {
      in.emplace_back(shape, dtype, random, plain);
      in.back().fill(random);
      out.emplace_back(shape, dtype, random, plain);
    }
    std::vector<std::vector<std::byte>> expected;
    for (std::int64_t i = 0; i < numel(shape); ++i) expected.push_back(summed(in, i));
    group.run([&](comm::Communicator& c) {
      const auto r = static_cast<std::size_t>(c.rank());
      c.all_reduce(in[r].view, in_place ? in[r].view : out[r].view);
    });
    for (int r = 0; r < n; ++r)
      for (std::int64_t i = 0; i < numel(shape); ++i)
        ASSERT_EQ((in_place ? in : out)[static_cast<std::size_t>(r)].element(i), expected[static_cast<std::size_t>(i)])
            << "rank " << r << " element " << i << " of " << to_string(shape) << " in round " << round;
  }
}

TEST_P(Ranks, ReduceScatterGivesEveryRankItsPartOfTheSum) {
  const int n = GetParam();
  Group group(n);
  Random random(100u + static_cast<unsigned>(n));
  for (int round = 0; round < 20; ++round) {
    const DType dtype = std::vector{DType::f32, DType::f16, DType::bf16}[static_cast<std::size_t>(round % 3)];
    const Shape shape = random_shape(random);
    const auto dim = static_cast<std::size_t>(pick(random, 0, static_cast<std::int64_t>(shape.size()) - 1));
    const auto bounds = random_bounds(random, shape[dim], n);
    std::vector<Tensor> in, out;
    for (int r = 0; r < n; ++r) {
      in.emplace_back(shape, dtype, random, round % 2 == 0);
      in.back().fill(random);
      out.emplace_back(with(shape, dim, bounds[static_cast<std::size_t>(r) + 1] - bounds[static_cast<std::size_t>(r)]), dtype, random);
    }
    group.run([&](comm::Communicator& c) {
      const auto r = static_cast<std::size_t>(c.rank());
      c.reduce_scatter(in[r].view, out[r].view, static_cast<int>(dim), bounds);
    });
    for (std::size_t r = 0; r < out.size(); ++r)
      for (std::int64_t i = 0; i < out[r].view.numel(); ++i)
        ASSERT_EQ(out[r].element(i), summed(in, index_in(shape, out[r].view.shape, dim, bounds[r], i))) << "rank " << r << " round " << round;
  }
}

constexpr DType kEveryType[] = {DType::f64, DType::f32, DType::f16, DType::bf16, DType::f8_e4m3, DType::f8_e5m2,
                                DType::i64, DType::i32, DType::i16, DType::i8,   DType::u8,      DType::boolean};

TEST_P(Ranks, AllGatherGivesEveryRankTheWhole) {
  const int n = GetParam();
  Group group(n);
  Random random(200u + static_cast<unsigned>(n));
  for (int round = 0; round < 24; ++round) {
    const DType dtype = kEveryType[round % std::size(kEveryType)];
    const Shape shape = random_shape(random);
    const auto dim = static_cast<std::size_t>(pick(random, 0, static_cast<std::int64_t>(shape.size()) - 1));
    const auto bounds = random_bounds(random, shape[dim], n);
    std::vector<Tensor> in, out;
    for (std::size_t r = 0; r < static_cast<std::size_t>(n); ++r) {
      in.emplace_back(with(shape, dim, bounds[r + 1] - bounds[r]), dtype, random, round % 2 == 0);
      in.back().fill(random);
      out.emplace_back(shape, dtype, random);
    }
    group.run([&](comm::Communicator& c) {
      const auto r = static_cast<std::size_t>(c.rank());
      c.all_gather(in[r].view, out[r].view, static_cast<int>(dim), bounds);
    });
    for (const auto& whole : out)
      for (std::size_t r = 0; r < in.size(); ++r)
        for (std::int64_t i = 0; i < in[r].view.numel(); ++i)
          ASSERT_EQ(whole.element(index_in(shape, in[r].view.shape, dim, bounds[r], i)), in[r].element(i)) << name_of(dtype) << " round " << round;
  }
}

TEST_P(Ranks, HaloExchangeGivesEveryRankWhatItNeeds) {
  const int n = GetParam();
  Group group(n);
  Random random(300u + static_cast<unsigned>(n));
  for (int round = 0; round < 24; ++round) {
    const DType dtype = kEveryType[round % std::size(kEveryType)];
    const Shape shape = random_shape(random);
    const auto dim = static_cast<std::size_t>(pick(random, 0, static_cast<std::int64_t>(shape.size()) - 1));
    const auto bounds = random_bounds(random, shape[dim], n);
    std::vector<std::int64_t> lo, hi;
    for (int r = 0; r < n; ++r) {
      lo.push_back(pick(random, 0, shape[dim]));
      hi.push_back(pick(random, lo.back(), shape[dim]));
    }
    std::vector<Tensor> in, out;
    Tensor whole(shape, dtype, random, true);
    whole.fill(random);
    for (std::size_t r = 0; r < static_cast<std::size_t>(n); ++r) {
      in.emplace_back(with(shape, dim, bounds[r + 1] - bounds[r]), dtype, random);
      Box box = whole_box(shape);
      box[dim] = {bounds[r], bounds[r + 1]};
      copy(part_of(whole.view, box), in.back().view);
      out.emplace_back(with(shape, dim, hi[r] - lo[r]), dtype, random, round % 2 == 0);
    }
    group.run([&](comm::Communicator& c) {
      const auto r = static_cast<std::size_t>(c.rank());
      c.halo_exchange(in[r].view, out[r].view, static_cast<int>(dim), bounds, lo, hi);
    });
    for (std::size_t r = 0; r < out.size(); ++r)
      for (std::int64_t i = 0; i < out[r].view.numel(); ++i)
        ASSERT_EQ(out[r].element(i), whole.element(index_in(shape, out[r].view.shape, dim, lo[r], i))) << "rank " << r << " round " << round;
  }
}

}  // namespace
}  // namespace comfytp::test
