#include "random_graph.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "graph/builder.h"

namespace comfytp::graph::test {
namespace {

class Generator {
 public:
  explicit Generator(std::uint32_t seed) : random_(seed), b_(graph_, DType::f32) {}

  Graph run(int nodes) {
    pool_.push_back(b_.input("x", {2, 4, 3, 4}, DType::f32));
    pool_.push_back(b_.input("tokens", {2, 3, 4}, DType::f32, "prompt"));
    while (static_cast<int>(graph_.nodes().size()) < nodes) step();
    for (int i = 0; i < 4; ++i)
      graph_.add_output("y" + std::to_string(i), pool_[pool_.size() - 1 - below(std::min<std::size_t>(pool_.size(), 8))]);
    return std::move(graph_);
  }

 private:
  std::size_t below(std::size_t n) { return std::uniform_int_distribution<std::size_t>(0, n - 1)(random_); }
  std::int64_t from(std::int64_t lo, std::int64_t hi) {
    return lo + static_cast<std::int64_t>(below(static_cast<std::size_t>(hi - lo + 1)));
  }
  bool coin() { return below(2) == 0; }
  template <typename T>
  T one_of(std::initializer_list<T> items) {
    return items.begin()[below(items.size())];
  }

  ValueId any() { return pool_[below(pool_.size())]; }
  const Shape& shape(ValueId id) { return graph_.type(id).shape; }
  // Few keys, so that some weights are used twice.
  ValueId weight(const Shape& shape) { return b_.weight("w" + std::to_string(below(3)) + comfytp::to_string(shape), shape); }
  ValueId like(const Shape& wanted) {
    for (int tries = 0; tries < 20; ++tries)
      if (const ValueId id = any(); shape(id) == wanted) return id;
    return weight(wanted);
  }
  void push(ValueId id) {
    if (numel(shape(id)) <= 600 && shape(id).size() <= 6) pool_.push_back(id);
  }

  void projection(ValueId x, bool convolution) {
    const auto o = from(1, 8);
    Attrs attrs;
    Shape out = shape(x);
    std::vector<ValueId> in = {x};
    if (convolution) {
      const auto extent = one_of<std::int64_t>({1, 3}), stride = from(1, 2), padding = extent / 2;
      in.push_back(weight({o, out[1], extent, extent}));
      attrs = {{"stride", Ints{stride, stride}}, {"padding", Ints(4, padding)}};
      for (int d : {2, 3}) out[d] = (out[d] + 2 * padding - extent) / stride + 1;
      out[1] = o;
    } else {
      in.push_back(weight({o, out.back()}));
      out.back() = o;
    }
    if (coin()) {
      std::string list;
      for (auto count = from(1, 3); count-- > 0;) {
        const std::string next = one_of<const char*>({"bias", "add", "mul", "silu", "gelu", "gelu_tanh"});
        list.append(list.empty() ? "" : ",").append(next);
        if (next == "bias") in.push_back(weight({o}));
        if (next == "add" || next == "mul") in.push_back(like(out));
      }
      attrs.set("epilogue", list);
    }
    ValueId y = graph_.add(convolution ? "conv2d" : "linear", in, attrs, "site " + std::to_string(below(5)));
    if (coin()) y = b_.add(y, weight(convolution ? Shape{o, 1, 1} : Shape{o}));
    push(y);
    for (auto slices = coin() ? from(1, 3) : 0; slices-- > 0;) slice(y, convolution ? 1 : static_cast<std::int64_t>(out.size()) - 1);
  }

  void slice(ValueId x, std::int64_t dim) {
    const auto size = shape(x)[static_cast<std::size_t>(dim)], start = from(0, std::max<std::int64_t>(size - 1, 0));
    push(b_.slice(x, dim, start, from(std::min(start + 1, size), size)));
  }

  // One of the ops that models of today have a few of.
  void rarer(ValueId x, std::int64_t dim) {
    const Shape s = shape(x);
    Ints before(s.size(), 0), wider = s;
    before[static_cast<std::size_t>(dim)] = from(0, 2);
    switch (below(6)) {
      case 0:
        push(graph_.add("softmax", {x}, {{"dim", dim}}));
        break;
      case 1:
        push(graph_.add(one_of<const char*>({"sum", "amax"}), {x}, {{"dims", Ints{dim}}}));
        break;
      case 2:
        push(graph_.add("pad", {x}, {{"before", before}, {"after", Ints(s.size(), 0)}, {"mode", "constant"}, {"value", 0.5}}));
        break;
      case 3:
        for (auto& size : wider) size = size == 1 ? from(1, 3) : size;
        push(graph_.add("expand", {x}, {{"shape", wider}}));
        break;
      case 4: {
        Shape other = s;
        if (s.size() < 2) break;
        std::swap(other[s.size() - 1], other[s.size() - 2]);
        push(graph_.add("matmul", {x, like(other)}));
        break;
      }
      case 5:
        if (coin()) push(graph_.add("rms_norm", {x, weight({s.back()})}, {{"epsilon", 0.1}}));
        else push(b_.mul(graph_.add("rms_norm", {x, b_.constant({s.back()}, {1}, DType::f32)}, {{"epsilon", 0.1}}), weight({s.back()})));
        break;
    }
  }

