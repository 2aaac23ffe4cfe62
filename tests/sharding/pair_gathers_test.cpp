#include "sharding/pair_gathers.h"

#include <gtest/gtest.h>

#include "graph/builder.h"
#include "parity.h"
#include "totals.h"

namespace comfytp::test {
namespace {

using graph::Attrs;
using graph::Builder;
using graph::Ints;
using graph::ValueId;

// Two ranks' graphs, which differ in the parts that they have.
struct Ranks {
  std::vector<Graph> devices;

  template <typename Build>
  explicit Ranks(const Build& build) : devices(2) {
    for (int rank = 0; rank < 2; ++rank) {
      Builder b(devices[static_cast<std::size_t>(rank)], DType::f32);
      build(b, rank);
    }
  }
  std::string ops() {
    std::string ops[2];
    for (std::size_t r = 0; r < 2; ++r)
      for (const auto& node : devices[r].nodes())
        if (!graph::is(node, "input")) ops[r].append(ops[r].empty() ? "" : " ").append(node.op->name());
    EXPECT_EQ(ops[0], ops[1]);
    return ops[0];
  }
};

const Ints kBounds = {0, 3, 5};

ValueId part(Builder& b, int rank, const std::string& name, const std::string& varies = "call") {
  const Ints full = {2, 5, 4}, offset = {0, kBounds[static_cast<std::size_t>(rank)], 0};
  const Ints shape = {2, kBounds[static_cast<std::size_t>(rank) + 1] - offset[1], 4};
  return b.graph.add("input", {}, {{"name", name}, {"dtype", std::string("f32")}, {"shape", shape}, {"full", full}, {"offset", offset}, {"varies", varies}}, name);
}
ValueId gather(Builder& b, int rank, ValueId x, Ints bounds = kBounds) {
  return b.graph.add("all_gather", {x}, {{"dim", std::int64_t{1}}, {"bounds", bounds}, {"group", Ints{0, 1}}, {"rank", std::int64_t{rank}}, {"reason", std::string("test")}});
}

TEST(PairGathers, BringsBothToAllInOneExchange) {
  const auto build = [](Builder& b, int rank) {
    const auto x = part(b, rank, "x"), y = part(b, rank, "y");
    const auto keys = gather(b, rank, b.unary("silu", x));
    const auto values = gather(b, rank, b.transpose(b.transpose(y, {2, 1, 0}), {2, 1, 0}));
    b.graph.add_output("keys", keys);
    b.graph.add_output("values", values);
  };
  Ranks ranks(build);
  sharding::pair_gathers(ranks.devices);
  EXPECT_EQ(ranks.ops(), "silu transpose transpose split_dim split_dim concat all_gather slice merge_dims slice merge_dims");
  const Ranks before(build);
  Graph whole;
  Builder b(whole, DType::f32);
  for (const char* name : {"x", "y"}) b.input(name, {2, 5, 4}, DType::f32);
  const auto results = graph::evaluate(ranks.devices, leaves_of(whole)), expected = graph::evaluate(before.devices, leaves_of(whole));
  for (std::size_t r = 0; r < 2; ++r)
    for (const char* name : {"keys", "values"}) {
      EXPECT_EQ(results[r].at(name).shape, (Shape{2, 5, 4}));
      EXPECT_EQ(results[r].at(name).data, expected[r].at(name).data);
    }
}

TEST(PairGathers, LeavesThoseThatCannotMeet) {
  const auto alone = [](const auto& build) {
    Ranks ranks(build);
    const auto before = ranks.ops();
    sharding::pair_gathers(ranks.devices);
    return ranks.ops() == before;
  };
  EXPECT_TRUE(alone([](Builder& b, int rank) { b.graph.add_output("y", gather(b, rank, part(b, rank, "x"))); })) << "one";
  EXPECT_TRUE(alone([](Builder& b, int rank) {
    const auto x = part(b, rank, "x"), whole = gather(b, rank, x);
    const auto own = b.slice(whole, 1, kBounds[static_cast<std::size_t>(rank)], kBounds[static_cast<std::size_t>(rank) + 1]);
    b.graph.add_output("y", gather(b, rank, own));
  })) << "the second reads the first";
  EXPECT_TRUE(alone([](Builder& b, int rank) {
    b.graph.add_output("x", gather(b, rank, part(b, rank, "x")));
    b.graph.add_output("z", gather(b, rank, b.unary("silu", part(b, rank, "z"))));
  })) << "work between them";
  EXPECT_TRUE(alone([](Builder& b, int rank) {
    const auto x = gather(b, rank, part(b, rank, "x"));
    b.graph.add_output("y", b.transpose(x, {2, 1, 0}));
    b.graph.add_output("z", gather(b, rank, part(b, rank, "z")));
  })) << "a view of the first between them";
  EXPECT_TRUE(alone([](Builder& b, int rank) {
    const auto x = part(b, rank, "x");
    for (const char* name : {"y", "z"}) b.graph.add_output(name, gather(b, rank, x));
  })) << "the same twice";
  EXPECT_TRUE(alone([](Builder& b, int rank) {
    b.graph.add_output("x", gather(b, rank, part(b, rank, "x", "prompt")));
    b.graph.add_output("y", gather(b, rank, part(b, rank, "y")));
  })) << "one runs once a prompt";
  EXPECT_TRUE(alone([](Builder& b, int rank) {
    b.graph.add_output("x", gather(b, rank, part(b, rank, "x")));
    b.graph.add_output("y", gather(b, rank, b.cast(part(b, rank, "y"), DType::bf16)));
  })) << "other dtypes";
  EXPECT_TRUE(alone([](Builder& b, int rank) {
    const auto y = b.constant({2, rank ? 2 : 3, 4}, {1}, DType::f32), z = b.constant({2, rank ? 2 : 3, rank ? 6 : 4}, {1}, DType::f32);
    b.graph.add_output("y", gather(b, rank, y));
    b.graph.add_output("z", gather(b, rank, z));
  })) << "alike on one device alone";
}

TEST(PairGathers, LeavesThoseOfOtherGroupsDimensionsAndParts) {
  const auto left = [](int ranks, const auto& second) {
    std::vector<Graph> devices(static_cast<std::size_t>(ranks));
    for (int d = 0; d < ranks; ++d) {
      Builder b(devices[static_cast<std::size_t>(d)], DType::f32);
      const auto add = [&](const char* name, std::int64_t dim, const Ints& bounds, const Ints& group, std::int64_t rank) {
        const auto x = b.input(name, {4, 4}, DType::f32);
        b.graph.add_output(name, b.graph.add("all_gather", {x}, {{"dim", dim}, {"bounds", bounds}, {"group", group}, {"rank", rank}, {"reason", std::string("test")}}));
      };
      add("x", 0, {0, 4, 8}, ranks == 2 ? Ints{0, 1} : d < 2 ? Ints{0, 1} : Ints{2, 3}, d % 2);
      second(add, d);
    }
    sharding::pair_gathers(devices);
    return totals(devices[0]).collectives["all_gather"];
  };
  EXPECT_EQ(left(4, [](const auto& add, int d) { add("y", 0, {0, 4, 8}, d < 2 ? Ints{0, 1} : Ints{2, 3}, d % 2); }), 1);
  EXPECT_EQ(left(4, [](const auto& add, int d) { add("y", 0, {0, 4, 8}, d % 2 == 0 ? Ints{0, 2} : Ints{1, 3}, d / 2); }), 2) << "another group";
  EXPECT_EQ(left(2, [](const auto& add, int d) { add("y", 1, {0, 4, 8}, {0, 1}, d); }), 2) << "another dimension";
}

TEST(PairGathers, OneBehindTheOtherStays) {
  Ranks ranks([](Builder& b, int rank) {
    const auto one = [&](ValueId x) {
      return b.graph.add("all_gather", {x}, {{"dim", std::int64_t{1}}, {"bounds", Ints{0, 5}}, {"group", Ints{rank}}, {"rank", std::int64_t{0}}, {"reason", std::string("test")}});
    };
    b.graph.add_output("y", one(one(b.input("x", {2, 5, 4}, DType::f32))));
  });
  sharding::pair_gathers(ranks.devices);
  EXPECT_EQ(ranks.ops(), "all_gather all_gather");
}

TEST(PairGathers, OfThreeLeavesOne) {
  Ranks ranks([](Builder& b, int rank) {
    for (const char* name : {"x", "y", "z"}) b.graph.add_output(name, gather(b, rank, part(b, rank, name)));
  });
  sharding::pair_gathers(ranks.devices);
  for (const auto& device : ranks.devices) EXPECT_EQ(totals(device).collectives["all_gather"], 2);
}

}  // namespace
}  // namespace comfytp::test
