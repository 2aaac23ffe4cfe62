// Collectives through memory that all ranks can read: every rank takes what it needs from where its peers have it.
#include <algorithm>

#include "base/error.h"
#include "comm/communicator.h"
#include "comm/host_group.h"
#include "comm/sum.h"

namespace comfytp::comm {
namespace {

// Below this a further meeting costs more than every rank summing everything.
constexpr std::int64_t kOneShot = 4096;

// All views lie alike and without gaps: then they are flat arrays.
bool flat(const std::vector<Request>& requests) {
  const TensorView& first = requests[0].in;
  std::vector<std::size_t> dims;
  for (std::size_t d = 0; d < first.shape.size(); ++d)
    if (first.shape[d] != 1) dims.push_back(d);
  const auto alike = [&](const TensorView& v) {
    return std::all_of(dims.begin(), dims.end(), [&](std::size_t d) { return v.strides[d] == first.strides[d]; });
  };
  if (!std::all_of(requests.begin(), requests.end(), [&](const Request& q) { return alike(q.in) && alike(q.out); })) return false;
  std::sort(dims.begin(), dims.end(), [&](std::size_t a, std::size_t b) { return first.strides[a] < first.strides[b]; });
  std::int64_t step = 1;
  for (std::size_t d : dims) {
    if (first.strides[d] != step) return false;
    step *= first.shape[d];
  }
  return true;
}

class HostCommunicator final : public Communicator {
 public:
  HostCommunicator(std::shared_ptr<HostGroup> group, int rank) : group_(std::move(group)), rank_(rank) {}
  int rank() const override { return rank_; }
  int size() const override { return group_->size(); }

  // Every rank sums its own slice and then takes the others' from where they were summed.
  void all_reduce(const TensorView& in, const TensorView& out) override {
    const auto& requests = meet({"all_reduce", in, out, -1, {}, {}, {}});
    std::vector<TensorView> ins, outs;
    const bool as_array = flat(requests);
    bool in_place = false;
    for (const auto& q : requests) {
      const Shape shape{in.numel()};
      ins.push_back(as_array ? TensorView::dense(q.in.data, q.in.dtype, shape) : q.in);
      outs.push_back(as_array ? TensorView::dense(q.out.data, q.out.dtype, shape) : q.out);
      in_place = in_place || q.in.data == q.out.data;
    }
    const auto me = static_cast<std::size_t>(rank_);
    const auto& shape = outs[me].shape;
    if (shape.empty() || (in.numel() <= kOneShot && !in_place)) {
      // A scalar has no slices: it is summed aside, so that `out` may be `in`.
      double scalar = 0;
      const TensorView aside = TensorView::dense(&scalar, out.dtype, shape);
      sum(ins, in_place ? aside : outs[me]);
      group_->wait(rank_);
      if (in_place) copy(aside, outs[me]);
      return;
    }
    const int dim = static_cast<int>(std::max_element(shape.begin(), shape.end()) - shape.begin());
    const auto bound = [&](int r) {
      const auto whole = shape[static_cast<std::size_t>(dim)], at = whole * r / size();
      return as_array && r < size() ? at / 16 * 16 : at;  // so that no two ranks write to one cache line
    };
    const auto slice = [&](const TensorView& view, int r) { return part_of(view, dim, bound(r), bound(r + 1)); };
    std::vector<TensorView> mine;
    for (const auto& view : ins) mine.push_back(slice(view, rank_));
    sum(mine, slice(outs[me], rank_));
    group_->wait(rank_);
    for (int r = 0; r < size(); ++r)
      if (r != rank_) copy(slice(outs[static_cast<std::size_t>(r)], r), slice(outs[me], r));
    group_->wait(rank_);
  }

  void reduce_scatter(const TensorView& in, const TensorView& out, int dim, const std::vector<std::int64_t>& bounds) override {
    const auto& requests = meet({"reduce_scatter", in, out, dim, bounds, {}, {}});
    const auto r = static_cast<std::size_t>(rank_);
    std::vector<TensorView> mine;
    for (const auto& q : requests) mine.push_back(part_of(q.in, dim, bounds[r], bounds[r + 1]));
    sum(mine, out);
    group_->wait(rank_);
  }

  void all_gather(const TensorView& in, const TensorView& out, int dim, const std::vector<std::int64_t>& bounds) override {
    const auto& requests = meet({"all_gather", in, out, dim, bounds, {}, {}});
    for (std::size_t r = 0; r < requests.size(); ++r)
      if (const auto part = part_of(out, dim, bounds[r], bounds[r + 1]); part.data != requests[r].in.data) copy(requests[r].in, part);
    group_->wait(rank_);
  }

  void halo_exchange(const TensorView& in, const TensorView& out, int dim, const std::vector<std::int64_t>& bounds,
                     const std::vector<std::int64_t>& need_lo, const std::vector<std::int64_t>& need_hi) override {
    const auto& requests = meet({"halo_exchange", in, out, dim, bounds, need_lo, need_hi});
    const Interval need{need_lo[static_cast<std::size_t>(rank_)], need_hi[static_cast<std::size_t>(rank_)]};
    for (std::size_t r = 0; r < requests.size(); ++r) {
      const Interval common = intersect({bounds[r], bounds[r + 1]}, need);
      if (common.size() == 0) continue;
      copy(part_of(requests[r].in, dim, common.lo - bounds[r], common.hi - bounds[r]), part_of(out, dim, common.lo - need.lo, common.hi - need.lo));
    }
    group_->wait(rank_);
  }

 private:
  const std::vector<Request>& meet(Request request) {
    const auto& requests = group_->meet(rank_, std::move(request));
    check_requests(*group_, requests);
    return requests;
  }

  std::shared_ptr<HostGroup> group_;
  int rank_;
};

}  // namespace

std::vector<std::unique_ptr<Communicator>> host_group(const std::vector<std::string>& names, std::shared_ptr<Abort> abort,
                                                      std::chrono::duration<double> timeout) {
  require(!names.empty(), "[host_group] expected at least one device but got none");
  auto group = std::make_shared<HostGroup>(names, abort, timeout);
  abort->subscribe(group);
  std::vector<std::unique_ptr<Communicator>> ranks;
  for (int r = 0; r < group->size(); ++r) ranks.push_back(std::make_unique<HostCommunicator>(group, r));
  return ranks;
}

}  // namespace comfytp::comm
