// What the planner knows of devices and the links between them, without having them.
#pragma once

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "base/dtype.h"

namespace comfytp::planner {

/// Rates are those of large matmuls and copies; 0: not known.
struct DeviceProfile {
  std::string model;             ///< "RTX 3090"
  std::int64_t memory_bytes = 0;
  double flops_f32 = 0;          ///< a second
  double flops_bf16 = 0;
  double bytes_per_second = 0;   ///< of its memory
  bool assumed = false;          ///< nobody said that the device is such a one
};

/// What a launch does.
struct Work {
  double flops = 0;
  std::int64_t bytes = 0;  ///< read and written
};

struct Profile {
  std::map<std::string, DeviceProfile> devices;  ///< by the device's name, "cuda:0"
  double link_bytes_per_second = 0;              ///< between two devices, one way
};

/// {"version": 1, "devices": [{"name": "cuda:0", "model": "RTX 4090", "memory_bytes": …, "flops_f32": …, "flops_bf16": …,
/// "bytes_per_second": …}, …], "link_bytes_per_second": …}. What is left out is that of the well-known card of this model, if it is one.
/// Throws Error naming the field.
Profile profile_from_json(const std::string& json);

/// The profile's device; else, for cuda, a common card, assumed; else none.
std::optional<DeviceProfile> profile_of(const backend::DeviceSpec& spec, const Profile& profile);
/// The profile's, else that of a PCIe 4.0 x16 slot.
double link_bytes_per_second(const Profile& profile);

/// The well-known card of which the name stands in `model`, as "H100" in "NVIDIA H100 80GB HBM3".
std::optional<DeviceProfile> card(const std::string& model);

/// What the launches of a step are expected to take: each at the share of the device's rates that kernels are seen to reach, whichever
/// takes longer. 0 where the rates are not known.
double expected_seconds(const DeviceProfile& device, const std::vector<Work>& launches, DType compute);

/// By how much fetches of gathered weights lengthen a step beside them: what comes is written to memory, and about as much is read there for
/// others. 0 where the rate is not known.
double fetching_seconds(const DeviceProfile& device, std::int64_t fetched_bytes);

/// Seconds that a device computes for at its rate in `compute`; 0 if that is not known.
double compute_seconds(const DeviceProfile& device, double flops, DType compute);

}  // namespace comfytp::planner
