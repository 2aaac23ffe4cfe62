// Elementwise ops of two or three operands with broadcasting: loops over the output as it lies in memory, neighbours merged.
#include <array>
#include <cmath>

#include "backend/cpu/copy_plan.h"
#include "backend/cpu/kernel_table.h"
#include "backend/cpu/parallel.h"
#include "backend/cpu/real.h"

namespace comfytp::backend::cpu {
namespace {

/// One run of the innermost loop; the output is dense there, an operand may be the output's own memory.
struct Row {
  std::array<const void*, 3> in;
  std::array<std::int64_t, 3> step;  ///< elements
  void* out;
  std::int64_t count;
  DType dtype;  ///< of the operands that are computed with
};
using RowFunction = void (*)(const Row& row);

// The cases that matter have loops of their own, so that they are vectorised.
template <typename T, typename Out, typename F>
CTP_INLINE void apply(const Row& r, F function) {
  const auto *a = static_cast<const T*>(r.in[0]), *b = static_cast<const T*>(r.in[1]);
  auto* y = static_cast<Out*>(r.out);
  const auto sa = r.step[0], sb = r.step[1], count = r.count;
  if (sa == 1 && sb == 1) {
#pragma omp simd
    for (std::int64_t i = 0; i < count; ++i) store(y + i, function(load(a[i]), load(b[i])));
  } else if (sa == 1 && sb == 0) {
    const float v = load(*b);
#pragma omp simd
    for (std::int64_t i = 0; i < count; ++i) store(y + i, function(load(a[i]), v));
  } else if (sa == 0 && sb == 1) {
    const float v = load(*a);
#pragma omp simd
    for (std::int64_t i = 0; i < count; ++i) store(y + i, function(v, load(b[i])));
  } else {
    for (std::int64_t i = 0; i < count; ++i) store(y + i, function(load(a[i * sa]), load(b[i * sb])));
  }
}

// Integers and bool, an element at a time.
template <typename F>
void apply_any(const Row& r, DType to, F function) {
  for (std::int64_t i = 0; i < r.count; ++i)
    store_element(
        r.out, to, i,
        static_cast<double>(function(load_element(r.in[0], r.dtype, i * r.step[0]), load_element(r.in[1], r.dtype, i * r.step[1]))));
}

#define COMFYTP_BINARY(NAME, OUT_F32, OUT_BF16, OUT_ANY, VALUE)                      \
  CTP_CLONES void NAME##_f32(const Row& row) {                                       \
    apply<float, OUT_F32>(                                                           \
        row, [](float a, float b) __attribute__((always_inline)) { return VALUE; }); \
  }                                                                                  \
  CTP_CLONES void NAME##_bf16(const Row& row) {                                      \
    apply<Bf16, OUT_BF16>(                                                           \
        row, [](float a, float b) __attribute__((always_inline)) { return VALUE; }); \
  }                                                                                  \
  void NAME##_any(const Row& row) {                                                  \
    apply_any(row, OUT_ANY, [](double a, double b) { return VALUE; });               \
  }
#define COMFYTP_ARITHMETIC(NAME, VALUE) COMFYTP_BINARY(NAME, float, Bf16, row.dtype, VALUE)
#define COMFYTP_COMPARISON(NAME, VALUE) COMFYTP_BINARY(NAME, std::uint8_t, std::uint8_t, DType::boolean, VALUE)
COMFYTP_ARITHMETIC(add, a + b)
COMFYTP_ARITHMETIC(sub, a - b)
COMFYTP_ARITHMETIC(mul, a* b)
COMFYTP_ARITHMETIC(div, a / b)
COMFYTP_ARITHMETIC(pow, std::pow(a, b))
COMFYTP_ARITHMETIC(maximum, a > b ? a : b)
COMFYTP_ARITHMETIC(minimum, a < b ? a : b)
COMFYTP_COMPARISON(equal, a == b)
COMFYTP_COMPARISON(not_equal, a != b)
COMFYTP_COMPARISON(less, a < b)
COMFYTP_COMPARISON(less_equal, a <= b)
COMFYTP_COMPARISON(greater, a > b)
COMFYTP_COMPARISON(greater_equal, a >= b)
#undef COMFYTP_COMPARISON
#undef COMFYTP_ARITHMETIC
#undef COMFYTP_BINARY

template <typename T>
void where_row(const Row& r) {
  const auto* condition = static_cast<const std::uint8_t*>(r.in[0]);
  const auto *a = static_cast<const T*>(r.in[1]), *b = static_cast<const T*>(r.in[2]);
  auto* y = static_cast<T*>(r.out);
  for (std::int64_t i = 0; i < r.count; ++i) y[i] = condition[i * r.step[0]] ? a[i * r.step[1]] : b[i * r.step[2]];
}

