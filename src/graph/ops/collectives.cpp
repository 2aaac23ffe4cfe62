// The ops that need several devices at once. Every rank of a group has the same node but for `rank`.
// Attributes of all: group (the devices' numbers, in the order of the ranks), rank, and reason (why it stands there).
#include <algorithm>

#include "base/error.h"
#include "graph/graph.h"

namespace comfytp::graph {
namespace {

class Collective : public Op {
 public:
  bool collective() const override { return true; }
  // Dense in whatever order the value lies; the ranks' orders are made equal by the lowering.
  Layout layout(const OpContext&, std::span<const Order> produced) const override { return {{produced[0]}, {produced[0]}}; }
  void reference(const OpContext&, std::span<const RefTensor>, std::span<RefTensor>) const override {
    fail("[{}] expected all ranks at once", name());
  }

 protected:
  static std::size_t dim(const Attrs& a) { return static_cast<std::size_t>(a.integer("dim")); }
  // Checks group, rank and, where there are any, the parts' bounds; returns the rank.
  std::size_t checked_rank(const Attrs& a) const {
    const auto& group = a.ints("group");
    const auto rank = a.integer("rank"), ranks = static_cast<std::int64_t>(group.size());
    require(rank >= 0 && rank < ranks, "[{}] expected a rank of {} but got {}", name(), comfytp::to_string(group), rank);
    if (!a.has("bounds")) return static_cast<std::size_t>(rank);
    const auto& bounds = a.ints("bounds");
    require(bounds.size() == group.size() + 1 && bounds[0] == 0 && std::is_sorted(bounds.begin(), bounds.end()),
            "[{}] expected {} ascending bounds from 0 but got {}", name(), ranks + 1, comfytp::to_string(bounds));
    return static_cast<std::size_t>(rank);
  }
  // Copies `part`'s interval [lo, hi) of dimension d to interval [at, ..) of `whole`.
  static void paste(const RefTensor& part, std::int64_t lo, std::int64_t hi, RefTensor& whole, std::int64_t at, std::size_t d) {
    const auto inner = row_major_strides(part.shape)[d];
    const auto from = part.shape[d] * inner, to = whole.shape[d] * inner;
    if (hi <= lo || from == 0) return;
    for (std::int64_t o = 0; o < numel(part.shape) / from; ++o)
      std::copy(part.data.begin() + o * from + lo * inner, part.data.begin() + o * from + hi * inner, whole.data.begin() + o * to + at * inner);
  }
  static RefTensor sum(std::span<const RefTensor> in) {
    RefTensor total = in[0];
    for (std::size_t r = 1; r < in.size(); ++r)
      for (std::size_t i = 0; i < total.data.size(); ++i) total.data[i] += in[r].data[i];
    return total;
  }
};

// Partial sums become their sum on every rank.
class AllReduce final : public Collective {
 public:
  std::string_view name() const override { return "all_reduce"; }
  std::vector<Type> infer(const Attrs& a, std::span<const Type> in) const override {
    expect_inputs(name(), in, 1, 1);
    (void)checked_rank(a);
    return {in[0]};
  }
  double flops(const OpContext& op) const override {
    return static_cast<double>(op.attrs.ints("group").size()) * static_cast<double>(numel(op.in[0].shape));
  }
  void collective_reference(std::span<const OpContext>, std::span<const RefTensor> in, std::span<RefTensor> out) const override {
    std::fill(out.begin(), out.end(), sum(in));
  }
};

// Partial sums become their sum, of which rank r keeps [bounds[r], bounds[r+1]) of dimension dim.
class ReduceScatter final : public Collective {
 public:
  std::string_view name() const override { return "reduce_scatter"; }
  std::vector<Type> infer(const Attrs& a, std::span<const Type> in) const override {
    expect_inputs(name(), in, 1, 1);
    const auto& bounds = a.ints("bounds");
    const auto rank = checked_rank(a);
    require(dim(a) < in[0].shape.size() && bounds.back() == in[0].shape[dim(a)],
            "[reduce_scatter] expected bounds of dimension {} of {} but got {}", dim(a), to_string(in[0]), comfytp::to_string(bounds));
    Type out = in[0];
    out.shape[dim(a)] = bounds[rank + 1] - bounds[rank];
    return {out};
  }
  double flops(const OpContext& op) const override { return static_cast<double>(numel(op.in[0].shape)); }
  void collective_reference(std::span<const OpContext> ranks, std::span<const RefTensor> in, std::span<RefTensor> out) const override {
    const RefTensor total = sum(in);
    const auto& bounds = ranks[0].attrs.ints("bounds");
    for (std::size_t r = 0; r < in.size(); ++r) paste(total, bounds[r], bounds[r + 1], out[r], 0, dim(ranks[0].attrs));
  }
};

// Rank r has [bounds[r], bounds[r+1]) of dimension dim; afterwards every rank has the whole.
class AllGather : public Collective {
 public:
  std::string_view name() const override { return "all_gather"; }
  std::vector<Type> infer(const Attrs& a, std::span<const Type> in) const override {
    expect_inputs(name(), in, 1, 1);
    const auto& bounds = a.ints("bounds");
    const auto rank = checked_rank(a);
    require(dim(a) < in[0].shape.size() && bounds[rank + 1] - bounds[rank] == in[0].shape[dim(a)],
            "[all_gather] expected part {} of bounds {} in dimension {} but got {}", rank, comfytp::to_string(bounds), dim(a), to_string(in[0]));
    Type out = in[0];
    out.shape[dim(a)] = bounds.back();
    return {out};
  }
  void collective_reference(std::span<const OpContext> ranks, std::span<const RefTensor> in, std::span<RefTensor> out) const override {
    const auto& bounds = ranks[0].attrs.ints("bounds");
    for (auto& whole : out)
      for (std::size_t r = 0; r < in.size(); ++r) paste(in[r], 0, in[r].shape[dim(ranks[0].attrs)], whole, bounds[r], dim(ranks[0].attrs));
  }
};

// An all_gather of a weight's parts in the dtype they are stored in, into memory that is needed only until the use.
class FetchWeight final : public AllGather {
 public:
  std::string_view name() const override { return "fetch_weight"; }
};

// Rank r has [bounds[r], bounds[r+1]) of dimension dim; afterwards it has [need_lo[r], need_hi[r]): its own part and the
// neighbours' rows that a window reaches into, or another cut of the dimension altogether.
class HaloExchange final : public Collective {
 public:
  std::string_view name() const override { return "halo_exchange"; }
  std::vector<Type> infer(const Attrs& a, std::span<const Type> in) const override {
    expect_inputs(name(), in, 1, 1);
    const auto &bounds = a.ints("bounds"), &lo = a.ints("need_lo"), &hi = a.ints("need_hi");
    const auto rank = checked_rank(a);
    bool fits = dim(a) < in[0].shape.size() && bounds.size() == lo.size() + 1 && lo.size() == hi.size() &&
                bounds[rank + 1] - bounds[rank] == in[0].shape[dim(a)];
    for (std::size_t r = 0; fits && r < lo.size(); ++r) fits = 0 <= lo[r] && lo[r] <= hi[r] && hi[r] <= bounds.back();
    require(fits, "[halo_exchange] expected part {} of bounds {} in dimension {} but got {}", rank, comfytp::to_string(bounds), dim(a),
            to_string(in[0]));
    Type out = in[0];
    out.shape[dim(a)] = hi[rank] - lo[rank];
    return {out};
  }
  void collective_reference(std::span<const OpContext> ranks, std::span<const RefTensor> in, std::span<RefTensor> out) const override {
    const auto& a = ranks[0].attrs;
    const auto& bounds = a.ints("bounds");
    for (std::size_t r = 0; r < out.size(); ++r)
      for (std::size_t s = 0; s < in.size(); ++s) {
        const auto part = intersect({bounds[s], bounds[s + 1]}, {a.ints("need_lo")[r], a.ints("need_hi")[r]});
        paste(in[s], part.lo - bounds[s], part.hi - bounds[s], out[r], part.lo - a.ints("need_lo")[r], dim(a));
      }
  }
};

COMFYTP_OP(AllReduce)
COMFYTP_OP(ReduceScatter)
COMFYTP_OP(AllGather)
COMFYTP_OP(FetchWeight)
COMFYTP_OP(HaloExchange)

}  // namespace
}  // namespace comfytp::graph
