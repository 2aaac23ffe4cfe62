// Collectives between CUDA devices of this process. The ranks meet on the host when a collective is called, to agree on how the message
// is cut; what they queue then can run again and again without the host.
#include <algorithm>
#include <cstring>

#include "backend/cuda/copy_plan.h"
#include "backend/cuda/status.h"
#include "base/library.h"
#include "comm/communicator.h"
#include "comm/cuda/cuda_group.h"
#include "comm/cuda/exchange_plan.h"

namespace comfytp::comm::cuda {
namespace {

class CudaCommunicator final : public Communicator {
 public:
  CudaCommunicator(std::shared_ptr<CudaGroup> group, int rank) : group_(std::move(group)), rank_(rank) {}
  int rank() const override { return rank_; }
  int size() const override { return group_->size(); }
  bool queues() const override { return true; }
  void check() override { group_->check(rank_); }
  const std::uint32_t* fault() const override { return &group_->world(rank_).control->error; }
  std::map<std::string, Spent> spent() const override { return group_->spent(rank_); }

  void all_reduce(const TensorView& in, const TensorView& out) override { exchange({"all_reduce", in, out, -1, {}, {}, {}}); }
  void reduce_scatter(const TensorView& in, const TensorView& out, int dim, const std::vector<std::int64_t>& bounds) override {
    exchange({"reduce_scatter", in, out, dim, bounds, {}, {}});
  }
  void all_gather(const TensorView& in, const TensorView& out, int dim, const std::vector<std::int64_t>& bounds) override {
    exchange({"all_gather", in, out, dim, bounds, {}, {}});
  }
  void halo_exchange(const TensorView& in, const TensorView& out, int dim, const std::vector<std::int64_t>& bounds,
                     const std::vector<std::int64_t>& need_lo, const std::vector<std::int64_t>& need_hi) override {
    exchange({"halo_exchange", in, out, dim, bounds, need_lo, need_hi});
  }

  // What never changes needs no flags: it is copied from where the peers have it, by the copy engines, since a kernel would take the room
  // of those that compute.
  void fetch(const TensorView& in, const TensorView& out, int dim, const std::vector<std::int64_t>& bounds) override {
    if (!group_->peers()) return all_gather(in, out, dim, bounds);
    const CurrentDevice current(group_->ordinal(rank_));
    const auto& requests = meet({"all_gather", in, out, dim, bounds, {}, {}});
    const auto stream = group_->stream(rank_);
    for (int i = 0; i < size(); ++i) {
      const auto r = static_cast<std::size_t>((rank_ + i) % size());  // so that not all read from one
      const TensorView &from = requests[r].in, to = part_of(out, dim, bounds[r], bounds[r + 1]);
      if (from.bytes() == 0 || from.data == to.data) continue;
      const auto plan = backend::cuda::plan_copy(from.shape, from.dtype, from.strides, to.dtype, to.strides);
      const bool dense = plan.rank == 0 || (plan.rank == 1 && plan.from[0] == 1 && plan.to[0] == 1);
      backend::cuda::check(dense ? cudaMemcpyAsync(to.data, from.data, static_cast<std::size_t>(from.bytes()), cudaMemcpyDefault, stream)
                                 : backend::cuda::launch_copy(plan, from.data, to.data, stream),
                           "fetching");
    }
    group_->wait(rank_);
  }

 private:
  const std::vector<Request>& meet(Request request) {
    const auto& requests = group_->meet(rank_, std::move(request));
    check_requests(*group_, requests);
    return requests;
  }

  void exchange(Request request) {
    const CurrentDevice current(group_->ordinal(rank_));
    const auto& requests = meet(std::move(request));
    const auto plan = plan_exchange(group_->world(rank_), requests, group_->blocks());
    group_->wait(rank_);  // from here on a peer's request may be its next one
    backend::cuda::check(launch(plan, group_->stream(rank_)), "starting a collective");
  }

  std::shared_ptr<CudaGroup> group_;
  int rank_;
};

bool all_reach(const std::vector<DeviceRank>& ranks) {
  for (const auto& a : ranks)
    for (const auto& b : ranks) {
      int can = a.ordinal == b.ordinal;
      if (!can) backend::cuda::check(cudaDeviceCanAccessPeer(&can, a.ordinal, b.ordinal), "asking which devices reach each other");
      if (!can) return false;
    }
  return true;
}

class CudaGroups final : public GroupLibrary {
 public:
  std::vector<std::unique_ptr<Communicator>> group(const std::vector<DeviceRank>& ranks, std::shared_ptr<Abort> abort,
                                                   std::chrono::duration<double> timeout, Route route) const override {
    const bool peers = route != Route::staged && all_reach(ranks);
    require(peers || route != Route::peer, "[comm] expected devices that can read each other's memory but not all can");
    auto group = std::make_shared<CudaGroup>(ranks, abort, timeout, peers);
    abort->subscribe(group);
    std::vector<std::unique_ptr<Communicator>> ends;
    for (int r = 0; r < group->size(); ++r) ends.push_back(std::make_unique<CudaCommunicator>(group, r));
    return ends;
  }
};

}  // namespace
}  // namespace comfytp::comm::cuda

extern "C" COMFYTP_EXPORT const comfytp::comm::GroupLibrary* comfytp_group(const char* build) {
  static const comfytp::comm::cuda::CudaGroups library;
  return std::strcmp(build, COMFYTP_BUILD) == 0 ? &library : nullptr;
}
