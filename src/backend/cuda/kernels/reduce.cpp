#include "backend/cuda/kernels/reduce.h"

#include <algorithm>

#include "backend/cuda/kernel_table.h"
#include "backend/cuda/status.h"

namespace comfytp::backend::cuda {
namespace {

template <bool kMaximum>
std::unique_ptr<Kernel> make_reduce(const Site& site) {
  const DType dtype = site.in[0].type.dtype;
  if (is_float(dtype)) expect_real(site, dtype);
  const auto& shape = site.shape(0);
  const auto strides = site.strides(0);
  const auto& dims = site.attrs().ints("dims");
  Reduce r;
  r.maximum = kMaximum;
  // The input is dense, so neighbours of one kind are one dimension.
  for (int o : site.in[0].order) {
    const auto d = static_cast<std::size_t>(o);
    if (shape[d] == 1) continue;
    const bool gone = std::find(dims.begin(), dims.end(), o) != dims.end();
    const bool merges = (gone ? r.gone : r.kept) > 0 && r.inner_gone == gone;
    (gone ? r.terms : r.results) *= shape[d];
    int& rank = gone ? r.gone : r.kept;
    auto *size = gone ? r.gone_size : r.kept_size, *stride = gone ? r.gone_stride : r.kept_stride;
    if (!merges) {
      require(rank < kMaxRank, "[{}] expected at most {} dimensions on {}", site.op(), kMaxRank, site.context.name);
      size[rank++] = 1;
    }
    size[rank - 1] *= shape[d];
    stride[rank - 1] = strides[d];
    r.inner_gone = gone;
  }
  return make_kernel([=, stream = site.context.stream](auto in, auto out, void*) { check(launch_reduce(r, dtype, in[0], out[0], stream), "a reduction"); });
}

std::unique_ptr<Kernel> make_softmax(const Site& site) {
  const DType dtype = site.in[0].type.dtype;
  expect_real(site, dtype);
  const auto dim = static_cast<std::size_t>(site.attrs().integer("dim"));
  const auto count = numel(site.shape(0)), size = site.shape(0)[dim], inner = site.strides(0)[dim];
  const auto outer = count ? count / (size * inner) : 0;
  return make_kernel([=, stream = site.context.stream](auto in, auto out, void*) {
    check(launch_softmax(dtype, outer, size, inner, in[0], out[0], stream), "softmax");
  });
}

std::unique_ptr<Kernel> make_row_moments(const Site& site) {
  const DType dtype = site.in[0].type.dtype;
  expect_real(site, dtype);
  const auto columns = site.shape(0).back(), rows = numel(site.out[0].type.shape) / 3;
  return make_kernel([=, stream = site.context.stream](auto in, auto out, void*) {
    check(launch_row_moments(dtype, rows, columns, in[0], static_cast<float*>(out[0]), stream), "row_moments");
  });
}

const bool registered = register_kernel("sum", {make_reduce<false>, {}}) && register_kernel("amax", {make_reduce<true>, {}}) &&
                        register_kernel("softmax", {make_softmax, {}}) && register_kernel("row_moments", {make_row_moments, {}});

}  // namespace
}  // namespace comfytp::backend::cuda
