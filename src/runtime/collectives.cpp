#include "runtime/collectives.h"

#include <algorithm>

#include "base/error.h"

namespace comfytp::runtime {
namespace {

TensorView at(TensorView view, const void* data) {
  view.data = const_cast<void*>(data);
  return view;
}

}  // namespace

void run_collective(const CollectiveCall& call, const void* in_data, void* out_data) {
  const auto& a = call.node->attrs;
  const auto op = call.node->op->name();
  const TensorView in = at(call.in, in_data), out = at(call.out, out_data);
  auto& c = *call.communicator;
  if (op == "all_reduce") return c.all_reduce(in, out);
  const auto dim = static_cast<int>(a.integer("dim"));
  const auto& bounds = a.ints("bounds");
  if (op == "reduce_scatter") return c.reduce_scatter(in, out, dim, bounds);
  if (op == "all_gather") return c.all_gather(in, out, dim, bounds);
  if (op == "fetch_weight") return c.fetch(in, out, dim, bounds);
  require(op == "halo_exchange", "[runtime] expected a collective of comm but got '{}'", op);
  c.halo_exchange(in, out, dim, bounds, a.ints("need_lo"), a.ints("need_hi"));
}

std::int64_t traffic_bytes(const CollectiveCall& call) {
  const auto& a = call.node->attrs;
  const auto op = call.node->op->name();
  const auto ranks = static_cast<std::int64_t>(a.ints("group").size());
  if (op == "all_reduce") return 2 * call.in.bytes() * (ranks - 1) / ranks;
  if (op == "reduce_scatter") return std::max((ranks - 1) * call.out.bytes(), call.in.bytes() - call.out.bytes());
  if (op == "fetch_weight") return call.out.bytes() - call.in.bytes();
  if (op != "halo_exchange") return std::max((ranks - 1) * call.in.bytes(), call.out.bytes() - call.in.bytes());
  const auto dim = static_cast<std::size_t>(a.integer("dim"));
  const auto &bounds = a.ints("bounds"), &lo = a.ints("need_lo"), &hi = a.ints("need_hi");
  const auto me = static_cast<std::size_t>(a.integer("rank"));
  std::int64_t sent = 0, received = 0;
  for (std::size_t r = 0; r < lo.size(); ++r) {
    if (r == me) continue;
    received += intersect({bounds[r], bounds[r + 1]}, {lo[me], hi[me]}).size();
    sent += intersect({bounds[me], bounds[me + 1]}, {lo[r], hi[r]}).size();
  }
  Shape row = call.in.shape;
  row[dim] = 1;
  return std::max(sent, received) * numel(row) * size_of(call.in.dtype);
}

}  // namespace comfytp::runtime
