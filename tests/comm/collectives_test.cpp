// The collectives equal their definition, whatever the parts' sizes, strides and types, and give the same bits every time.
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>

#include "ranks.h"

namespace comfytp::test {
namespace {

Shape random_shape(Random& random) {
  Shape shape(static_cast<std::size_t>(pick(random, 1, 4)));
  for (auto& s : shape) s = pick(random, 1, 9);
  return shape;
}

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

class Ranks : public OnGroup {};
INSTANTIATE_TEST_SUITE_P(Groups, Ranks, ::testing::ValuesIn(all_groups()), label);

// The sum of element i over the ranks, in fp32 in their order, rounded to the type.
std::vector<std::byte> summed(const std::vector<Tensor>& in, std::int64_t i) {
  float total = in[0].value(i);
  for (std::size_t r = 1; r < in.size(); ++r) total += in[r].value(i);
  std::vector<std::byte> element(static_cast<std::size_t>(size_of(in[0].view.dtype)));
  store_element(element.data(), in[0].view.dtype, 0, total);
  return element;
}

TEST_P(Ranks, AllReduceGivesTheSumInTheOrderOfTheRanks) {
  Group group(GetParam());
  const int n = GetParam().size();
  Random random(static_cast<unsigned>(n));
  for (int round = 0; round < 24; ++round) {
    const DType dtype = std::vector{DType::f32, DType::f16, DType::bf16}[static_cast<std::size_t>(round % 3)];
    const bool plain = round % 2, in_place = round % 4 == 3;
    // Some larger than what is summed in one shot, on the host or between GPUs.
    const std::int64_t more = !GetParam().on_host() && round > 20 ? 40 : 1;
    const Shape shape = round % 6 == 0 ? Shape{} : round < 12 ? random_shape(random) : Shape{pick(random, 3, 7), more, pick(random, 1200, 1500)};
    std::vector<Tensor> in, out;
    for (int r = 0; r < n; ++r) {
      in.emplace_back(shape, dtype, random, plain);
      in.back().fill(random);
      out.emplace_back(shape, dtype, random, plain);
    }
    std::vector<std::vector<std::byte>> expected;
    for (std::int64_t i = 0; i < numel(shape); ++i) expected.push_back(summed(in, i));
    group.call(by_rank(in, out),
               [&](comm::Communicator& c, const std::vector<TensorView>& views) { c.all_reduce(views[0], views[in_place ? 0 : 1]); });
    for (int r = 0; r < n; ++r)
      for (std::int64_t i = 0; i < numel(shape); ++i)
        ASSERT_EQ((in_place ? in : out)[static_cast<std::size_t>(r)].element(i), expected[static_cast<std::size_t>(i)])
            << "rank " << r << " element " << i << " of " << to_string(shape) << " in round " << round;
  }
}

TEST_P(Ranks, ReduceScatterGivesEveryRankItsPartOfTheSum) {
  Group group(GetParam());
  const int n = GetParam().size();
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
    group.call(by_rank(in, out), [&](comm::Communicator& c, const std::vector<TensorView>& views) {
      c.reduce_scatter(views[0], views[1], static_cast<int>(dim), bounds);
    });
    for (std::size_t r = 0; r < out.size(); ++r)
      for (std::int64_t i = 0; i < out[r].view.numel(); ++i)
        ASSERT_EQ(out[r].element(i), summed(in, index_in(shape, out[r].view.shape, dim, bounds[r], i))) << "rank " << r << " round " << round;
  }
}

constexpr DType kEveryType[] = {DType::f64, DType::f32, DType::f16, DType::bf16, DType::f8_e4m3, DType::f8_e5m2,
                                DType::i64, DType::i32, DType::i16, DType::i8,   DType::u8,      DType::boolean};

TEST_P(Ranks, AllGatherGivesEveryRankTheWhole) {
  Group group(GetParam());
  const int n = GetParam().size();
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
    group.call(by_rank(in, out), [&](comm::Communicator& c, const std::vector<TensorView>& views) {
      if (round % 3 == 0)
        c.fetch(views[0], views[1], static_cast<int>(dim), bounds);
      else
        c.all_gather(views[0], views[1], static_cast<int>(dim), bounds);
    });
    for (const auto& whole : out)
      for (std::size_t r = 0; r < in.size(); ++r)
        for (std::int64_t i = 0; i < in[r].view.numel(); ++i)
          ASSERT_EQ(whole.element(index_in(shape, in[r].view.shape, dim, bounds[r], i)), in[r].element(i)) << name_of(dtype) << " round " << round;
  }
}

