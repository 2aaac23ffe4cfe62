// sum and amax over any dimensions, softmax over one, in whatever order the tensor lies.
#include <array>
#include <cmath>
#include <limits>

#include "backend/cpu/copy_plan.h"
#include "backend/cpu/kernel_table.h"
#include "backend/cpu/parallel.h"
#include "backend/cpu/real.h"

namespace comfytp::backend::cpu {
namespace {

constexpr std::int64_t kColumns = 64;  ///< neighbours that are reduced side by side

struct Sum {
  static constexpr double kStart = 0;
  CTP_INLINE double join(double a, double b) { return a + b; }
};
struct Max {
  static constexpr double kStart = -std::numeric_limits<double>::infinity();
  CTP_INLINE double join(double a, double b) { return a > b || a != a ? a : b; }
};

// total[c] joined with x[c * step].
template <typename R, typename T>
CTP_INLINE void join_columns(const void* x, std::int64_t step, double* total, std::int64_t columns) {
  const auto* from = static_cast<const T*>(x);
  if (step == 1)
    for (std::int64_t c = 0; c < columns; ++c) total[c] = R::join(total[c], load(from[c]));
  else
    for (std::int64_t c = 0; c < columns; ++c) total[c] = R::join(total[c], load(from[c * step]));
}
using JoinColumns = void (*)(const void* x, std::int64_t step, double* total, std::int64_t columns, DType dtype);
CTP_CLONES void sum_f32(const void* x, std::int64_t step, double* total, std::int64_t columns, DType) {
  join_columns<Sum, float>(x, step, total, columns);
}
CTP_CLONES void sum_bf16(const void* x, std::int64_t step, double* total, std::int64_t columns, DType) {
  join_columns<Sum, Bf16>(x, step, total, columns);
}
CTP_CLONES void max_f32(const void* x, std::int64_t step, double* total, std::int64_t columns, DType) {
  join_columns<Max, float>(x, step, total, columns);
}
CTP_CLONES void max_bf16(const void* x, std::int64_t step, double* total, std::int64_t columns, DType) {
  join_columns<Max, Bf16>(x, step, total, columns);
}
template <typename R>
void join_any(const void* x, std::int64_t step, double* total, std::int64_t columns, DType dtype) {
  for (std::int64_t c = 0; c < columns; ++c) total[c] = R::join(total[c], load_element(x, dtype, c * step));
}

// The kept dimensions are walked in the output's order, kColumns neighbours at a time, and for each of them the reduced
// ones. Where the innermost dimension is reduced, its elements take the place of the neighbours and are joined at the end.
template <typename R>
class ReduceKernel final : public Kernel {
 public:
  ReduceKernel(const Site& site, JoinColumns join) : join_(join), dtype_(site.in[0].type.dtype) {
    const auto &in = site.in[0], &out = site.out[0];
    const Shape from = graph::strides_of(in.type.shape, in.order), to = graph::strides_of(out.type.shape, out.order);
    const Shape& kept = out.type.shape;
    Shape gone(kept.size(), 1);
    for (auto d : site.attrs().ints("dims")) gone[static_cast<std::size_t>(d)] = in.type.shape[static_cast<std::size_t>(d)];
    kept_ = nest<2>(kept, in.order, {from, to});
    gone_ = nest<2>(gone, in.order, {from, from});
    inner_gone_ = gone_.back().step[0] == 1 && gone_.back().size > 1;
    if (inner_gone_) {
      run_ = gone_.back();
      gone_.pop_back();
    } else {
      run_ = kept_.back();
      kept_.pop_back();
    }
    for (const auto& l : kept_) kept_size_ *= l.size;
    for (const auto& l : gone_) gone_size_ *= l.size;
    empty_ = numel(kept) == 0;
  }
  void run(std::span<const void* const> in, std::span<void* const> out, void*) override {
    if (empty_) return;
    const auto* x = static_cast<const char*>(in[0]);
    const auto pieces = inner_gone_ ? 1 : (run_.size + kColumns - 1) / kColumns;
    parallel(kept_size_ * pieces, row_grain(gone_size_ * (inner_gone_ ? run_.size : kColumns)),
             [&](std::int64_t begin, std::int64_t end, int) {
               for (std::int64_t i = begin; i < end; ++i) {
                 const auto at = place(kept_, i / pieces);
                 double total[kColumns];
                 std::fill_n(total, kColumns, R::kStart);
                 if (inner_gone_) {
                   for (std::int64_t g = 0; g < gone_size_; ++g)
                     for (std::int64_t first = 0; first < run_.size; first += kColumns)
                       join(x, at[0] + place(gone_, g)[0] + first, 1, total, std::min(kColumns, run_.size - first));
                   for (std::int64_t c = 1; c < kColumns; ++c) total[0] = R::join(total[0], total[c]);
                   store_element(out[0], dtype_, at[1], total[0]);
                 } else {
                   const auto first = i % pieces * kColumns, count = std::min(kColumns, run_.size - first);
                   for (std::int64_t g = 0; g < gone_size_; ++g)
                     join(x, at[0] + place(gone_, g)[0] + first * run_.step[0], run_.step[0], total, count);
                   for (std::int64_t c = 0; c < count; ++c) store_element(out[0], dtype_, at[1] + (first + c) * run_.step[1], total[c]);
                 }
               }
             });
  }

