#include "graph/graph.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <random>

#include "base/error.h"
#include "graph/builder.h"
#include "graph/evaluate.h"
#include "random_graph.h"

namespace comfytp::graph {
namespace {

std::string error_of(const std::function<void()>& action) {
  try {
    action();
  } catch (const Error& e) {
    return e.what();
  }
  return "";
}

TEST(Graph, NamesOpSiteAndTypesOfAWrongNode) {
  Graph g;
  Builder b(g, DType::f32);
  const auto x = b.input("x", {2, 4}, DType::f32);
  const auto w = b.weight("w", {3, 5});
  EXPECT_EQ(error_of([&] { b.linear(x, w, "block.proj"); }),
            "[linear] expected x [..,i] and w [o,i] of one dtype but got f32[2,4] and f32[3,5] (at 'block.proj')");
  EXPECT_EQ(error_of([&] { g.add("silu", {7}); }), "[graph] expected an earlier value as input of silu '' but got %7");
  EXPECT_EQ(g.nodes().size(), 2u);
}

TEST(Graph, RefusesAnEpilogueWhoseOperandsDoNotFit) {
  Graph g;
  Builder b(g, DType::f32);
  const auto x = b.input("x", {2, 4}, DType::f32), w = b.weight("w", {3, 4});
  const auto linear = [&](std::vector<ValueId> more, const char* epilogue) {
    more.insert(more.begin(), {x, w});
    return error_of([&] { g.add("linear", more, {{"epilogue", epilogue}}); });
  };
  EXPECT_EQ(linear({b.weight("b", {4})}, "bias"), "[linear] expected bias as f32[3] but got f32[4]");
  EXPECT_EQ(linear({b.cast(b.weight("b", {3}), DType::bf16)}, "bias"), "[linear] expected bias as f32[3] but got bf16[3]");
  EXPECT_EQ(linear({b.weight("b", {1, 3})}, "add"), "[linear] expected add as f32[2,3] but got f32[1,3]");
  EXPECT_EQ(linear({}, "silu,bias"), "[linear] expected an operand for 'bias' of the epilogue but got none");
  EXPECT_EQ(linear({b.weight("b", {3})}, "silu"), "[linear] expected 2 inputs but got 3");
  EXPECT_EQ(linear({}, "swish"), "[linear] expected an epilogue of bias, mul, add, silu, gelu, gelu_tanh but got 'swish'");
}

TEST(Graph, VerifyRefusesTwoInputsOrOutputsOfOneName) {
  Graph g;
  Builder b(g, DType::f32);
  g.add_output("y", b.input("x", {1}, DType::f32));
  verify(g);
  Graph twice = g;
  twice.add_output("y", 0);
  EXPECT_EQ(error_of([&] { verify(twice); }), "[verify] expected one output 'y' but got two");
  b.input("x", {1}, DType::f32);
  EXPECT_EQ(error_of([&] { verify(g); }), "[verify] expected one input 'x' but got two");
  Graph nothing;
  nothing.add_output("y", 3);
  EXPECT_EQ(error_of([&] { verify(nothing); }), "[verify] output 'y' names no value");
}

TEST(Graph, PruneKeepsInputsCollectivesAndWhatTheyNeed) {
  Graph g;
  Builder b(g, DType::f32);
  const auto x = b.input("x", {2}, DType::f32);
  b.input("unused", {2}, DType::f32);
  b.unary("gelu", b.weight("unused", {2}));
  g.add("all_reduce", {b.unary("sin", x)}, {{"group", Ints{0, 1}}, {"rank", 0}});
  g.add_output("y", b.unary("silu", x));
  const Graph pruned = prune(g);
  std::string ops;
  for (const auto& node : pruned.nodes()) ops += std::string(node.op->name()) + " ";
  EXPECT_EQ(ops, "input input sin all_reduce silu ");
}

TEST(Evaluate, CutsTheLeavesToTheirParts) {
  Graph g;
  g.add_output("w", g.add("weight", {},
                          {{"key", "w"}, {"dtype", "f32"}, {"full", Ints{3, 1, 2}}, {"offset", Ints{1, 0, 0}}, {"shape", Ints{2, 1, 1}}}));
  g.add_output("x", g.add("input", {}, {{"name", "x"}, {"dtype", "f32"}, {"shape", Ints{1, 2}}, {"offset", Ints{2, 0}}}));
  const auto results = evaluate(g, [](const Node&) {
    RefTensor whole({3, 2});
    std::iota(whole.data.begin(), whole.data.end(), 0);
    return whole;
  });
  EXPECT_EQ(results.at("w").data, (Doubles{2, 4}));
  EXPECT_EQ(results.at("x").data, (Doubles{4, 5}));
}

// ---- layouts ---------------------------------------------------------------------------------------------------------

// The elements as they lie in memory.
std::vector<double> in_memory(const RefTensor& x, const Order& order) {
  std::vector<double> memory(x.data.size());
  const auto logical = row_major_strides(x.shape), physical = strides_of(x.shape, order);
  for (std::size_t i = 0; i < x.data.size(); ++i) {
    std::int64_t at = 0;
    for (std::size_t d = 0; d < order.size(); ++d) at += static_cast<std::int64_t>(i) / logical[d] % x.shape[d] * physical[d];
    memory[static_cast<std::size_t>(at)] = x.data[i];
  }
  return memory;
}

bool is_order(const Order& order, const Shape& shape) {
  Order sorted = order;
  std::sort(sorted.begin(), sorted.end());
  return sorted == row_major(shape.size());
}

class LayoutOf : public testing::TestWithParam<int> {};

// However the inputs lie: every op answers with orders of the right ranks, and a view is the same memory seen otherwise.
TEST_P(LayoutOf, ViewsIsTheSameMemory) {
  std::mt19937 random(static_cast<std::uint32_t>(GetParam()));
  int views = 0, copies = 0;
  for (int i = 0; i < 30; ++i) {
    const Graph g = test::random_graph(static_cast<std::uint32_t>(GetParam() * 100 + i), 60);
    for (const auto& node : g.nodes()) {
      const auto op = g.context(node);
      std::vector<Order> produced;
      for (const auto& t : op.in) {
        produced.push_back(row_major(t.shape.size()));
        std::shuffle(produced.back().begin(), produced.back().end(), random);
      }
      const Layout layout = node.op->layout(op, produced);
      ASSERT_EQ(layout.in.size(), op.in.size()) << node.op->name();
      ASSERT_EQ(layout.out.size(), op.out.size()) << node.op->name();
      for (std::size_t k = 0; k < op.in.size(); ++k) ASSERT_TRUE(is_order(layout.in[k], op.in[k].shape)) << node.op->name();
      for (std::size_t k = 0; k < op.out.size(); ++k) ASSERT_TRUE(is_order(layout.out[k], op.out[k].shape)) << node.op->name();
      if (!layout.view || op.out[0].bytes() == 0) continue;
      ++views;
      copies += layout.in[0] != produced[0];
      std::vector<RefTensor> in(1, RefTensor(op.in[0].shape)), out(1, RefTensor(op.out[0].shape));
      std::iota(in[0].data.begin(), in[0].data.end(), 0);
      node.op->reference(op, in, out);
      ASSERT_EQ(in_memory(in[0], layout.in[0]), in_memory(out[0], layout.out[0])) << node.op->name();
    }
  }
  EXPECT_GT(views, 50);
  EXPECT_LT(copies, views);
}
INSTANTIATE_TEST_SUITE_P(Seeds, LayoutOf, testing::Range(0, 4));

TEST(MergeDims, MovesNothingWhereOnlyDimensionsOfSizeOneLieElsewhere) {
  Graph g;
  Builder b(g, DType::f32);
  const auto x = b.input("x", {1, 2, 3, 4}, DType::f32);
  for (const auto& [dim, count, produced, merged] : {std::tuple{0, 2, Order{1, 3, 0, 2}, Order{0, 2, 1}},
                                                     {1, 2, Order{0, 3, 1, 2}, Order{0, 2, 1}},
                                                     {0, 3, Order{3, 1, 2, 0}, Order{1, 0}}}) {
    const auto& node = g.producer(b.merge_dims(x, dim, count));
    const Layout layout = node.op->layout(g.context(node), std::vector<Order>{produced});
    EXPECT_EQ(layout.in[0], produced);
    EXPECT_EQ(layout.out[0], merged);
  }
  const auto& node = g.producer(b.merge_dims(x, 1, 2));
  EXPECT_EQ(node.op->layout(g.context(node), std::vector<Order>{{0, 2, 1, 3}}).in[0], row_major(4));
}

}  // namespace
}  // namespace comfytp::graph