TEST_P(Ranks, HaloExchangeGivesEveryRankWhatItNeeds) {
  Group group(GetParam());
  const int n = GetParam().size();
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
    group.call(by_rank(in, out), [&](comm::Communicator& c, const std::vector<TensorView>& views) {
      c.halo_exchange(views[0], views[1], static_cast<int>(dim), bounds, lo, hi);
    });
    for (std::size_t r = 0; r < out.size(); ++r)
      for (std::int64_t i = 0; i < out[r].view.numel(); ++i)
        ASSERT_EQ(out[r].element(i), whole.element(index_in(shape, out[r].view.shape, dim, lo[r], i))) << "rank " << r << " round " << round;
  }
}

// Whole numbers that all types hold, and so their sum.
float whole_number(std::int64_t i, int rank) { return static_cast<float>((i * 7 + rank * 13) % 31); }

void fill(Tensor& tensor, const std::function<float(std::int64_t)>& value) {
  std::vector<float> values(static_cast<std::size_t>(tensor.view.numel()));
  for (std::size_t i = 0; i < values.size(); ++i) values[i] = value(static_cast<std::int64_t>(i));
  convert(values.data(), DType::f32, tensor.view.data, tensor.view.dtype, tensor.view.numel());
}

TEST_P(Ranks, AllReduceTakesAnySize) {
  Group group(GetParam());
  const int n = GetParam().size();
  for (auto dtype : {DType::f32, DType::f16, DType::bf16}) {
    std::vector<std::int64_t> sizes = {1, 2, 7, 16, 1000, 4097, 65536, 262145, 300008};
    if (!GetParam().on_host()) sizes.insert(sizes.end(), {(64 << 20) / size_of(dtype), 1});
    for (auto size : sizes) {
      std::vector<Tensor> in, out;
      for (int r = 0; r < n; ++r) {
        in.emplace_back(Shape{size}, dtype);
        out.emplace_back(Shape{size}, dtype);
        fill(in.back(), [&](std::int64_t i) { return whole_number(i, r); });
      }
      Tensor expected({size}, dtype);
      fill(expected, [&](std::int64_t i) {
        float sum = 0;
        for (int r = 0; r < n; ++r) sum += whole_number(i, r);
        return sum;
      });
      group.call(by_rank(in, out), [&](comm::Communicator& c, const std::vector<TensorView>& views) {
        c.all_reduce(views[0], views[1]);
        c.all_reduce(views[0], views[0]);
      });
      for (int r = 0; r < n; ++r) {
        ASSERT_TRUE(out[static_cast<std::size_t>(r)].memory == expected.memory) << size << " of " << name_of(dtype) << " on rank " << r;
        ASSERT_TRUE(in[static_cast<std::size_t>(r)].memory == expected.memory) << size << " of " << name_of(dtype) << " in place on rank " << r;
      }
    }
  }
}

