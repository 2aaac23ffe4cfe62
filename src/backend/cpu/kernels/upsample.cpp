// upsample_nearest on NHWC: whole pixels are copied.
#include <cstring>

#include "backend/cpu/kernel_table.h"
#include "backend/cpu/parallel.h"

namespace comfytp::backend::cpu {
namespace {

class UpsampleNearestKernel final : public Kernel {
 public:
  explicit UpsampleNearestKernel(const Site& site)
      : in_(site.shape(0)), out_(site.out[0].type.shape), pixel_(in_[1] * size_of(site.in[0].type.dtype)) {
    const auto& a = site.attrs();
    for (std::size_t d = 0; d < 2; ++d)
      for (std::int64_t i = 0; i < out_[2 + d]; ++i)
        source_[d].push_back((i + a.ints("to_offset")[d]) * a.ints("from")[d] / a.ints("to")[d] - a.ints("from_offset")[d]);
  }
  void run(std::span<const void* const> in, std::span<void* const> out, void*) override {
    const auto* x = static_cast<const char*>(in[0]);
    auto* y = static_cast<char*>(out[0]);
    if (pixel_ == 0) return;
    parallel(out_[0] * out_[2], row_grain(out_[3] * in_[1]), [&](std::int64_t begin, std::int64_t end, int) {
      for (std::int64_t row = begin; row < end; ++row) {
        const char* from = x + (row / out_[2] * in_[2] + source_[0][static_cast<std::size_t>(row % out_[2])]) * in_[3] * pixel_;
        char* to = y + row * out_[3] * pixel_;
        for (std::int64_t w = 0; w < out_[3]; ++w)
          std::memcpy(to + w * pixel_, from + source_[1][static_cast<std::size_t>(w)] * pixel_, pixel_);
      }
    });
  }

 private:
  Shape in_, out_;
  std::int64_t pixel_;
  std::vector<std::int64_t> source_[2];
};

const bool registered = register_kernel(
    "upsample_nearest", {[](const Site& site) -> std::unique_ptr<Kernel> { return std::make_unique<UpsampleNearestKernel>(site); }});

}  // namespace
}  // namespace comfytp::backend::cpu
