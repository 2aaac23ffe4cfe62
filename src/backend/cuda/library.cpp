// The function by which the engine finds this backend.
#include "backend/library.h"

#include <cstring>

#include "backend/cuda/cuda_device.h"
#include "backend/cuda/status.h"
#include "base/library.h"

namespace comfytp::backend::cuda {
namespace {

class CudaLibrary final : public BackendLibrary {
 public:
  std::vector<DeviceInfo> devices() const override {
    int driver = 0, count = 0;
    cudaDriverGetVersion(&driver);
    require(driver > 0, "[cuda] this machine has no NVIDIA driver");
    const auto status = cudaGetDeviceCount(&count);
    if (status == cudaErrorInsufficientDriver) {
      int runtime = 0;
      cudaRuntimeGetVersion(&runtime);
      fail("[cuda] the NVIDIA driver supports CUDA {}.{} but this build needs {}.{}", driver / 1000, driver % 1000 / 10, runtime / 1000,
           runtime % 1000 / 10);
    }
    if (status == cudaErrorNoDevice) count = 0;
    else check(status, "looking for devices");
    std::vector<DeviceInfo> found;
    for (int i = 0; i < count; ++i) {
      cudaDeviceProp properties{};
      check(cudaGetDeviceProperties(&properties, i), "asking for a device's properties");
      found.push_back({fmt::format("cuda:{}", i), properties.name, static_cast<std::int64_t>(properties.totalGlobalMem)});
    }
    return found;
  }
  std::unique_ptr<Device> open(const DeviceSpec& spec) const override { return std::make_unique<CudaDevice>(spec); }
};

}  // namespace
}  // namespace comfytp::backend::cuda

extern "C" COMFYTP_EXPORT const comfytp::backend::BackendLibrary* comfytp_backend(const char* build) {
  static const comfytp::backend::cuda::CudaLibrary library;
  return std::strcmp(build, COMFYTP_BUILD) == 0 ? &library : nullptr;
}
