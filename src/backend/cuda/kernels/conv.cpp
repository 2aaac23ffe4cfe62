// conv1d, conv2d, conv3d: cuDNN on channels-last tensors, the filter packed as [o, window, i]; the epilogue is a pass of its own.
#include "backend/cuda/kernels/conv.h"

#include "backend/alignment.h"
#include "backend/cuda/copy_plan.h"
#include "backend/cuda/cudnn.h"
#include "backend/cuda/kernels/contraction.h"
#include "backend/cuda/status.h"

namespace comfytp::backend::cuda {
namespace {

// How the filter is given to the convolution: as it lies, or copied into [o, window, i] first.
struct Filter {
  Shape strides;             ///< of what the convolution reads
  StridedCopy copy;          ///< into the workspace, where `copies`
  bool copies = false;
  std::int64_t bytes = 0;
};

Filter plan_filter(const Site& site, DType dtype) {
  const auto& shape = site.shape(1);
  const auto rank = shape.size();
  WeightBuffer* weight = site.in[1].weight;
  const auto plain = site.strides(1), packed = graph::strides_of(shape, graph::channels_last(rank));
  bool alike = true;  // a 1x1 filter lies the same either way
  for (std::size_t d = 0; d < rank; ++d) alike = alike && (shape[d] == 1 || plain[d] == packed[d]);
  Filter filter{packed, {}, false, numel(shape) * size_of(dtype)};
  if (weight && weight->packable && !weight->format && !weight->data && !alike) {
    const auto copy = plan_copy(shape, weight->stored, plain, weight->stored, packed);
    weight->format = WeightFormat{"channels last", [copy, stream = site.context.stream](const void* from, void* to) {
                                    check(launch_copy(copy, from, to, stream), "packing a weight");
                                  }, nullptr};
  }
  const bool is_packed = alike || (weight && weight->format);
  if (weight && !weight->format) weight->packable = false;
  filter.copies = !is_packed || site.dtype(1) != dtype;
  filter.copy = plan_copy(shape, site.dtype(1), weight && weight->format ? packed : plain, dtype, packed);
  return filter;
}

std::unique_ptr<Kernel> make(const Site& site) {
  const DType dtype = site.in[0].type.dtype;
  expect_real(site, dtype);
  const auto &x = site.shape(0), &k = site.shape(1), &y = site.out[0].type.shape;
  const auto spatial = x.size() - 2;
  const auto &stride = site.attrs().ints("stride"), &padding = site.attrs().ints("padding");
  const Epilogue epilogue(site, 1);
  const auto filter = plan_filter(site, dtype);
  const auto cuda_stream = site.context.stream;

  // cuDNN wants at least two spatial dimensions.
  const auto widened = [&](Shape shape, std::int64_t value) {
    if (spatial == 1) shape.insert(shape.end() - 1, value);
    return shape;
  };
  const auto widened_strides = [&](Shape strides, const Shape& shape) {
    if (spatial == 1) strides.insert(strides.end() - 1, strides.back() * shape.back());
    return strides;
  };
  const Shape x_strides = site.strides(0), y_strides = graph::strides_of(y, site.out[0].order);
  std::shared_ptr<CudnnPlan> plan;
  const bool nothing = numel(y) == 0 || numel(k) == 0 || numel(x) == 0;
  if (!nothing) {
    Convolution c{dtype, widened(x, 1), widened_strides(x_strides, x), widened(k, 1), widened_strides(filter.strides, k), widened(y, 1), widened_strides(y_strides, y),
                  stride, Shape(padding.begin(), padding.begin() + static_cast<std::ptrdiff_t>(spatial)),
                  Shape(padding.begin() + static_cast<std::ptrdiff_t>(spatial), padding.end())};
    if (spatial == 1) {
      c.stride.insert(c.stride.begin(), 1);
      c.before.insert(c.before.begin(), 0);
      c.after.insert(c.after.begin(), 0);
    }
    plan = plan_convolution(site.context, c);
  }
  DirectConvolution direct;
  if (!plan) {
    direct.n = x[0];
    direct.outputs = k[0];
    direct.inputs = k[1];
    direct.groups = std::max<std::int64_t>(1, site.attrs().integer_or("groups", 1));
    for (std::size_t d = 0; d < 2; ++d) direct.x_strides[d] = x_strides[d], direct.filter_strides[d] = filter.strides[d], direct.y_strides[d] = y_strides[d];
    for (std::size_t d = 0; d < spatial; ++d) {
      const auto to = 3 - spatial + d;
      direct.x[to] = x[2 + d], direct.window[to] = k[2 + d], direct.y[to] = y[2 + d], direct.stride[to] = stride[d], direct.before[to] = padding[d];
      direct.x_strides[2 + to] = x_strides[2 + d], direct.filter_strides[2 + to] = filter.strides[2 + d], direct.y_strides[2 + to] = y_strides[2 + d];
    }
  }
  const auto filter_bytes = filter.copies ? aligned(filter.bytes) : 0;
  return make_kernel(
      [=](auto in, auto out, void* workspace) {
        const void* w = in[1];
        if (filter.copies) {
          check(launch_copy(filter.copy, in[1], workspace, cuda_stream), "decoding a filter");
          w = workspace;
        }
        if (plan)
          plan->run(in[0], w, nullptr, out[0], static_cast<char*>(workspace) + filter_bytes);
        else
          check(launch_direct_convolution(direct, dtype, in[0], w, out[0], cuda_stream), "convolution");
        epilogue.run(in, out[0]);
      },
      filter_bytes + (plan ? plan->workspace_bytes() : 0));
}

const bool registered = register_kernel("conv1d", {make, {1}}) && register_kernel("conv2d", {make, {1}}) && register_kernel("conv3d", {make, {1}});

}  // namespace
}  // namespace comfytp::backend::cuda
