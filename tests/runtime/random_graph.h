// Small graphs that nobody would write by hand.
#pragma once

#include <random>

#include "graph/builder.h"

namespace comfytp::test {

/// A chain with branches over images [n,c,h,w] and tokens [n,l,c], on call and prompt inputs, with some values as outputs.
class RandomGraph {
 public:
  explicit RandomGraph(std::uint64_t seed) : b_(g_, DType::f32), random_(seed) {}

  graph::Graph build() {
    values_ = {b_.input("image", {2, 6, 5, 4}, DType::f32), b_.input("tokens", {2, 5, 6}, DType::f32),
               b_.input("prompt", {2, 3, 6}, DType::f32, "prompt"), b_.constant({2, 3, 6}, {0.5}, DType::f32)};
    for (int i = 0; i < 14; ++i) step(i);
    for (int i = 0; i < 3; ++i) g_.add_output("out" + std::to_string(i), values_[values_.size() - 1 - static_cast<std::size_t>(i)]);
    g_.add_output("any", values_[pick(values_.size())]);
    graph::verify(g_);
    return std::move(g_);
  }

 private:
  using Id = graph::ValueId;
  std::size_t pick(std::size_t n) { return static_cast<std::size_t>(random_() % n); }
  std::string key(const std::string& op, int i) { return op + std::to_string(i); }

  void step(int i) {
    const Id v = values_[values_.size() - 1 - pick(std::min<std::size_t>(values_.size(), 5))];
    const Shape s = b_.shape(v);
    const auto last = s.back();
    switch (pick(s.size() == 4 ? 11 : 9)) {
      case 0: return push(b_.unary(pick(2) ? "silu" : "gelu", v));
      case 1: return push(b_.mul(v, like(v)));
      case 2: return push(b_.add(v, like(v)));
      case 3: return push(b_.linear(v, b_.weight(key("linear", i), {6, last}), pick(2) ? b_.weight(key("bias", i), {6}) : -1, key("l", i)));
      case 4: return push(b_.layer_norm(v, b_.weight(key("g", i), {last}), b_.weight(key("b", i), {last}), 1e-5, key("ln", i)));
      case 5: return push(pick(2) ? b_.concat({v, like(v)}, static_cast<std::int64_t>(s.size()) - 1) : b_.concat({v, v, like(v)}, 1));
      case 6: return push(last < 2 ? v : b_.slice(v, static_cast<std::int64_t>(s.size()) - 1, 1, last));
      case 7: return push(s.size() == 3 ? b_.transpose(v, {0, 2, 1}) : b_.merge_dims(v, 2, 2));
      case 8: {
        if (s.size() == 4) return push(b_.transpose(b_.merge_dims(v, 2, 2), {0, 2, 1}));
        const auto heads = b_.transpose(b_.split_dim(v, 2, {1, last}), {0, 2, 1, 3});
        return push(b_.merge_dims(b_.transpose(b_.attention(heads, heads, heads, 0.3, key("a", i)), {0, 2, 1, 3}), 2, 2));
      }
      case 9: return push(b_.conv2d(v, b_.weight(key("conv", i), {6, s[1], 3, 3}), b_.weight(key("cb", i), {6, 1, 1}), 1 + static_cast<std::int64_t>(pick(2)), 1, key("c", i)));
      default: return push(b_.group_norm(v, b_.weight(key("gg", i), {s[1]}), b_.weight(key("gb", i), {s[1]}), s[1] % 3 ? 1 : 3, 1e-5, key("gn", i)));
    }
  }
  // Something of the same shape: another value, or what comes of it.
  Id like(Id v) {
    for (std::size_t k = 0; k < values_.size(); ++k)
      if (const Id other = values_[pick(values_.size())]; other != v && b_.shape(other) == b_.shape(v)) return other;
    return b_.unary("sin", v);
  }
  void push(Id v) {
    if (numel(b_.shape(v)) < 3000) values_.push_back(v);
  }

  graph::Graph g_;
  graph::Builder b_;
  std::mt19937_64 random_;
  std::vector<Id> values_;
};

inline graph::Graph random_graph(std::uint64_t seed) { return RandomGraph(seed).build(); }

}  // namespace comfytp::test
