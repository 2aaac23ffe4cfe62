#include "backend/cuda/weight_writer.h"

#include <algorithm>
#include <array>

#include "backend/cuda/staging.h"

namespace comfytp::backend::cuda {
namespace {

constexpr std::int64_t kLeast = std::int64_t{16} << 20;

class Writer final : public WeightWriter {
 public:
  explicit Writer(Context& context) : context_(context) {
    for (auto& buffer : buffers_) check(cudaEventCreateWithFlags(&buffer.taken, cudaEventDisableTiming), "making an event");
  }
  ~Writer() override {
    cudaStreamSynchronize(context_.stream);
    for (auto& buffer : buffers_) cudaEventDestroy(buffer.taken);
    cudaFree(plain_);
  }

  void write(WeightBuffer& buffer, const std::function<void(void*)>& fill) override {
    Buffer& staging = buffers_[next_];
    next_ = 1 - next_;
    check(cudaEventSynchronize(staging.taken), "waiting for a copy");
    const auto bytes = static_cast<std::size_t>(buffer.bytes());
    void* host = staging.memory.reserve(std::max(buffer.bytes(), kLeast));
    fill(host);
    if (!buffer.format) {
      check(cudaMemcpyAsync(buffer.data, host, bytes, cudaMemcpyHostToDevice, context_.stream), "copying a weight to the device");
      buffer.packable = false;  // a kernel that is made later finds it as it is now
    } else {
      reserve_plain(bytes);
      check(cudaMemcpyAsync(plain_, host, bytes, cudaMemcpyHostToDevice, context_.stream), "copying a weight to the device");
      buffer.format->pack(plain_, buffer.data);
    }
    check(cudaEventRecord(staging.taken, context_.stream), "recording an event");
  }
  void finish() override { check(cudaStreamSynchronize(context_.stream), "copying weights to the device"); }

 private:
  struct Buffer {
    PinnedBuffer memory;
    cudaEvent_t taken = nullptr;  ///< the copy engine has what was in it
  };

  void reserve_plain(std::size_t bytes) {
    if (bytes <= plain_bytes_) return;
    check(cudaStreamSynchronize(context_.stream), "copying weights to the device");
    cudaFree(plain_);
    plain_ = nullptr;
    plain_bytes_ = 0;
    check(cudaMalloc(&plain_, bytes), "memory to rearrange a weight in");
    plain_bytes_ = bytes;
  }

  Context& context_;
  std::array<Buffer, 2> buffers_;
  std::size_t next_ = 0, plain_bytes_ = 0;
  void* plain_ = nullptr;
};

}  // namespace

std::unique_ptr<WeightWriter> make_weight_writer(Context& context) { return std::make_unique<Writer>(context); }

}  // namespace comfytp::backend::cuda
