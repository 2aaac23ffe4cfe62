// upsample_nearest: y[n, c, h, w] = x[n, c, floor(h * H_in / H_out), floor(w * W_in / W_out)], as torch's "nearest".
#include "base/error.h"
#include "graph/graph.h"

namespace comfytp::graph {
namespace {

// Input: x [n, c, h, w]. Attributes: from, to [h, w], the sizes of the whole image, and of this part of it: size [h, w],
// its first rows and columns in the input (from_offset) and in the output (to_offset).
class UpsampleNearest final : public Op {
 public:
  std::string_view name() const override { return "upsample_nearest"; }
  std::vector<Type> infer(const Attrs& a, std::span<const Type> in) const override {
    expect_inputs(name(), in, 1, 1);
    expect_rank(name(), "x", in[0], 4);
    const auto &from = a.ints("from"), &to = a.ints("to"), &size = a.ints("size");
    for (const auto* pair : {"from", "to", "size", "from_offset", "to_offset"})
      require(a.ints(pair).size() == 2, "[upsample_nearest] expected two numbers as {} but got {}", pair, comfytp::to_string(a.ints(pair)));
    for (int d = 0; d < 2; ++d) {
      const auto part = in[0].shape[2 + d], in_offset = a.ints("from_offset")[d], out_offset = a.ints("to_offset")[d];
      const bool image = 0 < from[d] && from[d] <= to[d] && to[d] < (std::int64_t{1} << 31);
      const bool inside = image && in_offset >= 0 && in_offset <= from[d] - part && out_offset >= 0 && size[d] >= 0 && size[d] <= to[d] &&
                          out_offset <= to[d] - size[d];
      require(inside && (size[d] == 0 || (source(a, d, 0) >= 0 && source(a, d, size[d] - 1) < part)),
              "[upsample_nearest] expected a part of an image {} enlarged to {} but got {} and size {}", comfytp::to_string(from),
              comfytp::to_string(to), to_string(in[0]), comfytp::to_string(size));
    }
    return {{in[0].dtype, {in[0].shape[0], in[0].shape[1], size[0], size[1]}}};
  }
  Rule rule(const OpContext& op) const override {
    Rule rule;
    const auto &x = op.in[0].shape, &y = op.out[0].shape;
    const int n = rule.add("n", x[0]), c = rule.add("c", x[1]);
    std::vector<DimRule> in = {n, c}, out = {n, c};
    for (int d = 0; d < 2; ++d) {
      const int f = rule.add(d ? "w" : "h", y[2 + d]);
      in.emplace_back(f, [attrs = op.attrs, d](Interval r) { return need(attrs, d, r); });
      out.push_back(f);
    }
    rule.inputs = {in};
    rule.outputs = {out};
    return rule;
  }
  Attrs localize(const OpContext& op, std::span<const Interval> ranges, std::span<const Type>) const override {
    Attrs local = op.attrs;
    Ints size(2), from_offset = op.attrs.ints("from_offset"), to_offset = op.attrs.ints("to_offset");
    for (int d = 0; d < 2; ++d) {
      const auto r = ranges[2 + d];
      size[d] = r.size();
      if (r == Interval{0, op.out[0].shape[2 + d]}) continue;
      from_offset[d] += need(op.attrs, d, r).lo;
      to_offset[d] += r.lo;
    }
    local.set("size", size);
    local.set("from_offset", from_offset);
    local.set("to_offset", to_offset);
    return local;
  }
  Layout layout(const OpContext&, std::span<const Order>) const override { return {{channels_last(4)}, {channels_last(4)}}; }
  void reference(const OpContext& op, std::span<const RefTensor> in, std::span<RefTensor> out) const override {
    const auto &x = in[0].shape, &y = out[0].shape;
    std::size_t at = 0;
    for (std::int64_t nc = 0; nc < y[0] * y[1]; ++nc)
      for (std::int64_t h = 0; h < y[2]; ++h)
        for (std::int64_t w = 0; w < y[3]; ++w)
          out[0].data[at++] = in[0].data[(nc * x[2] + source(op.attrs, 0, h)) * x[3] + source(op.attrs, 1, w)];
  }

 private:
  // Input index of output index i, both counted from the first of their part.
  static std::int64_t source(const Attrs& a, int d, std::int64_t i) {
    return (i + a.ints("to_offset")[d]) * a.ints("from")[d] / a.ints("to")[d] - a.ints("from_offset")[d];
  }
  static Interval need(const Attrs& a, int d, Interval r) {
    return r.size() ? Interval{source(a, d, r.lo), source(a, d, r.hi - 1) + 1} : Interval{0, 0};
  }
};
COMFYTP_OP(UpsampleNearest)

}  // namespace
}  // namespace comfytp::graph
