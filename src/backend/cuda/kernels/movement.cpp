// cast, transpose, split_dim, merge_dims, slice, concat, expand: elements move from strides to strides.
#include "backend/cuda/kernels/movement.h"

#include <algorithm>
#include <vector>

#include "backend/cuda/copy_plan.h"
#include "backend/cuda/kernel_table.h"
#include "backend/cuda/kernels/words.h"
#include "backend/cuda/status.h"

namespace comfytp::backend::cuda {
namespace {

Shape strides_of(const Operand& operand) { return graph::strides_of(operand.type.shape, operand.order); }

std::unique_ptr<Kernel> move_all(const Site& site, const Shape& shape, const Shape& from, const Shape& to, std::int64_t offset = 0) {
  const auto plan = plan_copy(shape, site.dtype(0), from, site.out[0].type.dtype, to);
  return make_kernel([plan, offset, stream = site.context.stream](auto in, auto out, void*) {
    check(launch_copy(plan, static_cast<const char*>(in[0]) + offset, out[0], stream), "a copy");
  });
}

std::unique_ptr<Kernel> cast(const Site& site) {
  const auto from = site.dtype(0), to = site.out[0].type.dtype;
  Shape lies = site.strides(0);
  if (auto* weight = site.in[0].weight) {  // the format of convolutions is the only one there is
    if (weight->format) lies = graph::strides_of(site.shape(0), graph::channels_last(site.shape(0).size()));
    else weight->packable = false;
  }
  const auto plan = plan_copy(site.shape(0), from, lies, to, strides_of(site.out[0]));
  const bool dense = has_dense_cast(from, to) && (plan.rank == 0 || (plan.rank == 1 && plan.from[0] == 1 && plan.to[0] == 1));
  return make_kernel([=, count = numel(site.shape(0)), stream = site.context.stream](auto in, auto out, void*) {
    if (dense && (address(in[0]) | address(out[0])) % 16 == 0)
      check(launch_dense_cast(from, to, count, in[0], out[0], stream), "cast");
    else
      check(launch_copy(plan, in[0], out[0], stream), "cast");
  });
}

std::unique_ptr<Kernel> transpose(const Site& site) {
  const Shape in = site.strides(0);
  Shape from;
  for (auto d : site.attrs().ints("order")) from.push_back(in[static_cast<std::size_t>(d)]);
  return move_all(site, site.out[0].type.shape, from, strides_of(site.out[0]));
}

// The strides of `merged`, seen with dimension `dim` split into the sizes that `split` has there.
Shape split_strides(const Shape& merged, std::size_t dim, const Shape& split) {
  const std::size_t count = split.size() + 1 - merged.size();
  Shape strides(merged.begin(), merged.begin() + static_cast<std::ptrdiff_t>(dim));
  strides.resize(dim + count);
  std::int64_t step = merged[dim];
  for (std::size_t k = count; k-- > 0; step *= split[dim + k]) strides[dim + k] = step;
  strides.insert(strides.end(), merged.begin() + static_cast<std::ptrdiff_t>(dim) + 1, merged.end());
  return strides;
}

std::unique_ptr<Kernel> split_dim(const Site& site) {
  const auto& shape = site.out[0].type.shape;
  return move_all(site, shape, split_strides(site.strides(0), static_cast<std::size_t>(site.attrs().integer("dim")), shape), strides_of(site.out[0]));
}

std::unique_ptr<Kernel> merge_dims(const Site& site) {
  const auto& shape = site.shape(0);
  return move_all(site, shape, site.strides(0), split_strides(strides_of(site.out[0]), static_cast<std::size_t>(site.attrs().integer("dim")), shape));
}

std::unique_ptr<Kernel> expand(const Site& site) {
  Shape from = site.strides(0);
  for (std::size_t d = 0; d < from.size(); ++d)
    if (site.shape(0)[d] == 1) from[d] = 0;
  return move_all(site, site.out[0].type.shape, from, strides_of(site.out[0]));
}

// How many elements lie outside of dimension `dim` in memory, and how many inside.
std::int64_t outer_of(const Shape& shape, const graph::Order& order, std::size_t dim) {
  std::int64_t outer = 1;
  for (int d : order) {
    if (static_cast<std::size_t>(d) == dim) break;
    outer *= shape[static_cast<std::size_t>(d)];
  }
  return outer;
}
std::int64_t inner_of(const Shape& shape, const graph::Order& order, std::size_t dim) {
  std::int64_t inner = 1;
  for (auto d = order.rbegin(); d != order.rend() && static_cast<std::size_t>(*d) != dim; ++d) inner *= shape[static_cast<std::size_t>(*d)];
  return inner;
}

std::unique_ptr<Kernel> slice(const Site& site) {
  const auto dim = static_cast<std::size_t>(site.attrs().integer("dim"));
  const auto start = site.attrs().integer("start"), step = site.attrs().integer_or("step", 1);
  const auto& out = site.out[0];
  const auto element = size_of(out.type.dtype);
  if (step != 1 || !graph::same_memory(out.type.shape, site.in[0].order, out.order)) {
    Shape from = site.strides(0);
    const auto offset = start * from[dim] * element;
    from[dim] *= step;
    return move_all(site, out.type.shape, from, strides_of(out), offset);
  }
  const auto inner = inner_of(site.shape(0), site.in[0].order, dim) * element;
  RowCopies copies;
  copies.parts = 1;
  copies.rows = outer_of(site.shape(0), site.in[0].order, dim);
  copies.start[1] = copies.to_pitch = out.type.shape[dim] * inner;
  copies.from_pitch[0] = site.shape(0)[dim] * inner;
  return make_kernel([copies, offset = start * inner, stream = site.context.stream](auto in, auto out, void*) {
    check(launch_row_copies(copies, {{static_cast<const char*>(in[0]) + offset}}, out[0], stream), "slice");
  });
}

std::unique_ptr<Kernel> concat(const Site& site) {
  const auto dim = static_cast<std::size_t>(site.attrs().integer("dim"));
  const auto& out = site.out[0];
  for (std::size_t i = 0; i < site.in.size(); ++i)
    require(graph::same_memory(site.shape(i), site.in[i].order, out.order), "[concat] expected operands that lie as the result does but operand {} does not", i);
  const auto inner = inner_of(out.type.shape, out.order, dim) * size_of(out.type.dtype);
  struct Launch {
    RowCopies copies;
    std::int64_t first = 0, offset = 0;
  };
  std::vector<Launch> launches;
  std::int64_t start = 0;
  for (std::size_t i = 0; i < site.in.size(); ++i) {
    if (i % kMaxParts == 0) {
      launches.push_back({{}, static_cast<std::int64_t>(i), start});
      launches.back().copies.rows = outer_of(out.type.shape, out.order, dim);
      launches.back().copies.to_pitch = out.type.shape[dim] * inner;
    }
    auto& c = launches.back().copies;
    const auto piece = site.shape(i)[dim] * inner;
    c.from_pitch[c.parts] = piece;
    c.start[c.parts + 1] = c.start[c.parts] + piece;
    ++c.parts;
    start += piece;
  }
  return make_kernel([launches, stream = site.context.stream](auto in, auto out, void*) {
    for (const auto& l : launches) {
      RowSources from;
      for (int k = 0; k < l.copies.parts; ++k) from.at[k] = in[static_cast<std::size_t>(l.first + k)];
      check(launch_row_copies(l.copies, from, static_cast<char*>(out[0]) + l.offset, stream), "concat");
    }
  });
}

const bool registered = register_kernel("cast", {cast, {0}}) && register_kernel("transpose", {transpose, {}}) &&
                        register_kernel("split_dim", {split_dim, {}}) && register_kernel("merge_dims", {merge_dims, {}}) &&
                        register_kernel("slice", {slice, {}}) && register_kernel("concat", {concat, {}}) && register_kernel("expand", {expand, {}});

}  // namespace
}  // namespace comfytp::backend::cuda
