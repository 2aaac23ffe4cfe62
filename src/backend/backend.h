// What the runtime asks of a kind of device. A backend is a folder beside this file, and hides behind these classes.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "backend/call_queue.h"
#include "base/dtype.h"
#include "base/error.h"
#include "base/shape.h"
#include "base/tensor_view.h"
#include "base/text.h"
#include "graph/graph.h"
#include "graph/rewrites.h"

namespace comfytp::backend {

/// One device as the user names it: "cpu:0", "cuda:1@10GiB".
struct DeviceSpec {
  std::string kind;              ///< "cpu", "cuda"
  int index = 0;
  std::int64_t limit_bytes = 0;  ///< 0: none
  std::string name() const { return kind + ":" + std::to_string(index); }
  /// Throws OutOfMemory where `bytes` more than `in_use` are beyond the limit.
  void expect_room(std::int64_t in_use, std::int64_t bytes) const {
    if (limit_bytes != 0 && in_use + bytes > limit_bytes)
      throw OutOfMemory(fmt::format("[memory] {} needs {} more, has {} in use and a limit of {}", name(), bytes_text(bytes), bytes_text(in_use),
                                    bytes_text(limit_bytes)));
  }
};

/// How a weight lies in a device's memory where that is not row-major.
struct WeightFormat {
  std::string id;                                                ///< equal ids mean equal bytes
  /// From row-major, same dtype, same number of bytes; both in memory that the device computes on.
  std::function<void(const void* plain, void* packed)> pack;
  std::shared_ptr<const void> detail;                            ///< the backend's own description
};

/// The storage of one part of a weight on one device, in the dtype it is kept in; kernels decode it at use.
struct WeightBuffer {
  std::string key;
  Shape shape;                          ///< of this part, as the graph sees it
  DType stored = DType::f32;
  std::optional<WeightFormat> format;   ///< set by the first kernel that gains from one; never changed afterwards
  bool packable = true;                 ///< false: is and stays row-major (where a gathered weight passes through, if formats do not agree)
  void* data = nullptr;                 ///< null while nothing is loaded
  std::int64_t bytes() const { return numel(shape) * size_of(stored); }
};

/// An operand as the kernel will find it: dense in `order`.
struct Operand {
  graph::Type type;
  graph::Order order;
  WeightBuffer* weight = nullptr;  ///< set where the operand is a weight: its memory holds weight->stored elements
};

/// One op, ready to run again and again; everything that can be decided before is.
class Kernel {
 public:
  virtual ~Kernel() = default;
  /// Scratch memory that `run` needs, 64-byte aligned.
  virtual std::int64_t workspace_bytes() const { return 0; }
  /// Queues the op behind what its device was given before; a device that queues nothing has run it on return. The same addresses
  /// may be recorded once and replayed (Device::record): nothing that `run` does on the host may differ between calls.
  virtual void run(std::span<const void* const> in, std::span<void* const> out, void* workspace) = 0;
};

/// Puts weights into a device's memory. What it needs for that on the way, it has for its own life only.
class WeightWriter {
 public:
  virtual ~WeightWriter() = default;
  /// `fill` writes the part to host memory, row-major, in the stored dtype; it is called from any thread, before finish() returns or
  /// the writer dies, and what it throws comes from a later call. A part whose buffer has no format yet is row-major from now on.
  virtual void write(WeightBuffer& buffer, const std::function<void(void* host)>& fill) = 0;
  /// Waits until everything written is in its place. Throws Error.
  virtual void finish() = 0;
};

/// Launches that a device was given once and can run again as one.
class Recording {
 public:
  virtual ~Recording() = default;
  /// Queues all of them.
  virtual void replay() = 0;
};

/// One device. All calls but the constructor's come from one thread at a time: the worker that the runtime gives it, or where
/// CallQueue::here() says so another.
class Device {
 public:
  virtual ~Device() = default;
  virtual const DeviceSpec& spec() const = 0;
  /// What it queues its work on, once attached (CUDA: its stream); null for a device that computes in the host's memory.
  virtual void* queue() const { return nullptr; }
  /// A second queue for copies that run beside what queue() has; null where there is none.
  virtual void* side_queue() const { return nullptr; }
  /// What side_queue() gets from now on waits for what queue() has now.
  virtual void fork() {}
  /// What queue() gets from now on waits for what side_queue() had when `ticket` was taken by mark().
  virtual std::size_t mark() { return 0; }
  virtual void join(std::size_t) {}
  /// For calls that nobody waits for; null where the device has run what it is given, or is not attached.
  virtual CallQueue* call_queue() { return nullptr; }
  /// What graph::fuse does for this device.
  virtual graph::Fusion fusion() const = 0;
  /// What format a kernel chooses for a weight hangs on the weight alone: so all devices of this kind choose alike.
  virtual bool formats_agree() const { return false; }
  /// A linear that asks for its product in fp8 can get it; otherwise its weight is decoded.
  virtual bool multiplies_in_fp8() const { return false; }
  /// Called first on the worker thread: affinity, thread counts, contexts.
  virtual void attach() = 0;
  /// Throws Error naming the op when this backend has no kernel for it or not for this dtype.
  virtual std::unique_ptr<Kernel> compile(const graph::Node& node, std::span<const Operand> in, std::span<const Operand> out) = 0;
  /// The kernel reads input i as it is stored; otherwise the lowering casts it to the graph's dtype first.
  virtual bool decodes(const graph::Node& node, std::size_t i) const = 0;
  /// Throws Error saying what the device lacks when it cannot compute in `dtype`.
  virtual void expect_compute(DType dtype) const = 0;
  /// 64-byte aligned memory. Throws Error with the bytes wanted and the device's name.
  virtual void* allocate(std::int64_t bytes) = 0;
  virtual void release(void* memory, std::int64_t bytes) = 0;
  virtual std::unique_ptr<WeightWriter> weight_writer() = 0;
  /// Calls `launches`, which calls kernels, without running them. Null where the device runs what it is given at once: then nothing
  /// was called.
  virtual std::unique_ptr<Recording> record(const std::function<void()>& launches) = 0;
  /// Seconds that one call of `launches` takes on the device, called as often as that needs.
  virtual double time(const std::function<void()>& launches) = 0;
  /// Waits until all that was queued has run. Throws Error when some of it failed.
  virtual void synchronize() = 0;
  /// Between a tensor outside and a dense value in `order`, with conversion of the dtype, in the order of the queue. The host's
  /// memory may be changed or freed on return of read(), and holds the result after synchronize() behind write(). A tensor that is not
  /// the host's lies on this device or in shared memory, and its owner's queue knows of ours (CallQueue::follow, lead).
  virtual void read(const TensorView& outside, void* data, const graph::Type& type, const graph::Order& order) = 0;
  virtual void write(const void* data, const graph::Type& type, const graph::Order& order, const TensorView& outside) = 0;
};

/// Opens devices: `position` of `count` virtual CPU devices get their share of the cores. Throws Error naming the device
/// and the ones that exist.
std::unique_ptr<Device> open_device(const DeviceSpec& spec, int position, int count);

/// "cpu:0,cpu:1@2GiB" as a list. Throws Error on empty, malformed, negative or repeated names.
std::vector<DeviceSpec> parse_devices(const std::string& list);

}  // namespace comfytp::backend
