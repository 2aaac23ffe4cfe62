// Tensors in the program's own memory.
#pragma once

#include <cstddef>
#include <vector>

#include "base/tensor_view.h"

namespace comfytp::cli {

class HostTensor {
 public:
  HostTensor() = default;
  HostTensor(DType dtype, Shape shape)
      : dtype_(dtype), shape_(std::move(shape)), bytes_(static_cast<std::size_t>(numel(shape_) * size_of(dtype_))) {}

  TensorView view() { return TensorView::dense(bytes_.data(), dtype_, shape_); }
  DType dtype() const { return dtype_; }
  const Shape& shape() const { return shape_; }
  const std::vector<std::byte>& bytes() const { return bytes_; }

 private:
  DType dtype_ = DType::f32;
  Shape shape_;
  std::vector<std::byte> bytes_;
};

}  // namespace comfytp::cli
