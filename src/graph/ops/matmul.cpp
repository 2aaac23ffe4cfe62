// matmul of two activations: y[.., m, n] = sum over k of a[.., m, k] b[.., k, n]. A weight's product is a linear.
#include "base/error.h"
#include "graph/graph.h"

namespace comfytp::graph {
namespace {

class Matmul final : public Op {
 public:
  std::string_view name() const override { return "matmul"; }
  std::vector<Type> infer(const Attrs&, std::span<const Type> in) const override {
    expect_inputs(name(), in, 2, 2);
    const auto &a = in[0].shape, &b = in[1].shape;
    const bool ranks = a.size() == b.size() && a.size() >= 2;
    bool fits = ranks && in[0].dtype == in[1].dtype && a.back() == b[b.size() - 2];
    for (std::size_t d = 0; fits && d + 2 < a.size(); ++d) fits = a[d] == b[d];
    require(fits, "[matmul] expected a [..,m,k] and b [..,k,n] of one dtype but got {} and {}", to_string(in[0]), to_string(in[1]));
    Type out = in[0];
    out.shape.back() = b.back();
    return {out};
  }
  Rule rule(const OpContext& op) const override {
    Rule rule;
    Shape batch(op.in[0].shape.begin(), op.in[0].shape.end() - 2);
    auto a = free_dims(rule, batch, "batch");
    auto b = a, y = a;
    const int m = rule.add("m", op.in[0].shape[batch.size()]), n = rule.add("n", op.in[1].shape.back());
    const int k = rule.add("k", op.in[0].shape.back(), FactorKind::contracted);
    a.insert(a.end(), {m, k});
    b.insert(b.end(), {k, n});
    y.insert(y.end(), {m, n});
    rule.inputs = {a, b};
    rule.outputs = {y};
    return rule;
  }
  double flops(const OpContext& op) const override {
    return 2.0 * static_cast<double>(numel(op.out[0].shape)) * static_cast<double>(op.in[0].shape.back());
  }
  void reference(const OpContext&, std::span<const RefTensor> in, std::span<RefTensor> out) const override {
    const auto k = in[0].shape.back(), n = in[1].shape.back(), m = out[0].shape[out[0].shape.size() - 2];
    for (std::int64_t row = 0; n && row < numel(out[0].shape) / n; ++row)
      for (std::int64_t j = 0; j < k; ++j)
        for (std::int64_t c = 0; c < n; ++c) out[0].data[row * n + c] += in[0].data[row * k + j] * in[1].data[(row / m * k + j) * n + c];
  }
};
COMFYTP_OP(Matmul)

}  // namespace
}  // namespace comfytp::graph
