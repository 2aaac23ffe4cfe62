// constant: its values, converted, laid out and uploaded once.
#include <algorithm>
#include <vector>

#include "backend/cuda/kernel_table.h"
#include "backend/cuda/status.h"

namespace comfytp::backend::cuda {
namespace {

class ConstantKernel final : public Kernel {
 public:
  explicit ConstantKernel(const Site& site) : stream_(site.context.stream), bytes_(static_cast<std::size_t>(site.out[0].type.bytes())) {
    if (bytes_ == 0) return;
    const auto& type = site.out[0].type;
    const auto& values = site.attrs().reals("values");
    std::vector<char> host(bytes_);
    const Shape from = row_major_strides(type.shape), to = graph::strides_of(type.shape, site.out[0].order);
    for (std::int64_t i = 0; i < numel(type.shape); ++i) {
      std::int64_t place = 0;
      for (std::size_t d = 0; d < to.size(); ++d) place += i / from[d] % type.shape[d] * to[d];
      store_element(host.data(), type.dtype, place, values.size() == 1 ? values[0] : values[static_cast<std::size_t>(i)]);
    }
    check(cudaMalloc(&data_, bytes_), "memory for a constant");
    const auto status = cudaMemcpyAsync(data_, host.data(), bytes_, cudaMemcpyHostToDevice, stream_);
    const auto done = cudaStreamSynchronize(stream_);
    if (status != cudaSuccess || done != cudaSuccess) cudaFree(data_);
    check(status, "uploading a constant");
    check(done, "uploading a constant");
  }
  ~ConstantKernel() override { cudaFree(data_); }
  void run(std::span<const void* const>, std::span<void* const> out, void*) override {
    if (bytes_) check(cudaMemcpyAsync(out[0], data_, bytes_, cudaMemcpyDeviceToDevice, stream_), "constant");
  }

 private:
  cudaStream_t stream_;
  std::size_t bytes_;
  void* data_ = nullptr;
};

const bool registered =
    register_kernel("constant", {[](const Site& site) -> std::unique_ptr<Kernel> { return std::make_unique<ConstantKernel>(site); }, {}});

}  // namespace
}  // namespace comfytp::backend::cuda
