// add, sub, mul, div with broadcasting: loops over the output as it lies in memory, neighbours merged.
#include "backend/cpu/copy_plan.h"
#include "backend/cpu/kernel_table.h"
#include "backend/cpu/parallel.h"
#include "backend/cpu/real.h"

namespace comfytp::backend::cpu {
namespace {

enum class Function { add, sub, mul, div };

template <Function f>
CTP_INLINE float apply(float a, float b) {
  if constexpr (f == Function::add) return a + b;
  if constexpr (f == Function::sub) return a - b;
  if constexpr (f == Function::mul) return a * b;
  if constexpr (f == Function::div) return a / b;
}

// The cases that matter have loops of their own, so that they are vectorised; an operand may be the output's own memory.
template <Function f, typename T>
CTP_INLINE void row(const T* a, std::int64_t sa, const T* b, std::int64_t sb, T* y, std::int64_t count) {
  if (sa == 1 && sb == 1) {
#pragma omp simd
    for (std::int64_t i = 0; i < count; ++i) store(y + i, apply<f>(load(a[i]), load(b[i])));
  } else if (sa == 1 && sb == 0) {
    const float v = load(*b);
#pragma omp simd
    for (std::int64_t i = 0; i < count; ++i) store(y + i, apply<f>(load(a[i]), v));
  } else if (sa == 0 && sb == 1) {
    const float v = load(*a);
#pragma omp simd
    for (std::int64_t i = 0; i < count; ++i) store(y + i, apply<f>(v, load(b[i])));
  } else {
    for (std::int64_t i = 0; i < count; ++i) store(y + i, apply<f>(load(a[i * sa]), load(b[i * sb])));
  }
}

template <typename T>
CTP_INLINE void any_row(Function f, const T* a, std::int64_t sa, const T* b, std::int64_t sb, T* y, std::int64_t count) {
  if (f == Function::add) row<Function::add>(a, sa, b, sb, y, count);
  if (f == Function::sub) row<Function::sub>(a, sa, b, sb, y, count);
  if (f == Function::mul) row<Function::mul>(a, sa, b, sb, y, count);
  if (f == Function::div) row<Function::div>(a, sa, b, sb, y, count);
}
CTP_CLONES void row_of(Function f, const float* a, std::int64_t sa, const float* b, std::int64_t sb, float* y, std::int64_t count) {
  any_row(f, a, sa, b, sb, y, count);
}
CTP_CLONES void row_of(Function f, const Bf16* a, std::int64_t sa, const Bf16* b, std::int64_t sb, Bf16* y, std::int64_t count) {
  any_row(f, a, sa, b, sb, y, count);
}

// Strides of an operand along the output's dimensions: 0 where it is broadcast.
Shape broadcast_strides(const Operand& operand, const Shape& shape) {
  const Shape own = graph::strides_of(operand.type.shape, operand.order);
  const std::size_t skip = shape.size() - own.size();
  Shape strides(shape.size(), 0);
  for (std::size_t d = 0; d < own.size(); ++d) strides[d + skip] = operand.type.shape[d] == 1 ? 0 : own[d];
  return strides;
}

template <Function f, typename T>
class BinaryKernel final : public Kernel {
 public:
  explicit BinaryKernel(const Site& site) {
    const auto& out = site.out[0];
    const auto& shape = out.type.shape;
    outer_ = nest<3>(shape, out.order, {broadcast_strides(site.in[0], shape), broadcast_strides(site.in[1], shape), graph::strides_of(shape, out.order)});
    inner_ = outer_.back();
    outer_.pop_back();
    for (const auto& loop : outer_) rows_ *= loop.size;
    if (numel(shape) == 0) rows_ = 0;
    pieces_ = std::max<std::int64_t>(1, inner_.size / kGrain);
  }
  void run(std::span<const void* const> in, std::span<void* const> out, void*) override {
    const auto *a = static_cast<const T*>(in[0]), *b = static_cast<const T*>(in[1]);
    auto* y = static_cast<T*>(out[0]);
    parallel(rows_ * pieces_, row_grain(inner_.size / pieces_), [&](std::int64_t begin, std::int64_t end, int) {
      for (std::int64_t i = begin; i < end; ++i) {
        std::int64_t at[3] = {}, rest = i / pieces_;
        for (std::size_t l = outer_.size(); l-- > 0; rest /= outer_[l].size)
          for (int k = 0; k < 3; ++k) at[k] += rest % outer_[l].size * outer_[l].step[k];
        const auto lo = inner_.size * (i % pieces_) / pieces_, hi = inner_.size * (i % pieces_ + 1) / pieces_;
        const auto *s = inner_.step;
        row_of(f, a + at[0] + lo * s[0], s[0], b + at[1] + lo * s[1], s[1], y + at[2] + lo, hi - lo);
      }
    });
  }

 private:
  std::vector<Loop<3>> outer_;
  Loop<3> inner_;  ///< contiguous in the output, which is dense
  std::int64_t rows_ = 1, pieces_ = 1;
};

template <Function f>
std::unique_ptr<Kernel> make(const Site& site) {
  const auto dtype = site.in[0].type.dtype;
  expect_real(site, dtype);
  if (dtype == DType::bf16) return std::make_unique<BinaryKernel<f, Bf16>>(site);
  return std::make_unique<BinaryKernel<f, float>>(site);
}

const bool registered = register_kernel("add", {make<Function::add>}) && register_kernel("sub", {make<Function::sub>}) &&
                        register_kernel("mul", {make<Function::mul>}) && register_kernel("div", {make<Function::div>});

}  // namespace
}  // namespace comfytp::backend::cpu