TEST_P(Ranks, CallsInARowDoNotDisturbEachOther) {
  Group group(GetParam());
  const int n = GetParam().size();
  Random random(400u + static_cast<unsigned>(n));
  constexpr int kCalls = 100;
  std::vector<std::vector<Tensor>> in(static_cast<std::size_t>(n)), out(static_cast<std::size_t>(n));
  std::vector<std::int64_t> sizes;
  std::vector<Tensors> tensors(static_cast<std::size_t>(n));
  const auto add = [](std::int64_t i, int r, int call) { return whole_number(i + 3 * call, r); };
  for (int call = 0; call < kCalls; ++call) sizes.push_back(call % 3 == 0 ? pick(random, 1, 40) : pick(random, 1, 100000));
  for (int r = 0; r < n; ++r)
    for (int call = 0; call < kCalls; ++call) {
      const auto rank = static_cast<std::size_t>(r);
      const Shape shape{sizes[static_cast<std::size_t>(call)]};
      in[rank].emplace_back(shape, DType::f32);
      out[rank].emplace_back(shape, DType::f32);
      fill(in[rank].back(), [&](std::int64_t i) { return add(i, r, call); });
    }
  for (std::size_t r = 0; r < tensors.size(); ++r)
    for (std::size_t call = 0; call < kCalls; ++call) tensors[r].insert(tensors[r].end(), {&in[r][call], &out[r][call]});
  group.call(tensors, [&](comm::Communicator& c, const std::vector<TensorView>& views) {
    for (std::size_t call = 0; call < kCalls; ++call) c.all_reduce(views[2 * call], views[2 * call + 1]);
  });
  for (int call = 0; call < kCalls; ++call) {
    const auto size = sizes[static_cast<std::size_t>(call)];
    Tensor expected({size}, DType::f32);
    fill(expected, [&](std::int64_t i) {
      float sum = 0;
      for (int r = 0; r < n; ++r) sum += add(i, r, call);
      return sum;
    });
    for (const auto& rank : out) ASSERT_TRUE(rank[static_cast<std::size_t>(call)].memory == expected.memory) << "call " << call << " of " << size;
  }
}

// Ranks in a ring: a halo_exchange by these numbers hands every rank's `part` on to the rank before it.
struct Ring {
  std::int64_t size;
  std::vector<std::int64_t> bounds, lo, hi;
  std::vector<Tensor> part, next, last, sum, whole;
  std::vector<std::byte> initial;  // all parts
  Ring(int n, std::int64_t size) : size(size) {
    for (int r = 0; r <= n; ++r) bounds.push_back(r * size);
    for (int r = 0; r < n; ++r) {
      lo.push_back((r + 1) % n * size);
      hi.push_back(lo.back() + size);
      for (auto* tensors : {&part, &next, &last, &sum}) tensors->emplace_back(Shape{size}, DType::f32);
      whole.emplace_back(Shape{n * size}, DType::f32);
      fill(part.back(), [&](std::int64_t i) { return whole_number(i, r) + 100.0F * static_cast<float>(r); });
      initial.insert(initial.end(), part.back().memory.begin(), part.back().memory.end());
    }
  }
  // All parts after so many times.
  std::vector<std::byte> handed_on(int times) const {
    auto rotated = initial;
    std::rotate(rotated.begin(), rotated.begin() + times % static_cast<int>(part.size()) * static_cast<std::ptrdiff_t>(size * 4), rotated.end());
    return rotated;
  }
};

class Recorded : public OnGroup {};
INSTANTIATE_TEST_SUITE_P(Groups, Recorded, ::testing::ValuesIn(cuda_groups()), label);

