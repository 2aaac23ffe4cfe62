#include "comm/host_group.h"

#include <fmt/ranges.h>

#include <algorithm>

#include "base/error.h"

namespace comfytp::comm {

HostGroup::HostGroup(std::vector<std::string> names, std::shared_ptr<Abort> abort, std::chrono::duration<double> timeout)
    : names_(std::move(names)),
      abort_(std::move(abort)),
      timeout_(std::min(timeout, std::chrono::duration<double>(1e8))),  // more would overflow the clock
      requests_(names_.size()),
      arrived_(names_.size(), false) {}

const std::vector<Request>& HostGroup::meet(int rank, Request request) {
  requests_[static_cast<std::size_t>(rank)] = std::move(request);
  wait(rank);
  return requests_;
}

void HostGroup::wait(int rank) {
  std::unique_lock lock(mutex_);
  abort_->check();
  const auto generation = generation_;
  arrived_[static_cast<std::size_t>(rank)] = true;
  if (++count_ == size()) {
    count_ = 0;
    std::fill(arrived_.begin(), arrived_.end(), false);
    ++generation_;
    lock.unlock();
    changed_.notify_all();
    return;
  }
  changed_.wait_for(lock, timeout_, [&] { return generation_ != generation || abort_->raised(); });
  if (generation_ != generation) return;
  std::vector<std::string> missing;
  for (std::size_t r = 0; r < names_.size(); ++r)
    if (!arrived_[r]) missing.push_back(names_[r]);
  const auto op = requests_[static_cast<std::size_t>(rank)].op;
  lock.unlock();
  // Does nothing if it was no time-out that woke this rank.
  abort_->raise(Abort::Kind::timeout, fmt::format("[{}] {} waited {:g} s for {}", op, name(rank), timeout_.count(), fmt::join(missing, ", ")));
  abort_->check();
}

void HostGroup::wake() {
  { std::lock_guard lock(mutex_); }  // a rank between its check and its sleep would miss the call
  changed_.notify_all();
}

void HostGroup::reset() {
  std::lock_guard lock(mutex_);
  std::fill(arrived_.begin(), arrived_.end(), false);
  count_ = 0;
}

namespace {

// The shape of `shape` with dimension dim of another size.
Shape with(Shape shape, int dim, std::int64_t size) {
  shape[static_cast<std::size_t>(dim)] = size;
  return shape;
}

}  // namespace

void check_requests(const HostGroup& group, const std::vector<Request>& requests) {
  const Request& first = requests[0];
  const auto& op = first.op;
  const auto size = requests.size();
  for (std::size_t r = 0; r < size; ++r) {
    const auto& q = requests[r];
    const bool alike = q.op == op && q.dim == first.dim && q.bounds == first.bounds && q.need_lo == first.need_lo && q.need_hi == first.need_hi;
    require(alike && q.in.dtype == first.in.dtype, "[{}] expected {} to call the same as {} but it called [{}] of {} {} with dim {} and bounds {}",
            op, group.name(static_cast<int>(r)), group.name(0), q.op, name_of(q.in.dtype), to_string(q.in.shape), q.dim, to_string(q.bounds));
  }
  const bool sums = op == "all_reduce" || op == "reduce_scatter", cut = op != "all_reduce";
  const auto dtype = first.in.dtype;
  require(!sums || dtype == DType::f32 || dtype == DType::f16 || dtype == DType::bf16, "[{}] expected f32, f16 or bf16 but got {}", op,
          name_of(dtype));
  if (cut) {
    const auto& b = first.bounds;
    require(first.dim >= 0 && static_cast<std::size_t>(first.dim) < first.in.shape.size(), "[{}] expected a dimension of {} but got {}", op,
            to_string(first.in.shape), first.dim);
    require(b.size() == size + 1 && b[0] == 0 && std::is_sorted(b.begin(), b.end()), "[{}] expected {} ascending bounds from 0 but got {}", op,
            size + 1, to_string(b));
    const auto &lo = first.need_lo, &hi = first.need_hi;
    bool needs = op != "halo_exchange" || (lo.size() == size && hi.size() == size);
    for (std::size_t r = 0; needs && r < lo.size(); ++r) needs = 0 <= lo[r] && lo[r] <= hi[r] && hi[r] <= b.back();
    require(needs, "[{}] expected needs inside [0,{}) but got {} to {}", op, b.back(), to_string(lo), to_string(hi));
  }
  for (std::size_t r = 0; r < size; ++r) {
    const auto& q = requests[r];
    Shape in = first.in.shape, out = first.in.shape;
    if (cut) {
      require(q.in.shape.size() == in.size(), "[{}] expected rank {} of {} but got {}", op, in.size(), group.name(static_cast<int>(r)),
              to_string(q.in.shape));
      const auto part = first.bounds[r + 1] - first.bounds[r], whole = first.bounds.back();
      in = with(in, first.dim, op == "reduce_scatter" ? whole : part);
      out = with(in, first.dim, op == "reduce_scatter" ? part : op == "all_gather" ? whole : first.need_hi[r] - first.need_lo[r]);
    }
    require(q.in.shape == in && q.out.shape == out && q.out.dtype == dtype, "[{}] expected {} to have {} and get {} in {} but got {} and {} in {}",
            op, group.name(static_cast<int>(r)), to_string(in), to_string(out), name_of(dtype), to_string(q.in.shape), to_string(q.out.shape),
            name_of(q.out.dtype));
  }
}

}  // namespace comfytp::comm