  void step() {
    const ValueId x = any();
    const Shape s = shape(x);
    const auto rank = static_cast<std::int64_t>(s.size());
    const auto dim = rank ? from(0, rank - 1) : 0;
    switch (below(17)) {
      case 0:
      case 1:
        if (rank >= 1) projection(x, rank == 4 && coin());
        break;
      case 2:
        push(b_.unary(one_of<const char*>({"silu", "gelu", "gelu_tanh", "sin", "tanh", "sigmoid", "neg", "relu"}), x));
        break;
      case 3:
      case 4: {
        Shape other = s;
        if (rank && coin()) other[static_cast<std::size_t>(dim)] = 1;
        const ValueId y = like(other);
        const auto op = one_of<const char*>({"add", "add", "sub", "mul", "maximum"});
        push(coin() ? graph_.add(op, {x, y}) : graph_.add(op, {y, x}));
        break;
      }
      case 5:
        push(graph_.add("cast", {graph_.add("cast", {x}, {{"dtype", one_of<std::string>({"f32", "f64"})}})}, {{"dtype", "f32"}}));
        break;
      case 6:
      case 7: {
        Ints order(s.size());
        std::iota(order.begin(), order.end(), 0);
        std::shuffle(order.begin(), order.end(), random_);
        push(b_.transpose(x, order));
        break;
      }
      case 8:
      case 9: {
        if (!rank) break;
        const auto size = s[static_cast<std::size_t>(dim)];
        const auto part = size % 2 == 0 ? 2 : size % 3 == 0 ? 3 : 1;
        push(b_.split_dim(x, dim, coin() ? Ints{size} : Ints{part, size / part}));
        break;
      }
      case 10:
      case 11:
        if (rank) push(b_.merge_dims(x, dim, from(1, rank - dim)));
        break;
      case 12:
        if (rank) slice(x, dim);
        break;
      case 13:
        if (rank && coin()) {
          push(coin() ? b_.concat({x, like(s)}, dim) : b_.concat({x}, dim));
        } else if (rank) {
          const auto size = s[static_cast<std::size_t>(dim)], cut = from(0, size);
          push(b_.concat({b_.slice(x, dim, 0, cut), b_.slice(x, dim, cut, size)}, dim));
        }
        break;
      case 14:
        if (rank >= 2 && s[1] > 0) {
          Attrs attrs{{"groups", s[1] % 2 ? std::int64_t{1} : std::int64_t{2}}, {"epsilon", 0.1}};
          if (coin()) attrs.set("activation", one_of<std::string>({"", "silu"}));
          push(graph_.add("group_norm", {x, weight({s[1]}), weight({s[1]})}, attrs));
        }
        if (rank == 4 && s[2] && s[3]) push(b_.upsample_nearest(x, s[2] * from(1, 2), s[3] + from(0, 2)));
        break;
      case 15:
        if (rank && numel(s)) rarer(x, dim);
        break;
      case 16:
        if (rank == 4) push(b_.attention(x, like(s), like(s), 0.5));
        push(b_.constant({2}, {0.5, 1.5}, DType::f32));
        if (rank) push(b_.layer_norm(x, weight({s.back()}), weight({s.back()}), 0.1));
        break;
    }
  }

  std::mt19937 random_;
  Graph graph_;
  Builder b_;
  std::vector<ValueId> pool_;
};

}  // namespace

Graph random_graph(std::uint32_t seed, int nodes) { return Generator(seed).run(nodes); }

Leaves seeded_leaves() {
  return [](const Node& node) {
    const bool input = is(node, "input");
    RefTensor whole(input ? node.attrs.ints("shape") : node.attrs.ints("full"));
    std::uint32_t seed = 2166136261u;
    for (char c : node.attrs.text(input ? "name" : "key")) seed = (seed ^ static_cast<unsigned char>(c)) * 16777619u;
    std::mt19937 random(seed);
    for (auto& v : whole.data) v = random() / 2147483648.0 - 1;
    return whole;
  };
}

double difference(const Results& a, const Results& b) {
  constexpr double infinite = std::numeric_limits<double>::infinity();
  double worst = a.size() == b.size() ? 0 : infinite;
  for (const auto& [name, x] : a) {
    const auto it = b.find(name);
    if (it == b.end() || it->second.shape != x.shape) return infinite;
    for (std::size_t i = 0; i < x.data.size(); ++i) {
      const double off = std::abs(x.data[i] - it->second.data[i]) / (1 + std::abs(x.data[i]));
      worst = std::isfinite(off) ? std::max(worst, off) : infinite;
    }
  }
  return worst;
}

}  // namespace comfytp::graph::test
