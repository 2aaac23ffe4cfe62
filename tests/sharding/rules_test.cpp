// Every op, cut in every way its rule allows, gives what the whole op gives.
#include <gtest/gtest.h>

#include <random>
#include <set>

#include "base/error.h"
#include "op_cases.h"
#include "parity.h"
#include "sharding/rule_query.h"

namespace comfytp::test {
namespace {

using graph::Graph;
using graph::RefTensor;
using graph::ValueId;
using sharding::Assignment;
using sharding::Axis;
using sharding::Mesh;

// inputs -> cast to the same type (a node that can be cut otherwise) -> op -> outputs
struct OneOp {
  Graph graph;
  int node = 0;
  std::vector<int> makers;
  explicit OneOp(const OpCase& c) {
    std::vector<ValueId> inputs;
    for (std::size_t i = 0; i < c.inputs.size(); ++i) {
      const ValueId in = graph.add("input", {}, {{"name", fmt::format("in{}", i)}, {"shape", c.inputs[i].shape}, {"dtype", std::string(name_of(c.inputs[i].dtype))}});
      makers.push_back(static_cast<int>(graph.nodes().size()));
      inputs.push_back(graph.add("cast", {in}, {{"dtype", std::string(name_of(c.inputs[i].dtype))}}, fmt::format("maker{}", i)));
    }
    node = static_cast<int>(graph.nodes().size());
    const auto out = graph.add_node(graph::find_op(c.op), inputs, c.attrs, "op");
    for (std::size_t i = 0; i < out.size(); ++i) graph.add_output(fmt::format("out{}", i), out[i]);
  }
};

std::vector<int> cuttable(const Graph& graph, int node) {
  const auto& n = graph.nodes()[static_cast<std::size_t>(node)];
  const auto rule = n.op->rule(graph.context(n));
  std::vector<int> factors;
  for (std::size_t f = 0; f < rule.factors.size(); ++f)
    if (sharding::can_cut(rule, static_cast<int>(f))) factors.push_back(static_cast<int>(f));
  return factors;
}

std::vector<std::int64_t> bounds(std::int64_t size, int parts, int variant) {
  std::vector<double> shares(static_cast<std::size_t>(parts), 1.0);
  if (variant == 1)
    for (int i = 0; i < parts; ++i) shares[static_cast<std::size_t>(i)] = 1 + 2 * i;
  if (variant == 2) shares[0] = 1e-9;  // an empty part
  return proportional_bounds(size, shares);
}

std::int64_t size_of_factor(const Graph& graph, int node, int factor) {
  const auto& n = graph.nodes()[static_cast<std::size_t>(node)];
  return n.op->rule(graph.context(n)).factors[static_cast<std::size_t>(factor)].size;
}

std::vector<Mesh> meshes() {
  std::vector<Mesh> result;
  for (int n : {2, 3, 4, 8}) result.push_back(Mesh({{"tensor", n, {}}}));
  for (auto [a, b] : {std::pair{2, 2}, {2, 3}, {4, 2}}) result.push_back(Mesh({{"batch", a, {}}, {"tensor", b, {}}}));
  return result;
}

// Tries every choice of factors for the axes, in three ways of cutting; the op's inputs are whole or cut in a random way.
int try_all(const OpCase& c, const std::function<void(const Graph&, const Mesh&, const Assignment&)>& check) {
  const OneOp one(c);
  std::mt19937 random(7);
  int count = 0;
  const auto factors = cuttable(one.graph, one.node);
  for (const auto& mesh : meshes()) {
    const auto axes = static_cast<int>(mesh.axes().size());
    std::vector<std::vector<int>> choices = {{}};
    for (int axis = 0; axis < axes; ++axis) {
      std::vector<std::vector<int>> longer;
      for (const auto& choice : choices) {
        for (int f : factors)
          if (std::find(choice.begin(), choice.end(), f) == choice.end()) longer.push_back(choice), longer.back().push_back(f);
        longer.push_back(choice);
        longer.back().push_back(-1);
      }
      choices = std::move(longer);
    }
    for (const auto& choice : choices)
      for (int variant = 0; variant < 3; ++variant)
        for (bool cut_inputs : {false, true}) {
          Assignment assignment;
          for (int axis = 0; axis < axes; ++axis) {
            const int parts = mesh.axes()[axis].size;
            if (choice[axis] >= 0)
              assignment[{one.node, choice[axis]}] = {axis, bounds(size_of_factor(one.graph, one.node, choice[axis]), parts, variant)};
            for (int maker : one.makers) {
              const auto free = cuttable(one.graph, maker);
              if (!cut_inputs || free.empty()) continue;
              const int f = free[random() % free.size()];
              if (!assignment.count({maker, f}))
                assignment[{maker, f}] = {axis, bounds(size_of_factor(one.graph, maker, f), parts, static_cast<int>(random() % 3))};
            }
          }
          check(one.graph, mesh, assignment);
          ++count;
        }
  }
  return count;
}

TEST(ShardingRules, EveryOpHasACase) {
  std::set<std::string> covered;
  for (const auto& c : op_cases()) covered.insert(c.op);
  for (const auto* op : graph::all_ops()) {
    const std::string name(op->name());
    if (name == "input" || name == "weight" || name == "constant" || op->collective() || name.starts_with("test_")) continue;
    EXPECT_TRUE(covered.count(name)) << name << " has no case in op_cases.h";
  }
}

class EveryCut : public ::testing::TestWithParam<std::size_t> {};

TEST_P(EveryCut, EqualsTheWhole) {
  const auto c = op_cases()[GetParam()];
  const int count = try_all(c, [](const Graph& graph, const Mesh& mesh, const Assignment& assignment) {
    ASSERT_LT(error_of(graph, mesh, assignment), 1e-9) << mesh.to_string() << "\n" << assignment.size() << " cuts";
  });
  std::printf("%s: %d shardings\n", c.op.c_str(), count);
  EXPECT_GE(count, 42);
}

INSTANTIATE_TEST_SUITE_P(Ops, EveryCut, ::testing::Range<std::size_t>(0, op_cases().size()),
                         [](const auto& info) { return fmt::format("{}_{}", info.param, op_cases()[info.param].op); });

// y = x summed over its last dimension, by rules that are wrong in one place each.
class Broken final : public graph::Op {
 public:
  Broken(std::string name, int fault) : name_(std::move(name)), fault_(fault) {}
  std::string_view name() const override { return name_; }
  std::vector<graph::Type> infer(const graph::Attrs&, std::span<const graph::Type> in) const override {
    return {{in[0].dtype, {in[0].shape[0]}}};
  }
  graph::Rule rule(const graph::OpContext& op) const override {
    graph::Rule rule;
    const int n = rule.add("n", op.in[0].shape[0]);
    // Fault 1: a summed dimension is called free, so that parts are taken for the whole.
    const int k = rule.add("k", op.in[0].shape[1], fault_ == 1 ? graph::FactorKind::free : graph::FactorKind::contracted);
    rule.inputs = {{n, k}};
    // Fault 2: the operand's window is off by one row.
    if (fault_ == 2)
      rule.inputs[0][0] = graph::DimRule(n, [size = op.in[0].shape[0]](Interval i) {
        return i.lo > 0 ? Interval{i.lo - 1, i.hi - 1} : Interval{i.lo, i.lo + i.size()};
      });
    rule.outputs = {{n}};
    return rule;
  }
  void reference(const graph::OpContext&, std::span<const RefTensor> in, std::span<RefTensor> out) const override {
    const auto columns = in[0].shape[1];
    for (std::size_t i = 0; i < in[0].data.size(); ++i)
      out[0].data[i / static_cast<std::size_t>(columns)] += in[0].data[i];
  }

 private:
  std::string name_;
  int fault_;
};
const bool registered = graph::detail::register_op(std::make_unique<Broken>("test_right", 0)) &&
                        graph::detail::register_op(std::make_unique<Broken>("test_summed_called_free", 1)) &&
                        graph::detail::register_op(std::make_unique<Broken>("test_window_off_by_one", 2));

int failures(const std::string& op) {
  int failed = 0;
  try_all({op, {}, {{DType::f32, {6, 5}}}}, [&](const Graph& graph, const Mesh& mesh, const Assignment& assignment) {
    failed += error_of(graph, mesh, assignment) > 1e-9;
  });
  return failed;
}

TEST(ShardingRules, ABrokenRuleIsFound) {
  ASSERT_TRUE(registered);
  EXPECT_EQ(failures("test_right"), 0);
  EXPECT_GT(failures("test_summed_called_free"), 0);
  EXPECT_GT(failures("test_window_off_by_one"), 0);
}

}  // namespace
}  // namespace comfytp::test
