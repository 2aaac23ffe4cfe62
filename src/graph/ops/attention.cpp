// attention: softmax(q k^T * scale) v per head (Vaswani et al. 2017).
#include <algorithm>
#include <cmath>
#include <limits>

#include "base/error.h"
#include "graph/graph.h"

namespace comfytp::graph {
namespace {

// Inputs: q [n, heads, queries, d], k [n, heads, keys, d], v [n, heads, keys, dv]. Attribute: scale.
class Attention final : public Op {
 public:
  std::string_view name() const override { return "attention"; }
  std::vector<Type> infer(const Attrs& a, std::span<const Type> in) const override {
    expect_inputs(name(), in, 3, 3);
    for (const auto& t : in) expect_rank(name(), "q, k and v", t, 4);
    const auto &q = in[0].shape, &k = in[1].shape, &v = in[2].shape;
    require(q[0] == k[0] && q[0] == v[0] && q[1] == k[1] && q[1] == v[1] && q[3] == k[3] && k[2] == v[2] && in[0].dtype == in[1].dtype &&
                in[0].dtype == in[2].dtype,
            "[attention] expected q [n,h,l,d], k [n,h,s,d] and v [n,h,s,e] of one dtype but got {}, {} and {}", to_string(in[0]),
            to_string(in[1]), to_string(in[2]));
    (void)a.real("scale");
    return {{in[0].dtype, {q[0], q[1], q[2], v[3]}}};
  }
  Rule rule(const OpContext& op) const override {
    Rule rule;
    const auto &q = op.in[0].shape, &v = op.in[2].shape;
    const int n = rule.add("n", q[0]), h = rule.add("heads", q[1]), l = rule.add("queries", q[2]);
    const int s = rule.add("keys", v[2], FactorKind::whole), d = rule.add("d", q[3], FactorKind::whole);
    const int e = rule.add("e", v[3]);
    rule.inputs = {{n, h, l, d}, {n, h, s, d}, {n, h, s, e}};
    rule.outputs = {{n, h, l, e}};
    return rule;
  }
  // Whatever lies with d innermost is read as it is; the result lies like q, so that merging the heads moves nothing.
  Layout layout(const OpContext& op, std::span<const Order> produced) const override {
    Layout layout;
    for (std::size_t i = 0; i < 3; ++i) layout.in.push_back(produced[i].back() == 3 ? produced[i] : row_major(4));
    const bool tokens_outside = op.in[0].shape[2] == 1 || layout.in[0] == Order{0, 2, 1, 3};
    layout.out = {tokens_outside ? Order{0, 2, 1, 3} : row_major(4)};
    return layout;
  }
  double flops(const OpContext& op) const override {
    const auto &q = op.in[0].shape, &v = op.in[2].shape;
    return 2.0 * static_cast<double>(q[0] * q[1] * q[2] * v[2]) * static_cast<double>(q[3] + v[3]);
  }
  void reference(const OpContext& op, std::span<const RefTensor> in, std::span<RefTensor> out) const override {
    const auto &qs = in[0].shape, &vs = in[2].shape;
    const auto l = qs[2], d = qs[3], s = vs[2], e = vs[3];
    const double scale = op.attrs.real("scale");
    std::vector<double> p(static_cast<std::size_t>(s));
    for (std::int64_t b = 0; b < qs[0] * qs[1]; ++b)
      for (std::int64_t i = 0; i < l; ++i) {
        double top = -std::numeric_limits<double>::infinity(), sum = 0;
        for (std::int64_t j = 0; j < s; ++j) {
          p[j] = 0;
          for (std::int64_t c = 0; c < d; ++c) p[j] += in[0].data[(b * l + i) * d + c] * in[1].data[(b * s + j) * d + c];
          p[j] *= scale;
          top = std::max(top, p[j]);
        }
        for (auto& x : p) sum += x = std::exp(x - top);
        for (std::int64_t j = 0; j < s; ++j)
          for (std::int64_t c = 0; c < e; ++c) out[0].data[(b * l + i) * e + c] += p[j] / sum * in[2].data[(b * s + j) * e + c];
      }
  }
};
COMFYTP_OP(Attention)

}  // namespace
}  // namespace comfytp::graph