// Every replay hands every rank's numbers on to the rank before it, so that numbers of another replay would be seen.
TEST_P(Recorded, ReplaysDoWhatTheCallsDid) {
  Group group(GetParam());
  const int n = GetParam().size();
  const int steps = n % 3 == 0 ? 2 : 3;  // of handing on in a replay; not a multiple of the ranks
  for (std::int64_t size : {std::int64_t{5}, std::int64_t{3000}, std::int64_t{700000}}) {
    Ring ring(n, size);
    Tensor total({size}, DType::f32);
    fill(total, [&](std::int64_t i) {
      float value = 0;
      for (int r = 0; r < n; ++r) value += whole_number(i, r) + 100.0F * static_cast<float>(r);
      return value;
    });
    const auto views = group.put(by_rank(ring.part, ring.next, ring.last, ring.sum, ring.whole));
    std::vector<std::unique_ptr<backend::Recording>> recordings(static_cast<std::size_t>(n));
    group.run([&](comm::Communicator& c, backend::Device* device) {
      const auto& v = views[static_cast<std::size_t>(c.rank())];
      recordings[static_cast<std::size_t>(c.rank())] = device->record([&] {
        const auto hand_on = [&](std::size_t from, std::size_t to) { c.halo_exchange(v[from], v[to], 0, ring.bounds, ring.lo, ring.hi); };
        hand_on(0, 1);
        if (steps == 3) hand_on(1, 2);
        hand_on(static_cast<std::size_t>(steps - 1), 0);
        c.all_reduce(v[0], v[3]);
        c.all_gather(v[0], v[4], 0, ring.bounds);
      });
    });
    int done = 0;
    for (int replays : {1, 2, 4, 7, 86}) {
      group.run([&](comm::Communicator& c, backend::Device* device) {
        for (int i = 0; i < replays; ++i) recordings[static_cast<std::size_t>(c.rank())]->replay();
        device->synchronize();
        c.check();
      });
      done += replays;
      group.get(true);
      const auto bytes = static_cast<std::ptrdiff_t>(size * 4);
      const auto rotated = ring.handed_on(done * steps);
      for (std::size_t r = 0; r < ring.part.size(); ++r) {
        const auto* mine = rotated.data() + static_cast<std::ptrdiff_t>(r) * bytes;
        ASSERT_TRUE(std::equal(ring.part[r].memory.begin(), ring.part[r].memory.end(), mine)) << size << " after " << done << " replays on rank " << r;
        ASSERT_TRUE(ring.sum[r].memory == total.memory) << size << " after " << done << " replays on rank " << r;
        ASSERT_TRUE(ring.whole[r].memory == rotated) << size << " after " << done << " replays on rank " << r;
      }
    }
    group.run([&](comm::Communicator& c, backend::Device*) { recordings[static_cast<std::size_t>(c.rank())].reset(); });
    group.get();
  }
}

// Two groups of the same devices, one on their side queues: neither sees anything of the other, and both find room.
TEST_P(Recorded, WhatRunsAsideGoesOnBesideTheQueue) {
  Group group(GetParam());
  const int n = GetParam().size();
  const int steps = n % 3 == 0 ? 2 : 3;
  std::vector<comm::DeviceRank> members(static_cast<std::size_t>(n));
  group.run([&](comm::Communicator& c, backend::Device* device) {
    members[static_cast<std::size_t>(c.rank())] = {device->spec().name(), device->spec().index, device->side_queue()};
  });
  const auto beside = comm::device_group(members, group.abort, std::chrono::minutes(5), GetParam().route);
  for (std::int64_t size : {std::int64_t{5}, std::int64_t{3000}, std::int64_t{700000}}) {
    Ring ring(n, size);
    const auto views = group.put(by_rank(ring.part, ring.next, ring.last, ring.sum, ring.whole));
    std::vector<std::unique_ptr<backend::Recording>> recordings(static_cast<std::size_t>(n));
    group.run([&](comm::Communicator& c, backend::Device* device) {
      const auto r = static_cast<std::size_t>(c.rank());
      const auto& v = views[r];
      recordings[r] = device->record([&] {
        const auto hand_on = [&](std::size_t from, std::size_t to) { c.halo_exchange(v[from], v[to], 0, ring.bounds, ring.lo, ring.hi); };
        hand_on(0, 1);
        device->fork();
        beside[r]->all_gather(v[1], v[4], 0, ring.bounds);
        const auto gathered = device->mark();
        if (steps == 3) hand_on(1, 2);
        hand_on(static_cast<std::size_t>(steps - 1), 0);
        for (int i = 0; i < 3; ++i) c.all_reduce(v[0], v[3]);
        device->join(gathered);
      });
    });
    int done = 0;
    for (int replays : {1, 2, 4, 93}) {
      group.run([&](comm::Communicator& c, backend::Device* device) {
        const auto r = static_cast<std::size_t>(c.rank());
        for (int i = 0; i < replays; ++i) recordings[r]->replay();
        device->synchronize();
        c.check();
        beside[r]->check();
      });
      done += replays;
      group.get(true);
      const auto handed_on = ring.handed_on((done - 1) * steps + 1);
      for (std::size_t r = 0; r < ring.whole.size(); ++r)
        ASSERT_TRUE(ring.whole[r].memory == handed_on) << size << " after " << done << " replays on rank " << r;
    }
    group.run([&](comm::Communicator& c, backend::Device*) { recordings[static_cast<std::size_t>(c.rank())].reset(); });
    group.get();
  }
}

}  // namespace
}  // namespace comfytp::test
