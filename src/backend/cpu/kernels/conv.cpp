// conv1d, conv2d, conv3d as oneDNN convolutions with channels innermost; one that looks at a single pixel each is a matmul.
#include <algorithm>

#include "backend/cpu/contraction.h"

namespace comfytp::backend::cpu {
namespace {

using dnnl::memory;

class Convolution final : public Contraction {
 public:
  Convolution(DType dtype, Shape x, Shape y, Shape k, const graph::Attrs& a)
      : dtype_(dtype), x_(std::move(x)), y_(std::move(y)), k_(std::move(k)), groups_(a.integer_or("groups", 1)), stride_(a.ints("stride")) {
    const auto& padding = a.ints("padding");
    before_.assign(padding.begin(), padding.begin() + static_cast<std::ptrdiff_t>(stride_.size()));
    after_.assign(padding.begin() + static_cast<std::ptrdiff_t>(stride_.size()), padding.end());
  }
  dnnl::primitive_desc primitive(std::int64_t o, const MemoryDesc& weights, const MemoryDesc& bias,
                                 const dnnl::primitive_attr& attr) const override {
    const auto kind = dnnl::prop_kind::forward_inference;
    const auto algorithm = dnnl::algorithm::convolution_direct;
    const auto x = image(x_);
    if (bias)
      return dnnl::convolution_forward::primitive_desc(engine(), kind, algorithm, x, weights, bias, result(o), stride_, before_, after_,
                                                       attr);
    return dnnl::convolution_forward::primitive_desc(engine(), kind, algorithm, x, weights, result(o), stride_, before_, after_, attr);
  }
  MemoryDesc bias(std::int64_t o) const override { return dense({o}, dtype_); }
  MemoryDesc channels(std::int64_t o) const override {
    Shape shape(y_.size(), 1);
    shape[1] = o;
    return dense(shape, dtype_);
  }
  MemoryDesc result(std::int64_t o) const override {
    Shape shape = y_;
    shape[1] = o;
    return image(shape);
  }
  MemoryDesc as_weights(const MemoryDesc& own) const override { return groups_ == 1 ? own : own.reshape(weight_dims(own.get_dims()[0])); }
  MemoryDesc as_own(const MemoryDesc& weights) const override { return weights; }
  std::vector<MemoryDesc> candidates(std::int64_t o) const override {
    const auto dims = weight_dims(o);
    std::vector<MemoryDesc> list = {{dims, onednn_type(dtype_), memory::format_tag::any}};
    if (dtype_ == DType::f32 && dims.size() == 4)
      for (auto tag : {memory::format_tag::Ohwi64o, memory::format_tag::Ohwi32o, memory::format_tag::Ohwi16o})
        list.emplace_back(dims, onednn_type(dtype_), tag);
    return list;
  }
  std::int64_t input_dim() const override { return 1; }
  bool reads_plain() const override { return false; }
  bool divisible() const override { return groups_ == 1; }

 private:
  memory::dims weight_dims(std::int64_t o) const {
    memory::dims dims = k_;
    dims[0] = o / groups_;
    if (groups_ == 1) return dims;
    dims.insert(dims.begin(), groups_);
    return dims;
  }
  MemoryDesc image(const Shape& shape) const { return dense(shape, dtype_, graph::strides_of(shape, graph::channels_last(shape.size()))); }

  DType dtype_;
  Shape x_, y_, k_;
  std::int64_t groups_;
  memory::dims stride_, before_, after_;
};

bool pixelwise(const Site& site) {
  const auto &k = site.shape(1), &stride = site.attrs().ints("stride"), &padding = site.attrs().ints("padding");
  const auto all = [](auto begin, auto end, std::int64_t value) {
    return std::all_of(begin, end, [=](std::int64_t v) { return v == value; });
  };
  return all(k.begin() + 2, k.end(), 1) && all(stride.begin(), stride.end(), 1) && all(padding.begin(), padding.end(), 0) &&
         site.attrs().integer_or("groups", 1) == 1;
}

std::unique_ptr<Kernel> make(const Site& site) {
  const DType dtype = site.in[0].type.dtype;
  expect_real(site, dtype);
  const auto& y = site.out[0].type.shape;
  ContractionSizes sizes;
  sizes.source = site.shape(0);
  sizes.weight = site.shape(1);
  sizes.outputs = y[1];
  sizes.rows = sizes.outputs ? numel(y) / sizes.outputs : 0;
  sizes.zero = sizes.weight[1] == 0;
  if (sizes.zero) {
    sizes.source[1] = site.attrs().integer_or("groups", 1);
    sizes.weight[1] = 1;
  }
  if (sizes.rows == 0) return make_contraction(site, sizes, nullptr);
  if (pixelwise(site)) return make_contraction(site, sizes, matmul_contraction(dtype, sizes.rows, sizes.weight));
  return make_contraction(site, sizes, std::make_shared<Convolution>(dtype, sizes.source, y, sizes.weight, site.attrs()));
}

const bool registered =
    register_kernel("conv1d", {make, 1}) && register_kernel("conv2d", {make, 1}) && register_kernel("conv3d", {make, 1});

}  // namespace
}  // namespace comfytp::backend::cpu
