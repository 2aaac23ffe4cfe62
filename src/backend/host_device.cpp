#include "backend/host_device.h"

#include <algorithm>
#include <chrono>

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

double HostDevice::time(const std::function<void()>& launches) {
  const auto start = std::chrono::steady_clock::now();
  launches();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

std::unique_ptr<WeightWriter> HostDevice::weight_writer() { return std::make_unique<Writer>(); }

}  // namespace comfytp::backend
