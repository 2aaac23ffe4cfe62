// What a backend that is a library of its own exports.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "backend/backend.h"

namespace comfytp::backend {

/// One device as a library sees it.
struct DeviceInfo {
  std::string name;         ///< "cuda:0"
  std::string model;        ///< "NVIDIA H100 80GB HBM3"
  std::int64_t bytes = 0;   ///< of memory in all
};

class BackendLibrary {
 public:
  virtual ~BackendLibrary() = default;
  /// Throws Error saying what is missing (driver, a library, a device).
  virtual std::vector<DeviceInfo> devices() const = 0;
  virtual std::unique_ptr<Device> open(const DeviceSpec& spec) const = 0;
};

/// The CUDA backend, loaded at the first call: what the library's "comfytp_backend" gives (Library::of_this_build). Throws Error saying why it is not to be had.
const BackendLibrary& cuda_library();

}  // namespace comfytp::backend
