// Calls that nobody waits for: what a device with a queue of its own adds to backend.h.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "base/tensor_view.h"

namespace comfytp::backend {

/// Stands for all elements of a tensor in row-major order: equal ones have equal digests, and others differ but once in 2^128.
using Digest = std::array<std::uint64_t, 2>;

/// How queued calls end. In shared memory; the device writes behind the call, the host looks whenever it likes.
struct CallState {
  std::uint32_t done = 0;        ///< number of the last call that has ended
  std::uint32_t cancelled = 0;   ///< set by the host: a call that has not ended fails
  std::uint32_t failed = 0;      ///< a call has failed, and its outputs are NaN
  std::uint32_t not_finite = 0;  ///< an output of a call that did not fail holds an infinity or a NaN
};

/// Its calls come from the thread that speaks to the device, but for here(). A queue of the caller's is a CUDA stream on this device,
/// null its default stream.
class CallQueue {
 public:
  virtual ~CallQueue() = default;
  /// The calling thread may speak to the device as its worker does (CUDA: the device is its current one), while the worker is silent.
  virtual bool here() const = 0;
  /// What the device gets from now on waits for what the caller's queue has now.
  virtual void follow(void* theirs) = 0;
  /// What the caller's queue gets from now on waits for what the device has now.
  virtual void lead(void* theirs) = 0;
  /// What the device has now, for another device of its kind to wait for until the next one is taken.
  virtual void* moment() = 0;
  virtual void await(void* moment) = 0;
  /// Memory of the host that all devices of the kind read and write too. Throws Error.
  virtual void* allocate_shared(std::int64_t bytes) = 0;
  virtual void release_shared(void* memory) = 0;
  /// Of tensors on this device; waits for them.
  virtual std::vector<Digest> digest(const std::vector<TensorView>& tensors) = 0;
  /// Ends a call: fills its outputs on this device with NaN where one of `faults` (in shared memory) is not zero or the call was
  /// cancelled, and notes in `state` how it ended.
  virtual void end(CallState* state, std::uint32_t number, const std::vector<const std::uint32_t*>& faults,
                   const std::vector<TensorView>& outputs) = 0;
};

}  // namespace comfytp::backend
