// Sequences of tokens, joined and parted in any order, over any mesh, give what they give whole.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include "graph/builder.h"
#include "graph/rewrites.h"
#include "parity.h"
#include "sharding/strategy.h"

namespace comfytp::test {
namespace {

using graph::Builder;
using graph::ValueId;

constexpr int kWidth = 8, kLongest = 40;

// Streams of tokens, some of them an image's, and what a model may do with them.
class RandomModel {
 public:
  explicit RandomModel(unsigned seed) : random_(seed) {
    const int batch = number(1, 2), inputs = number(1, 3);
    for (int i = 0; i < inputs; ++i)
      streams_.push_back(number(0, 2) == 0 ? image(batch, i) : b_.input(fmt::format("x{}", i), {batch, number(1, 9), kWidth}, DType::f32));
    for (int steps = number(2, 9); steps > 0; --steps) step();
    graph_.add_output("y", linear(any()));
    graph_ = graph::prune(graph_);
    if (number(0, 1)) graph_ = graph::normalise(graph_);
  }
  const Graph& graph() const { return graph_; }
  int number(int least, int most) { return least + static_cast<int>(random_() % static_cast<unsigned>(most - least + 1)); }

 private:
  ValueId image(int batch, int i) {
    ValueId x = b_.input(fmt::format("x{}", i), {batch, kWidth, number(1, 5), number(1, 3)}, DType::f32);
    if (number(0, 1)) x = b_.conv2d(x, weight({kWidth, kWidth, 3, 3}), weight({kWidth, 1, 1}), 1, 1, "conv");
    return b_.transpose(b_.merge_dims(x, 2, 2), {0, 2, 1});
  }
  ValueId weight(Shape shape) { return b_.weight(fmt::format("w{}", weights_++), std::move(shape)); }
  ValueId linear(ValueId x) { return b_.linear(x, weight({kWidth, kWidth})); }
  ValueId heads(ValueId x) { return b_.transpose(b_.split_dim(x, 2, {2, kWidth / 2}), {0, 2, 1, 3}); }
  ValueId attend(ValueId q, ValueId kv) {
    const ValueId v = number(0, 1) ? b_.unary("tanh", kv) : kv;
    return b_.merge_dims(b_.transpose(b_.attention(q, kv, v, 0.5), {0, 2, 1, 3}), 2, 2);
  }
  std::int64_t tokens(ValueId x) { return b_.shape(x)[1]; }
  ValueId& any() { return streams_[static_cast<std::size_t>(number(0, static_cast<int>(streams_.size()) - 1))]; }

  // In place of the stream it was made of, or beside it.
  void put(ValueId& stream, ValueId x) {
    if (tokens(x) > kLongest) x = b_.slice(x, 1, 0, kLongest / 2);
    if (number(0, 1))
      stream = x;
    else
      streams_.push_back(x);
  }

  void step() {
    ValueId& x = any();
    const auto length = tokens(x);
    switch (number(0, 5)) {
      case 0: x = b_.add(x, b_.unary("silu", linear(x))); break;
      case 1: put(x, b_.concat({x, any()}, 1)); break;
      case 2: put(x, b_.concat({any(), x, any()}, 1)); break;
      case 3: {
        const auto from = number(0, static_cast<int>(length) - 1);
        put(x, b_.slice(x, 1, from, number(from + 1, static_cast<int>(length))));
        break;
      }
      case 4: x = b_.add(x, attend(heads(linear(x)), heads(any()))); break;
      default: {  // jointly with another
        const ValueId q = heads(linear(x)), both = b_.concat({heads(any()), q}, 2), all = attend(both, both);
        x = b_.add(x, b_.slice(all, 1, tokens(all) - length, tokens(all)));
      }
    }
  }

  std::mt19937 random_;
  Graph graph_;
  Builder b_{graph_, DType::f32};
  std::vector<ValueId> streams_;
  int weights_ = 0;
};

class AnyTokens : public ::testing::TestWithParam<const char*> {};

TEST_P(AnyTokens, GiveWhatTheyGiveWhole) {
  const auto mesh = sharding::Mesh::parse(GetParam());
  for (unsigned seed = 0; seed < 60; ++seed) {
    RandomModel model(seed);
    const auto placement = model.number(0, 1) ? sharding::Placement::resident : sharding::Placement::gathered;
    const auto fusion = model.number(0, 1) ? graph::Fusion::passes : graph::Fusion::epilogues;
    EXPECT_LT(error_of(model.graph(), mesh, sharding::decide(model.graph(), mesh).assignment, placement, fusion), 1e-9) << seed;
  }
}

INSTANTIATE_TEST_SUITE_P(Meshes, AnyTokens,
                         ::testing::Values("patch=2", "patch=3", "patch=4", "patch=5:1:1", "patch=1:3", "batch=2,patch=2", "patch=2,tensor=2", "tensor=2"));

}  // namespace
}  // namespace comfytp::test
