// Collectives between the devices of a group, behind one small interface.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "base/tensor_view.h"

namespace comfytp::comm {

/// What stops every waiting rank of a call: the first failure, or the caller's wish. Shared by all groups of an engine.
class Abort {
 public:
  /// Keeps the first reason; wakes all waiters. `cancelled`: the caller asked for it.
  void raise(const std::string& reason, bool cancelled = false);
  void reset();
  bool raised() const { return raised_.load(std::memory_order_acquire); }
  /// Throws Cancelled or Error with the reason if raised.
  void check() const;
  /// Called (under no lock of Abort) whenever it is raised; used by groups to wake their waiters.
  void subscribe(std::weak_ptr<class HostGroup> group);

 private:
  std::atomic<bool> raised_{false};
  mutable std::mutex mutex_;
  std::string reason_;
  bool cancelled_ = false;
  std::vector<std::weak_ptr<class HostGroup>> groups_;
};

/// One rank's end of a group. Every rank must call the same collective with matching arguments in the same order.
/// Sums are in fp32 and in the order of the ranks, so the same call gives the same bits. Parts may be uneven or empty.
/// Views are dense or not; element types are f32, f16 or bf16. Every wait ends with an Error when a peer fails, the
/// caller cancels, or the time-out passes.
class Communicator {
 public:
  virtual ~Communicator() = default;
  virtual int rank() const = 0;
  virtual int size() const = 0;
  virtual void all_reduce(const TensorView& in, const TensorView& out) = 0;
  virtual void reduce_scatter(const TensorView& in, const TensorView& out, int dim, const std::vector<std::int64_t>& bounds) = 0;
  virtual void all_gather(const TensorView& in, const TensorView& out, int dim, const std::vector<std::int64_t>& bounds) = 0;
  /// Rank r has [bounds[r], bounds[r+1]) of dimension dim and gets [need_lo[r], need_hi[r]).
  virtual void halo_exchange(const TensorView& in, const TensorView& out, int dim, const std::vector<std::int64_t>& bounds,
                             const std::vector<std::int64_t>& need_lo, const std::vector<std::int64_t>& need_hi) = 0;
};

/// Communicators of one group whose ranks are threads of this process and whose memory all of them can read.
/// `names` are the devices' names in the order of the ranks, for messages. Index r of the result belongs to rank r.
std::vector<std::unique_ptr<Communicator>> host_group(const std::vector<std::string>& names, std::shared_ptr<Abort> abort,
                                                      std::chrono::duration<double> timeout);

}  // namespace comfytp::comm
