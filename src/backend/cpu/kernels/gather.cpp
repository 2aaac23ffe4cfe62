// gather: whole rows are copied; rows of a weight are decoded as they are read, so a table stays as it is stored.
#include <cmath>
#include <cstring>

#include "backend/cpu/kernel_table.h"
#include "backend/cpu/onednn.h"
#include "backend/cpu/parallel.h"

namespace comfytp::backend::cpu {
namespace {

class GatherKernel final : public Kernel {
 public:
  explicit GatherKernel(const Site& site)
      : weight_(site.in[0].weight),
        stored_(weight_ ? weight_->stored : site.in[0].type.dtype),
        dtype_(site.out[0].type.dtype),
        index_(site.in[1].type) {
    const auto dim = static_cast<std::size_t>(site.attrs().integer("dim"));
    const auto& x = site.shape(0);
    size_ = x[dim];
    inner_ = row_major_strides(x)[dim];
    outer_ = numel(Shape(x.begin(), x.begin() + static_cast<std::ptrdiff_t>(dim)));
    if (weight_ && !weight_->format) weight_->packable = false;
    outside_.resize(static_cast<std::size_t>(size_of(dtype_)));
    if (is_float(dtype_)) store_element(outside_.data(), dtype_, 0, NAN);
  }
  std::int64_t workspace_bytes() const override { return weight_ && weight_->format ? weight_->bytes() : 0; }
  void run(std::span<const void* const> in, std::span<void* const> out, void* workspace) override {
    const auto* x = static_cast<const char*>(in[0]);
    if (workspace_bytes()) {
      reorder(*packed_desc(*weight_), x, dense(weight_->shape, weight_->stored), workspace);
      x = static_cast<const char*>(workspace);
    }
    const auto count = numel(index_.shape);
    if (inner_ == 0) return;
    parallel(outer_ * count, row_grain(inner_), [&](std::int64_t begin, std::int64_t end, int) {
      for (std::int64_t i = begin; i < end; ++i) {
        auto row = static_cast<std::int64_t>(load_element(in[1], index_.dtype, i % count));
        row += row < 0 ? size_ : 0;
        char* to = static_cast<char*>(out[0]) + i * inner_ * size_of(dtype_);
        if (row >= 0 && row < size_)
          convert(x + (i / count * size_ + row) * inner_ * size_of(stored_), stored_, to, dtype_, inner_);
        else
          for (std::int64_t k = 0; k < inner_; ++k) std::memcpy(to + k * size_of(dtype_), outside_.data(), outside_.size());
      }
    });
  }

 private:
  WeightBuffer* weight_;
  DType stored_, dtype_;
  graph::Type index_;
  std::int64_t size_, inner_, outer_;
  std::vector<char> outside_;  ///< what an index outside gives
};

const bool registered =
    register_kernel("gather", {[](const Site& site) -> std::unique_ptr<Kernel> { return std::make_unique<GatherKernel>(site); }, 0});

}  // namespace
}  // namespace comfytp::backend::cpu