 private:
  void join(const char* x, std::int64_t at, std::int64_t step, double* total, std::int64_t count) const {
    join_(x + at * size_of(dtype_), step, total, count, dtype_);
  }
  static std::array<std::int64_t, 2> place(const std::vector<Loop<2>>& loops, std::int64_t index) {
    std::array<std::int64_t, 2> at = {};
    for (std::size_t l = loops.size(); l-- > 0; index /= loops[l].size)
      for (std::size_t k = 0; k < 2; ++k) at[k] += index % loops[l].size * loops[l].step[k];
    return at;
  }

  JoinColumns join_;
  DType dtype_;
  std::vector<Loop<2>> kept_, gone_;
  Loop<2> run_;  ///< the innermost loop, of either kind
  bool inner_gone_ = false, empty_ = false;
  std::int64_t kept_size_ = 1, gone_size_ = 1;
};

// Rows of one softmax lie `inner` apart; `columns` of them side by side are done together.
template <typename T>
CTP_INLINE void soften(const T* x, T* y, std::int64_t size, std::int64_t inner, std::int64_t columns) {
  float top[kColumns], sum[kColumns];
  for (std::int64_t c = 0; c < columns; ++c) top[c] = -std::numeric_limits<float>::infinity(), sum[c] = 0;
  for (std::int64_t i = 0; i < size; ++i)
    for (std::int64_t c = 0; c < columns; ++c) {
      const float v = load(x[i * inner + c]);
      top[c] = v > top[c] ? v : top[c];
    }
  for (std::int64_t i = 0; i < size; ++i)
    for (std::int64_t c = 0; c < columns; ++c) sum[c] += exp_of(load(x[i * inner + c]) - top[c]);
  for (std::int64_t i = 0; i < size; ++i)
#pragma omp simd
    for (std::int64_t c = 0; c < columns; ++c) store(y + i * inner + c, exp_of(load(x[i * inner + c]) - top[c]) / sum[c]);
}
template <typename T>
CTP_INLINE void soften_row(const T* x, T* y, std::int64_t size) {
  float top = -std::numeric_limits<float>::infinity(), sum = 0;
#pragma omp simd reduction(max : top)
  for (std::int64_t i = 0; i < size; ++i) top = load(x[i]) > top ? load(x[i]) : top;
#pragma omp simd reduction(+ : sum)
  for (std::int64_t i = 0; i < size; ++i) sum += exp_of(load(x[i]) - top);
#pragma omp simd
  for (std::int64_t i = 0; i < size; ++i) store(y + i, exp_of(load(x[i]) - top) / sum);
}
CTP_CLONES void soften_of(const float* x, float* y, std::int64_t size, std::int64_t inner, std::int64_t columns) {
  if (inner == 1)
    soften_row(x, y, size);
  else
    soften(x, y, size, inner, columns);
}
CTP_CLONES void soften_of(const Bf16* x, Bf16* y, std::int64_t size, std::int64_t inner, std::int64_t columns) {
  if (inner == 1)
    soften_row(x, y, size);
  else
    soften(x, y, size, inner, columns);
}

template <typename T>
class SoftmaxKernel final : public Kernel {
 public:
  explicit SoftmaxKernel(const Site& site) {
    const auto& in = site.in[0];
    const auto dim = static_cast<std::size_t>(site.attrs().integer("dim"));
    size_ = in.type.shape[dim];
    inner_ = graph::strides_of(in.type.shape, in.order)[dim];
    outer_ = size_ && inner_ ? numel(in.type.shape) / (size_ * inner_) : 0;
  }
  void run(std::span<const void* const> in, std::span<void* const> out, void*) override {
    const auto* x = static_cast<const T*>(in[0]);
    auto* y = static_cast<T*>(out[0]);
    const auto pieces = (inner_ + kColumns - 1) / kColumns;
    parallel(outer_ * pieces, row_grain(size_ * std::min(kColumns, inner_)), [&](std::int64_t begin, std::int64_t end, int) {
      for (std::int64_t i = begin; i < end; ++i) {
        const auto first = i % pieces * kColumns, at = i / pieces * size_ * inner_ + first;
        soften_of(x + at, y + at, size_, inner_, std::min(kColumns, inner_ - first));
      }
    });
  }

 private:
  std::int64_t size_, inner_, outer_;
};

template <typename R, JoinColumns kF32, JoinColumns kBf16>
std::unique_ptr<Kernel> make_reduce(const Site& site) {
  const auto dtype = site.in[0].type.dtype;
  if (is_float(dtype)) expect_real(site, dtype);
  return std::make_unique<ReduceKernel<R>>(site, dtype == DType::f32 ? kF32 : dtype == DType::bf16 ? kBf16 : join_any<R>);
}

std::unique_ptr<Kernel> make_softmax(const Site& site) {
  const auto dtype = site.in[0].type.dtype;
  expect_real(site, dtype);
  if (dtype == DType::bf16) return std::make_unique<SoftmaxKernel<Bf16>>(site);
  return std::make_unique<SoftmaxKernel<float>>(site);
}

const bool registered = register_kernel("sum", {make_reduce<Sum, sum_f32, sum_bf16>}) &&
                        register_kernel("amax", {make_reduce<Max, max_f32, max_bf16>}) && register_kernel("softmax", {make_softmax});

}  // namespace
}  // namespace comfytp::backend::cpu
