// constant: its values, converted and laid out once.
#include <cstring>

#include "backend/cpu/kernel_table.h"

namespace comfytp::backend::cpu {
namespace {

class ConstantKernel final : public Kernel {
 public:
  explicit ConstantKernel(const Site& site) {
    const auto& out = site.out[0];
    const auto& values = site.attrs().reals("values");
    const auto count = numel(out.type.shape);
    bytes_.resize(static_cast<std::size_t>(out.type.bytes()));
    const Shape from = row_major_strides(out.type.shape), to = graph::strides_of(out.type.shape, out.order);
    for (std::int64_t i = 0; i < count; ++i) {
      std::int64_t place = 0;
      for (std::size_t d = 0; d < to.size(); ++d) place += i / from[d] % out.type.shape[d] * to[d];
      store_element(bytes_.data(), out.type.dtype, place, values.size() == 1 ? values[0] : values[static_cast<std::size_t>(i)]);
    }
  }
  void run(std::span<const void* const>, std::span<void* const> out, void*) override {
    if (!bytes_.empty()) std::memcpy(out[0], bytes_.data(), bytes_.size());
  }

 private:
  std::vector<char> bytes_;
};

const bool registered =
    register_kernel("constant", {[](const Site& site) -> std::unique_ptr<Kernel> { return std::make_unique<ConstantKernel>(site); }});

}  // namespace
}  // namespace comfytp::backend::cpu
