// cast, transpose, split_dim, merge_dims, slice, concat: elements move from strides to strides.
#include "backend/cpu/copy_plan.h"
#include "backend/cpu/kernel_table.h"
#include "base/error.h"

namespace comfytp::backend::cpu {
namespace {

/// One copy of (a part of) an input to (a part of) the output.
struct Move {
  CopyPlan plan;
  std::size_t input = 0;
  std::int64_t from = 0, to = 0;  ///< bytes behind the operands' first
};

class MovementKernel final : public Kernel {
 public:
  explicit MovementKernel(std::vector<Move> moves) : moves_(std::move(moves)) {}
  void run(std::span<const void* const> in, std::span<void* const> out, void*) override {
    for (const auto& m : moves_) m.plan.run(static_cast<const char*>(in[m.input]) + m.from, static_cast<char*>(out[0]) + m.to);
  }

 private:
  std::vector<Move> moves_;
};

Shape strides(const Operand& operand) { return graph::strides_of(operand.type.shape, operand.order); }

std::unique_ptr<Kernel> move_all(const Site& site, const Shape& shape, const Shape& from, const Shape& to) {
  std::vector<Move> moves;
  moves.push_back({CopyPlan(shape, site.in[0].type.dtype, from, site.out[0].type.dtype, to)});
  return std::make_unique<MovementKernel>(std::move(moves));
}

std::unique_ptr<Kernel> cast(const Site& site) { return move_all(site, site.shape(0), strides(site.in[0]), strides(site.out[0])); }

std::unique_ptr<Kernel> transpose(const Site& site) {
  const Shape in = strides(site.in[0]);
  Shape from;
  for (auto d : site.attrs().ints("order")) from.push_back(in[static_cast<std::size_t>(d)]);
  return move_all(site, site.out[0].type.shape, from, strides(site.out[0]));
}

// The strides of `merged`, seen with dimension `dim` split into the sizes that `split` has there.
Shape split_strides(const Shape& merged, std::size_t dim, const Shape& split) {
  const std::size_t count = split.size() + 1 - merged.size();
  Shape strides = merged;
  strides.erase(strides.begin() + dim);
  std::int64_t step = merged[dim];
  for (std::size_t k = count; k-- > 0;) {
    strides.insert(strides.begin() + dim, step);
    step *= split[dim + k];
  }
  return strides;
}

std::unique_ptr<Kernel> split_dim(const Site& site) {
  const auto& shape = site.out[0].type.shape;
  return move_all(site, shape, split_strides(strides(site.in[0]), static_cast<std::size_t>(site.attrs().integer("dim")), shape), strides(site.out[0]));
}

std::unique_ptr<Kernel> merge_dims(const Site& site) {
  const auto& shape = site.shape(0);
  return move_all(site, shape, strides(site.in[0]), split_strides(strides(site.out[0]), static_cast<std::size_t>(site.attrs().integer("dim")), shape));
}

std::unique_ptr<Kernel> slice(const Site& site) {
  const auto dim = static_cast<std::size_t>(site.attrs().integer("dim"));
  const auto &in = site.in[0], &out = site.out[0];
  std::vector<Move> moves;
  moves.push_back({CopyPlan(out.type.shape, in.type.dtype, strides(in), out.type.dtype, strides(out)), 0,
                   site.attrs().integer("start") * strides(in)[dim] * size_of(in.type.dtype), 0});
  return std::make_unique<MovementKernel>(std::move(moves));
}

std::unique_ptr<Kernel> concat(const Site& site) {
  const auto dim = static_cast<std::size_t>(site.attrs().integer("dim"));
  const auto& out = site.out[0];
  std::vector<Move> moves;
  std::int64_t start = 0;
  for (std::size_t i = 0; i < site.in.size(); ++i) {
    const auto& in = site.in[i];
    moves.push_back({CopyPlan(in.type.shape, in.type.dtype, strides(in), out.type.dtype, strides(out)), i, 0,
                     start * strides(out)[dim] * size_of(out.type.dtype)});
    start += in.type.shape[dim];
  }
  return std::make_unique<MovementKernel>(std::move(moves));
}

const bool registered = register_kernel("cast", {cast}) && register_kernel("transpose", {transpose}) && register_kernel("split_dim", {split_dim}) &&
                        register_kernel("merge_dims", {merge_dims}) && register_kernel("slice", {slice}) && register_kernel("concat", {concat});

}  // namespace
}  // namespace comfytp::backend::cpu
