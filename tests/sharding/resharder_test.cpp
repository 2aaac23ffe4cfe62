// How values are fetched in the form that a reader wants.
#include <gtest/gtest.h>

#include "graph/builder.h"
#include "parity.h"

namespace comfytp::test {
namespace {

using graph::Builder;
using graph::ValueId;
using sharding::Assignment;
using sharding::Mesh;
using sharding::Placement;

// A cut of a node's factor of that name in equal parts along an axis.
void cut(Assignment& assignment, const Graph& graph, ValueId made, const std::string& factor, const Mesh& mesh, int axis = 0) {
  const auto before = assignment.size();
  const int node = graph.value(made).node;
  const auto rule = graph.nodes()[static_cast<std::size_t>(node)].op->rule(graph.context(graph.nodes()[static_cast<std::size_t>(node)]));
  for (std::size_t f = 0; f < rule.factors.size(); ++f)
    if (rule.factors[f].name == factor)
      assignment[{node, static_cast<int>(f)}] = {
          axis, proportional_bounds(rule.factors[f].size, std::vector<double>(static_cast<std::size_t>(mesh.axes()[static_cast<std::size_t>(axis)].size), 1.0))};
  ASSERT_EQ(assignment.size(), before + 1);
}

class AddedToAPartialSum : public ::testing::TestWithParam<std::tuple<Shape, Placement>> {};

TEST_P(AddedToAPartialSum, AWeightCountsOnce) {
  const auto [shape, placement] = GetParam();
  Graph graph;
  Builder b(graph, DType::f32);
  const ValueId y = b.linear(b.input("x", {16, 4, 8}, DType::f32), b.weight("w", {6, 8}), "linear");
  graph.add_output("y", b.add(y, b.weight("added", shape)));
  const Mesh mesh = Mesh::parse("tensor=2");
  Assignment assignment;
  cut(assignment, graph, y, "i", mesh);
  EXPECT_LT(error_of(graph, mesh, assignment, placement), 1e-9);
}

INSTANTIATE_TEST_SUITE_P(Shapes, AddedToAPartialSum,
                         ::testing::Combine(::testing::Values(Shape{6}, Shape{4, 6}, Shape{4, 1}, Shape{16, 4, 6}),
                                            ::testing::Values(Placement::resident, Placement::gathered)));

// Partial sums that one reader has had in quarters: gathering those twice moves 3/4 of what summing all once more would.
TEST(Resharder, StartsFromTheFormFromWhichTheLeastIsMoved) {
  Graph graph;
  Builder b(graph, DType::f32);
  const ValueId y = b.linear(b.input("x", {4, 8}, DType::f32), b.weight("w", {6, 8}), "linear");
  const ValueId quarters = b.unary("silu", y);
  graph.add_output("quarters", quarters);
  graph.add_output("whole", b.unary("tanh", y));
  const Mesh mesh = Mesh::parse("batch=2,tensor=2");
  Assignment assignment;
  cut(assignment, graph, y, "i", mesh, 1);
  cut(assignment, graph, quarters, "d0", mesh, 0);
  cut(assignment, graph, quarters, "d1", mesh, 1);
  std::map<std::string, int> collectives;
  const auto parts = sharding::partition(graph, mesh, assignment, Placement::resident);
  for (const auto& node : parts.devices[0].nodes())
    if (node.op->collective()) ++collectives[std::string(node.op->name())];
  EXPECT_EQ(collectives, (std::map<std::string, int>{{"reduce_scatter", 1}, {"all_gather", 2}}));
  EXPECT_LT(error_of(graph, mesh, assignment), 1e-9);
}

}  // namespace
}  // namespace comfytp::test
