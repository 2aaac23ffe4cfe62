#include "backend/host_device.h"

#include <algorithm>

namespace comfytp::backend {
namespace {

// A packed weight passes through one buffer of its own size, any other goes where it stays.
class Writer final : public WeightWriter {
 public:
  void write(WeightBuffer& buffer, const std::function<void(void*)>& fill) override {
    if (!buffer.format) {
      fill(buffer.data);
      buffer.packable = false;  // a kernel that is made later finds it as it is now
      return;
    }
    plain_.resize(std::max(plain_.size(), static_cast<std::size_t>(buffer.bytes())));
    fill(plain_.data());
    buffer.format->pack(plain_.data(), buffer.data);
  }
  void finish() override {}

 private:
  std::vector<std::byte> plain_;
};

}  // namespace

std::unique_ptr<WeightWriter> HostDevice::weight_writer() { return std::make_unique<Writer>(); }

}  // namespace comfytp::backend
