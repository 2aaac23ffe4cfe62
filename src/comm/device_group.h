// Communicators for the ranks of a group, whatever their devices are.
#pragma once

#include <chrono>
#include <memory>
#include <string>
#include <vector>

#include "comm/communicator.h"

namespace comfytp::comm {

/// A rank's device.
struct DeviceRank {
  std::string name;       ///< for messages
  int ordinal = 0;        ///< of a CUDA device
  void* queue = nullptr;  ///< backend::Device::queue() or side_queue(); null: it computes in the host's memory
};

/// The way between CUDA devices.
enum class Route {
  best,   ///< peer where all devices reach each other, otherwise staged
  peer,   ///< they read each other's memory
  staged  ///< through page-locked memory of the host
};

/// "best", "peer" or "staged". Throws Error.
Route route_from_name(const std::string& name);

/// Index r of the result belongs to rank r. The queues must outlive the communicators. Throws Error when devices of the host and CUDA
/// devices are mixed, when the CUDA library is not to be had, or when `route` is peer and a device cannot read another's memory.
std::vector<std::unique_ptr<Communicator>> device_group(const std::vector<DeviceRank>& ranks, std::shared_ptr<Abort> abort,
                                                        std::chrono::duration<double> timeout, Route route = Route::best);

/// What the CUDA library's "comfytp_group" gives for this (Library::of_this_build).
class GroupLibrary {
 public:
  virtual ~GroupLibrary() = default;
  virtual std::vector<std::unique_ptr<Communicator>> group(const std::vector<DeviceRank>& ranks, std::shared_ptr<Abort> abort,
                                                           std::chrono::duration<double> timeout, Route route) const = 0;
};

}  // namespace comfytp::comm
