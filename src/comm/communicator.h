// Collectives between the devices of a group, behind one small interface.
#pragma once

#include <chrono>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "base/tensor_view.h"
#include "comm/abort.h"

namespace comfytp::comm {

/// One rank's end of a group. Every rank must call the same collective with matching arguments in the same order; the strides
/// of the views may differ between the ranks. Parts may be uneven or empty. Sums are of f32, f16 or bf16, in fp32 and in the
/// order of the ranks, rounded once: the same call gives the same bits. What only moves elements takes any type.
/// A call returns when no peer needs this rank's memory any more. Waits sleep, and end with an Error when a peer fails or calls
/// something else, Cancelled when the caller cancels, Timeout when the time-out passes.
class Communicator {
 public:
  virtual ~Communicator() = default;
  virtual int rank() const = 0;
  virtual int size() const = 0;
  /// Its calls queue work on this rank's device and return, and can be recorded; otherwise they run on the host, on memory that the
  /// device has finished with.
  virtual bool queues() const { return false; }
  /// The sum over the ranks, on every rank. `out` may be `in`.
  virtual void all_reduce(const TensorView& in, const TensorView& out) = 0;
  /// The sum over the ranks; rank r gets [bounds[r], bounds[r+1]) of dimension dim.
  virtual void reduce_scatter(const TensorView& in, const TensorView& out, int dim, const std::vector<std::int64_t>& bounds) = 0;
  /// Rank r has [bounds[r], bounds[r+1]) of dimension dim and gets the whole. `in` may lie in its place in `out`.
  virtual void all_gather(const TensorView& in, const TensorView& out, int dim, const std::vector<std::int64_t>& bounds) = 0;
  /// Rank r has [bounds[r], bounds[r+1]) of dimension dim and gets [need_lo[r], need_hi[r]).
  virtual void halo_exchange(const TensorView& in, const TensorView& out, int dim, const std::vector<std::int64_t>& bounds,
                             const std::vector<std::int64_t>& need_lo, const std::vector<std::int64_t>& need_hi) = 0;
  /// As all_gather, of what does not change from the first call on for as long as the group is used (weights).
  virtual void fetch(const TensorView& in, const TensorView& out, int dim, const std::vector<std::int64_t>& bounds) {
    all_gather(in, out, dim, bounds);
  }
  /// What this rank's device has spent in calls of a kind since the group was made, as far as it counts that itself: waiting for peers
  /// (and so for what they send), and moving. Waits for what is queued.
  struct Spent {
    std::int64_t calls = 0;
    double waiting_seconds = 0, moving_seconds = 0;
  };
  virtual std::map<std::string, Spent> spent() const { return {}; }
  /// Throws what a call that was queued here has met: call it when the device is through with what it was given.
  virtual void check() {}
  /// A word in memory that all devices of the rank's kind read, not zero from when check() would throw; null where nothing is queued.
  virtual const std::uint32_t* fault() const { return nullptr; }
};

/// Communicators of one group whose ranks are threads of this process and whose memory all of them can read.
/// `names` are the devices' names in the order of the ranks, for messages. Index r of the result belongs to rank r.
std::vector<std::unique_ptr<Communicator>> host_group(const std::vector<std::string>& names, std::shared_ptr<Abort> abort,
                                                      std::chrono::duration<double> timeout);

/// Communicators that exchange nothing and leave outputs as they are: for timing what stands between collectives.
std::vector<std::unique_ptr<Communicator>> idle_group(int size);

}  // namespace comfytp::comm