// Strides of an operand along the output's dimensions: 0 where it is broadcast.
Shape broadcast_strides(const Operand& operand, const Shape& shape) {
  const Shape own = graph::strides_of(operand.type.shape, operand.order);
  const std::size_t skip = shape.size() - own.size();
  Shape strides(shape.size(), 0);
  for (std::size_t d = 0; d < own.size(); ++d) strides[d + skip] = operand.type.shape[d] == 1 ? 0 : own[d];
  return strides;
}

class BroadcastingKernel final : public Kernel {
 public:
  BroadcastingKernel(const Site& site, RowFunction function) : function_(function), dtype_(site.in.back().type.dtype) {
    const auto& out = site.out[0];
    const auto& shape = out.type.shape;
    Shape strides[4];
    for (std::size_t i = 0; i < 3; ++i) {
      const auto& in = site.in[std::min(i, site.in.size() - 1)];  // an op of two operands has a third that nothing reads
      strides[i] = broadcast_strides(in, shape);
      element_[i] = size_of(in.type.dtype);
    }
    strides[3] = graph::strides_of(shape, out.order);
    element_[3] = size_of(out.type.dtype);
    outer_ = nest<4>(shape, out.order, strides);
    inner_ = outer_.back();
    outer_.pop_back();
    for (const auto& loop : outer_) rows_ *= loop.size;
    if (numel(shape) == 0) rows_ = 0;
    pieces_ = std::max<std::int64_t>(1, inner_.size / kGrain);
  }
  void run(std::span<const void* const> in, std::span<void* const> out, void*) override {
    parallel(rows_ * pieces_, row_grain(inner_.size / pieces_), [&](std::int64_t begin, std::int64_t end, int) {
      for (std::int64_t i = begin; i < end; ++i) {
        const auto lo = inner_.size * (i % pieces_) / pieces_, hi = inner_.size * (i % pieces_ + 1) / pieces_;
        std::int64_t at[4], rest = i / pieces_;
        for (int k = 0; k < 4; ++k) at[k] = lo * inner_.step[k];
        for (std::size_t l = outer_.size(); l-- > 0; rest /= outer_[l].size)
          for (int k = 0; k < 4; ++k) at[k] += rest % outer_[l].size * outer_[l].step[k];
        Row row{{}, {}, static_cast<char*>(out[0]) + at[3] * element_[3], hi - lo, dtype_};
        for (std::size_t k = 0; k < in.size(); ++k) {
          row.in[k] = static_cast<const char*>(in[k]) + at[k] * element_[k];
          row.step[k] = inner_.step[k];
        }
        function_(row);
      }
    });
  }

 private:
  RowFunction function_;
  DType dtype_;
  std::vector<Loop<4>> outer_;
  Loop<4> inner_;  ///< contiguous in the output, which is dense
  std::int64_t rows_ = 1, pieces_ = 1;
  std::int64_t element_[4];
};

template <RowFunction kF32, RowFunction kBf16, RowFunction kAny>
std::unique_ptr<Kernel> make(const Site& site) {
  const auto dtype = site.in[0].type.dtype;
  if (is_float(dtype)) expect_real(site, dtype);
  return std::make_unique<BroadcastingKernel>(site, dtype == DType::f32 ? kF32 : dtype == DType::bf16 ? kBf16 : kAny);
}

std::unique_ptr<Kernel> make_where(const Site& site) {
  const int element = size_of(site.in[1].type.dtype);
  return std::make_unique<BroadcastingKernel>(site, element == 1   ? where_row<std::uint8_t>
                                                    : element == 2 ? where_row<std::uint16_t>
                                                    : element == 4 ? where_row<std::uint32_t>
                                                                   : where_row<std::uint64_t>);
}

#define COMFYTP_REGISTER(NAME) register_kernel(#NAME, {make<NAME##_f32, NAME##_bf16, NAME##_any>})
const bool registered = COMFYTP_REGISTER(add) && COMFYTP_REGISTER(sub) && COMFYTP_REGISTER(mul) && COMFYTP_REGISTER(div) &&
                        COMFYTP_REGISTER(pow) && COMFYTP_REGISTER(maximum) && COMFYTP_REGISTER(minimum) && COMFYTP_REGISTER(equal) &&
                        COMFYTP_REGISTER(not_equal) && COMFYTP_REGISTER(less) && COMFYTP_REGISTER(less_equal) &&
                        COMFYTP_REGISTER(greater) && COMFYTP_REGISTER(greater_equal) && register_kernel("where", {make_where});

}  // namespace
}  // namespace comfytp::backend::cpu
