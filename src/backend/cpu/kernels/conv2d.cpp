// conv2d as a oneDNN convolution on NHWC; a 1x1 convolution that touches every pixel is a matmul over pixels.
#include "backend/cpu/contraction.h"

namespace comfytp::backend::cpu {
namespace {

using dnnl::memory;

class Convolution final : public Contraction {
 public:
  Convolution(DType dtype, Shape x, Shape y, Shape k, const graph::Attrs& a) : dtype_(dtype), x_(std::move(x)), y_(std::move(y)), k_(std::move(k)) {
    const auto &stride = a.ints("stride"), &padding = a.ints("padding");
    stride_ = stride;
    before_ = {padding[0], padding[1]};
    // oneDNN wants the padding behind to be just what the output needs.
    for (int d = 0; d < 2; ++d) after_.push_back((y_[2 + d] - 1) * stride[d] + k_[2 + d] - x_[2 + d] - padding[d]);
  }
  dnnl::primitive_desc primitive(std::int64_t o, const MemoryDesc& weights, const MemoryDesc& bias, const dnnl::primitive_attr& attr) const override {
    const auto kind = dnnl::prop_kind::forward_inference;
    const auto algorithm = dnnl::algorithm::convolution_direct;
    const auto x = image(x_);
    if (bias) return dnnl::convolution_forward::primitive_desc(engine(), kind, algorithm, x, weights, bias, result(o), stride_, before_, after_, attr);
    return dnnl::convolution_forward::primitive_desc(engine(), kind, algorithm, x, weights, result(o), stride_, before_, after_, attr);
  }
  MemoryDesc bias(std::int64_t o) const override { return dense({o}, dtype_); }
  MemoryDesc channels(std::int64_t o) const override { return dense({1, o, 1, 1}, dtype_); }
  MemoryDesc result(std::int64_t o) const override { return image({y_[0], o, y_[2], y_[3]}); }
  MemoryDesc as_weights(const MemoryDesc& own) const override { return own; }
  MemoryDesc as_own(const MemoryDesc& weights) const override { return weights; }
  std::vector<MemoryDesc> candidates(std::int64_t o) const override {
    const memory::dims dims = {o, k_[1], k_[2], k_[3]};
    std::vector<MemoryDesc> list = {{dims, onednn_type(dtype_), memory::format_tag::any}};
    if (dtype_ == DType::f32)
      for (auto tag : {memory::format_tag::Ohwi64o, memory::format_tag::Ohwi32o, memory::format_tag::Ohwi16o}) list.emplace_back(dims, onednn_type(dtype_), tag);
    return list;
  }
  bool reads_plain() const override { return false; }

 private:
  MemoryDesc image(const Shape& shape) const { return dense(shape, dtype_, graph::strides_of(shape, graph::channels_last(4))); }

  DType dtype_;
  Shape x_, y_, k_;
  memory::dims stride_, before_, after_;
};

std::unique_ptr<Kernel> make(const Site& site) {
  const DType dtype = site.in[0].type.dtype;
  expect_real(site, dtype);
  const auto& y = site.out[0].type.shape;
  ContractionSizes sizes;
  sizes.source = site.shape(0);
  sizes.weight = site.shape(1);
  sizes.rows = y[0] * y[2] * y[3];
  sizes.outputs = y[1];
  sizes.zero = sizes.weight[1] == 0;
  if (sizes.zero) sizes.source[1] = sizes.weight[1] = 1;
  if (sizes.rows * sizes.outputs == 0) return make_contraction(site, sizes, nullptr);
  const auto &k = sizes.weight, &x = sizes.source;
  const bool pixelwise = k[2] == 1 && k[3] == 1 && x[2] == y[2] && x[3] == y[3] && site.attrs().ints("padding") == graph::Ints(4, 0) &&
                         site.attrs().ints("stride") == graph::Ints(2, 1);
  if (pixelwise) return make_contraction(site, sizes, matmul_contraction(dtype, sizes.rows, k));
  return make_contraction(site, sizes, std::make_shared<Convolution>(dtype, x, y, k, site.attrs()));
}

const bool registered = register_kernel("conv2d", {make, 1});

}  // namespace
}  // namespace comfytp::backend::cpu
