// cast, transpose, split_dim, merge_dims, slice, concat, expand, pad: elements move from strides to strides.
#include "backend/cpu/copy_plan.h"
#include "backend/cpu/kernel_table.h"
#include "base/error.h"

namespace comfytp::backend::cpu {
namespace {

constexpr std::size_t kFill = SIZE_MAX;

/// One copy of (a part of) an input to (a part of) the output.
struct Move {
  CopyPlan plan;
  std::size_t input = 0;          ///< kFill: the kernel's own value
  std::int64_t from = 0, to = 0;  ///< bytes behind the operands' first
};

class MovementKernel final : public Kernel {
 public:
  explicit MovementKernel(std::vector<Move> moves, std::vector<char> fill = {}) : moves_(std::move(moves)), fill_(std::move(fill)) {}
  void run(std::span<const void* const> in, std::span<void* const> out, void*) override {
    for (const auto& m : moves_)
      m.plan.run(m.input == kFill ? fill_.data() : static_cast<const char*>(in[m.input]) + m.from, static_cast<char*>(out[0]) + m.to);
  }

 private:
  std::vector<Move> moves_;
  std::vector<char> fill_;
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
  return move_all(site, shape, split_strides(strides(site.in[0]), static_cast<std::size_t>(site.attrs().integer("dim")), shape),
                  strides(site.out[0]));
}

std::unique_ptr<Kernel> merge_dims(const Site& site) {
  const auto& shape = site.shape(0);
  return move_all(site, shape, strides(site.in[0]),
                  split_strides(strides(site.out[0]), static_cast<std::size_t>(site.attrs().integer("dim")), shape));
}

std::unique_ptr<Kernel> slice(const Site& site) {
  const auto dim = static_cast<std::size_t>(site.attrs().integer("dim"));
  const auto &in = site.in[0], &out = site.out[0];
  std::vector<Move> moves;
  Shape from = strides(in);
  from[dim] *= site.attrs().integer_or("step", 1);
  moves.push_back({CopyPlan(out.type.shape, in.type.dtype, from, out.type.dtype, strides(out)), 0,
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

std::unique_ptr<Kernel> expand(const Site& site) {
  const auto& in = site.in[0];
  Shape from = strides(in);
  for (std::size_t d = 0; d < from.size(); ++d)
    if (in.type.shape[d] == 1) from[d] = 0;
  return move_all(site, site.out[0].type.shape, from, strides(site.out[0]));
}

// Each dimension has up to three runs: what is before, the input, what is after; each combination of runs is one copy, in which
// an edge that is repeated has stride 0.
struct Run {
  std::int64_t size, from, to, step;
};

void add_pads(const Site& site, const std::vector<std::vector<Run>>& runs, std::vector<Run>& chosen, std::vector<Move>& moves) {
  if (chosen.size() < runs.size()) {
    for (const auto& run : runs[chosen.size()]) {
      chosen.push_back(run);
      add_pads(site, runs, chosen, moves);
      chosen.pop_back();
    }
    return;
  }
  const auto &in = site.in[0], &out = site.out[0];
  const Shape from_strides = strides(in), to_strides = strides(out);
  Shape shape, steps;
  std::int64_t from = 0, to = 0;
  for (std::size_t d = 0; d < chosen.size(); ++d) {
    shape.push_back(chosen[d].size);
    steps.push_back(chosen[d].step * from_strides[d]);
    from += chosen[d].from * from_strides[d];
    to += chosen[d].to * to_strides[d];
  }
  const auto element = size_of(in.type.dtype);
  moves.push_back({CopyPlan(shape, in.type.dtype, steps, out.type.dtype, to_strides), 0, from * element, to * element});
}

std::unique_ptr<Kernel> pad(const Site& site) {
  const auto &in = site.in[0], &out = site.out[0];
  const auto &before = site.attrs().ints("before"), &after = site.attrs().ints("after");
  const auto& mode = site.attrs().text("mode");
  std::vector<Move> moves;
  std::vector<char> fill;
  if (mode == "constant") {
    fill.resize(static_cast<std::size_t>(size_of(out.type.dtype)));
    store_element(fill.data(), out.type.dtype, 0, site.attrs().real("value"));
    moves.push_back({CopyPlan(out.type.shape, out.type.dtype, Shape(before.size(), 0), out.type.dtype, strides(out)), kFill});
  }
  std::vector<std::vector<Run>> runs;
  for (std::size_t d = 0; d < before.size(); ++d) {
    const auto size = in.type.shape[d];
    runs.push_back({{size, 0, before[d], 1}});
    if (mode == "replicate" && before[d]) runs[d].push_back({before[d], 0, 0, 0});
    if (mode == "replicate" && after[d]) runs[d].push_back({after[d], size - 1, before[d] + size, 0});
    if (mode == "circular" && before[d]) runs[d].push_back({before[d], size - before[d], 0, 1});
    if (mode == "circular" && after[d]) runs[d].push_back({after[d], 0, before[d] + size, 1});
  }
  std::vector<Run> chosen;
  if (numel(in.type.shape)) add_pads(site, runs, chosen, moves);
  return std::make_unique<MovementKernel>(std::move(moves), std::move(fill));
}

const bool registered = register_kernel("cast", {cast}) && register_kernel("transpose", {transpose}) &&
                        register_kernel("split_dim", {split_dim}) && register_kernel("merge_dims", {merge_dims}) &&
                        register_kernel("slice", {slice}) && register_kernel("concat", {concat}) && register_kernel("expand", {expand}) &&
                        register_kernel("pad", {pad});

}  // namespace
}  // namespace comfytp::backend::cpu
