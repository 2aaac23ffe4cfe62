// attention: softmax(q k^T * scale) v per head (Vaswani et al. 2017).
#include <algorithm>
#include <cmath>
#include <limits>

#include "base/error.h"
#include "graph/graph.h"

namespace comfytp::graph {
namespace {

// Inputs: q [n, heads, queries, d], k [n, groups, keys, d], v [n, groups, keys, dv], where groups divides heads and query head
// h reads group h / (heads / groups) (Ainslie et al. 2023); maybe a mask [n|1, heads|1, queries|1, keys]: bool (false: this key is not
// seen; a query that sees no key gives 0, as in torch since 2.5) or of q's dtype (added to the scores). Attribute: scale.
class Attention final : public Op {
 public:
  std::string_view name() const override { return "attention"; }
  std::vector<Type> infer(const Attrs& a, std::span<const Type> in) const override {
    expect_inputs(name(), in, 3, 4);
    for (const auto& t : in) expect_rank(name(), "q, k, v and mask", t, 4);
    const auto &q = in[0].shape, &k = in[1].shape, &v = in[2].shape;
    require(q[0] == k[0] && q[0] == v[0] && k[1] == v[1] && (k[1] ? q[1] % k[1] == 0 : q[1] == 0) && q[3] == k[3] && k[2] == v[2] &&
                in[0].dtype == in[1].dtype && in[0].dtype == in[2].dtype,
            "[attention] expected q [n,h,l,d], k [n,g,s,d] and v [n,g,s,e] of one dtype, g dividing h, but got {}, {} and {}", to_string(in[0]),
            to_string(in[1]), to_string(in[2]));
    if (in.size() == 4) {
      const Shape full = {q[0], q[1], q[2], k[2]};
      bool fits = in[3].dtype == DType::boolean || in[3].dtype == in[0].dtype;
      for (std::size_t d = 0; d < 4; ++d) fits = fits && (in[3].shape[d] == full[d] || (d < 3 && in[3].shape[d] == 1));
      require(fits, "[attention] expected a mask that broadcasts to {} but got {}", comfytp::to_string(full), to_string(in[3]));
    }
    (void)a.real("scale");
    return {{in[0].dtype, {q[0], q[1], q[2], v[3]}}};
  }
  Rule rule(const OpContext& op) const override {
    Rule rule;
    const auto &q = op.in[0].shape, &v = op.in[2].shape;
    const int n = rule.add("n", q[0]), g = rule.add("heads", v[1]), r = rule.add("queries_a_head", v[1] ? q[1] / v[1] : 1, FactorKind::whole);
    const int l = rule.add("queries", q[2]), s = rule.add("keys", v[2], FactorKind::whole), d = rule.add("d", q[3], FactorKind::whole);
    const int e = rule.add("e", v[3]);
    rule.inputs = {{n, DimRule({g, r}), l, d}, {n, g, s, d}, {n, g, s, e}};
    rule.outputs = {{n, DimRule({g, r}), l, e}};
    if (op.in.size() == 4) {
      const auto& mask = op.in[3].shape;
      std::vector<DimRule> dims = {n, DimRule({g, r}), l, s};
      for (std::size_t i = 0; i < 3; ++i)
        if (mask[i] == 1 && op.out[0].shape[i] != 1) dims[i] = DimRule();
      rule.inputs.push_back(dims);
    }
    return rule;
  }
  // Whatever lies with d innermost is read as it is; the result lies like q, so that merging the heads moves nothing.
  Layout layout(const OpContext& op, std::span<const Order> produced) const override {
    Layout layout;
    for (std::size_t i = 0; i < 3; ++i) layout.in.push_back(produced[i].back() == 3 ? produced[i] : row_major(4));
    if (op.in.size() == 4) layout.in.push_back(row_major(4));
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
    const auto h = qs[1], l = qs[2], d = qs[3], s = vs[2], e = vs[3];
    const double scale = op.attrs.real("scale");
    const auto masked = [&](std::int64_t head, std::int64_t i, std::int64_t j) {
      const auto& m = in[3].shape;
      const auto at = (((m[0] == 1 ? 0 : head / h) * m[1] + (m[1] == 1 ? 0 : head % h)) * m[2] + (m[2] == 1 ? 0 : i)) * s + j;
      return in[3].data[static_cast<std::size_t>(at)];
    };
    std::vector<double> p(static_cast<std::size_t>(s));
    for (std::int64_t b = 0; b < qs[0] * h; ++b) {
      const auto kv = b / h * vs[1] + b % h / (h / vs[1]);
      for (std::int64_t i = 0; i < l; ++i) {
        double top = -std::numeric_limits<double>::infinity(), sum = 0;
        for (std::int64_t j = 0; j < s; ++j) {
          p[j] = 0;
          for (std::int64_t c = 0; c < d; ++c) p[j] += in[0].data[(b * l + i) * d + c] * in[1].data[(kv * s + j) * d + c];
          p[j] *= scale;
          if (in.size() == 4 && op.in[3].dtype == DType::boolean && masked(b, i, j) == 0) p[j] = -std::numeric_limits<double>::infinity();
          if (in.size() == 4 && op.in[3].dtype != DType::boolean) p[j] += masked(b, i, j);
          top = std::max(top, p[j]);
        }
        if (top == -std::numeric_limits<double>::infinity()) continue;
        for (auto& x : p) sum += x = std::exp(x - top);
        for (std::int64_t j = 0; j < s; ++j)
          for (std::int64_t c = 0; c < e; ++c) out[0].data[(b * l + i) * e + c] += p[j] / sum * in[2].data[(kv * s + j) * e + c];
      }
    }
  }
};
COMFYTP_OP(Attention)

}  // namespace
}  // namespace comfytp::graph
