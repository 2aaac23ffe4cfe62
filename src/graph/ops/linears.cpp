// linears: several linears of one x, so that a backend may multiply them together, or make ready once what they all read: x rounded to fp8.
// fuse() makes it on a device's graph, of linears that stand together: small ones, and those that ask for their products in fp8.
#include "graph/ops/linears.h"

#include "base/error.h"
#include "graph/graph.h"

namespace comfytp::graph {
namespace {

// Inputs: x [.., i], the weights [o, i], the biases [o] of those that have one. Outputs: one of each linear. Attributes: biased, for each linear
// 1 or 0; product, where they ask for one, as linear's.
class Linears final : public Op {
 public:
  std::string_view name() const override { return "linears"; }
  std::vector<Type> infer(const Attrs& a, std::span<const Type> in) const override {
    const auto& biased = a.ints("biased");
    std::size_t operands = 1 + biased.size();
    for (auto b : biased) {
      require(b == 0 || b == 1, "[linears] expected biased of 0 and 1 but got {}", b);
      operands += static_cast<std::size_t>(b);
    }
    require(!biased.empty() && in.size() == operands, "[linears] expected x and the operands of {} linears, {} in all, but got {}", biased.size(), operands,
            in.size());
    std::vector<Type> out;
    for (const auto& one : linears_of(a)) out.push_back(find_op("linear").infer(one.attrs, one.operands(in))[0]);
    return out;
  }
  double flops(const OpContext& op) const override {
    double sum = 0;
    const auto all = linears_of(op.attrs);
    for (std::size_t k = 0; k < all.size(); ++k) sum += find_op("linear").flops({all[k].attrs, all[k].operands(std::span<const Type>(op.in)), {op.out[k]}});
    return sum;
  }
  void reference(const OpContext& op, std::span<const RefTensor> in, std::span<RefTensor> out) const override {
    const auto all = linears_of(op.attrs);
    for (std::size_t k = 0; k < all.size(); ++k)
      find_op("linear").reference({all[k].attrs, all[k].operands(std::span<const Type>(op.in)), {op.out[k]}}, all[k].operands(in), out.subspan(k, 1));
  }
};
COMFYTP_OP(Linears)

}  // namespace

std::vector<LinearOfSeveral> linears_of(const Attrs& attrs) {
  std::vector<LinearOfSeveral> all;
  const auto& biased = attrs.ints("biased");
  std::size_t bias = 1 + biased.size();
  for (std::size_t k = 0; k < biased.size(); ++k) {
    LinearOfSeveral one{{0, 1 + k}, {{"epilogue", std::string(biased[k] ? "bias" : "")}}};
    if (attrs.has("product")) one.attrs.set("product", attrs.text("product"));
    if (biased[k]) one.inputs.push_back(bias++);
    all.push_back(std::move(one));
  }
  return all;
}

}  // namespace comfytp::graph
