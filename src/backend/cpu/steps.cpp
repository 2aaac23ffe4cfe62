#include "backend/cpu/steps.h"

#include <map>

#include "backend/cpu/real.h"
#include "base/error.h"

namespace comfytp::backend::cpu {
namespace {

CTP_CLONES void load_bf16(const Bf16* x, float* row, std::int64_t count) {
#pragma omp simd
  for (std::int64_t i = 0; i < count; ++i) row[i] = load(x[i]);
}
CTP_CLONES void store_bf16(const float* row, Bf16* y, std::int64_t count) {
#pragma omp simd
  for (std::int64_t i = 0; i < count; ++i) store(y + i, row[i]);
}

template <typename T, typename F>
CTP_INLINE void combine(float* y, const void* operand, std::int64_t stride, std::int64_t count, F function) {
  const auto* x = static_cast<const T*>(operand);
  if (stride == 1) {
#pragma omp simd
    for (std::int64_t i = 0; i < count; ++i) y[i] = function(y[i], load(x[i]));
  } else if (stride == 0) {
    const float v = load(*x);
#pragma omp simd
    for (std::int64_t i = 0; i < count; ++i) y[i] = function(y[i], v);
  } else {
    for (std::int64_t i = 0; i < count; ++i) y[i] = function(y[i], load(x[i * stride]));
  }
}

// A step vectorised for each instruction set; VALUE is an expression of the floats v and x.
#define COMFYTP_BINARY(NAME, VALUE)                                                               \
  CTP_CLONES void NAME##_f32(float* y, const void* o, std::int64_t stride, std::int64_t count) {  \
    combine<float>(                                                                               \
        y, o, stride, count, [](float v, float x) __attribute__((always_inline)) { return VALUE; }); \
  }                                                                                               \
  CTP_CLONES void NAME##_bf16(float* y, const void* o, std::int64_t stride, std::int64_t count) { \
    combine<Bf16>(                                                                                \
        y, o, stride, count, [](float v, float x) __attribute__((always_inline)) { return VALUE; }); \
  }
#define COMFYTP_UNARY(NAME, VALUE)                                                      \
  CTP_CLONES void NAME(float* y, const void*, std::int64_t, std::int64_t count) {       \
    _Pragma("omp simd") for (std::int64_t i = 0; i < count; ++i) {                      \
      const float v = y[i];                                                             \
      y[i] = VALUE;                                                                     \
    }                                                                                   \
  }
COMFYTP_BINARY(add, v + x)
COMFYTP_BINARY(mul, v* x)
COMFYTP_BINARY(add_one_mul, v*(1.0f + x))
COMFYTP_UNARY(silu, silu_of(v))
COMFYTP_UNARY(gelu, gelu_of(v))
COMFYTP_UNARY(gelu_tanh, gelu_tanh_of(v))
COMFYTP_UNARY(sigmoid, sigmoid_of(v))
COMFYTP_UNARY(tanh, tanh_of(v))
COMFYTP_UNARY(relu, v < 0 ? 0.0f : v)
#undef COMFYTP_UNARY
#undef COMFYTP_BINARY

// By dimension of the value: 0 where the operand is broadcast.
Shape strides_along(const Operand& operand, const Shape& shape, bool bias, std::size_t channel) {
  Shape strides(shape.size(), 0);
  if (bias) {
    strides[channel] = 1;
    return strides;
  }
  const Shape own = graph::strides_of(operand.type.shape, operand.order);
  for (std::size_t d = 0; d < shape.size(); ++d)
    if (operand.type.shape[d] != 1) strides[d] = own[d];
  return strides;
}

}  // namespace

void load_row(const void* x, DType dtype, float* row, std::int64_t count) {
  if (dtype == DType::bf16)
    load_bf16(static_cast<const Bf16*>(x), row, count);
  else
    std::copy_n(static_cast<const float*>(x), count, row);
}

void store_row(const float* row, DType dtype, void* y, std::int64_t count) {
  if (dtype == DType::bf16)
    store_bf16(row, static_cast<Bf16*>(y), count);
  else
    std::copy_n(row, count, static_cast<float*>(y));
}

StepFunction step_function(std::string_view step, DType dtype) {
  static const std::map<std::string_view, std::pair<StepFunction, StepFunction>> functions = {
      {"bias", {add_f32, add_bf16}},
      {"add", {add_f32, add_bf16}},
      {"mul", {mul_f32, mul_bf16}},
      {"add_one_mul", {add_one_mul_f32, add_one_mul_bf16}},
      {"silu", {silu, silu}},
      {"gelu", {gelu, gelu}},
      {"gelu_tanh", {gelu_tanh, gelu_tanh}},
      {"sigmoid", {sigmoid, sigmoid}},
      {"tanh", {tanh, tanh}},
      {"relu", {relu, relu}},
  };
  const auto it = functions.find(step);
  require(it != functions.end(), "[steps] expected a known step but got '{}'", step);
  return dtype == DType::bf16 ? it->second.second : it->second.first;
}

StepChain::StepChain(std::string_view steps, const Operand& value, std::span<const Operand> operands, std::size_t channel, Rows rows) {
  const Shape& shape = value.type.shape;
  Shape strides[1 + kMostOperands];
  for (auto& s : strides) s = Shape(shape.size(), 0);
  strides[0] = graph::strides_of(shape, value.order);
  std::size_t next = 0;
  for (const auto& name : graph::steps_of(steps)) {
    const auto takes = graph::operands_of(name);
    const DType dtype = takes ? operands[next].type.dtype : DType::f32;
    const bool rope = name == "rope";
    steps_.push_back({rope ? nullptr : step_function(name, dtype), takes ? static_cast<int>(next) : -1,
                      rope && operands[next].type.shape.back() != shape.back(), dtype});
    for (std::size_t k = 0; k < takes; ++k, ++next) {
      strides[1 + next] = strides_along(operands[next], shape, name == "bias", channel);
      if (steps_.back().halved) strides[1 + next].back() = 0;  // its rows are told apart by apply()
      element_.push_back(size_of(operands[next].type.dtype));
    }
  }
  if (rows == Rows::innermost) {
    const graph::Order outside(value.order.begin(), value.order.end() - 1);
    outer_ = nest<1 + kMostOperands>(shape, outside, strides);
    const auto last = static_cast<std::size_t>(value.order.back());
    inner_.size = shape[last];
    for (std::size_t k = 0; k < std::size(strides); ++k) inner_.step[k] = strides[k][last];
  } else {
    outer_ = nest<1 + kMostOperands>(shape, value.order, strides);
    inner_ = outer_.back();
    outer_.pop_back();
  }
  for (const auto& loop : outer_) rows_ *= loop.size;
  if (numel(shape) == 0) rows_ = 0;
}

void StepChain::apply(std::int64_t row, std::int64_t begin, std::int64_t count, const void* const* operands, float* y) const {
  std::int64_t at[kMostOperands];
  for (std::size_t k = 0; k < element_.size(); ++k) at[k] = begin * inner_.step[1 + k];
  for (std::size_t l = outer_.size(); l-- > 0; row /= outer_[l].size)
    for (std::size_t k = 0; k < element_.size(); ++k) at[k] += row % outer_[l].size * outer_[l].step[1 + k];
  for (const auto& step : steps_) {
    const auto k = static_cast<std::size_t>(step.operand);
    const auto operand = [&](std::size_t o) { return static_cast<const char*>(operands[o]) + at[o] * element_[o]; };
    if (!step.function)
      turn(step, operand(k), operand(k + 1), begin, count, y);
    else if (step.operand < 0)
      step.function(y, nullptr, 0, count);
    else
      step.function(y, operand(k), inner_.step[1 + k], count);
  }
}

// Pieces of rows begin at even elements.
void StepChain::turn(const Step& step, const char* cosines, const char* sines, std::int64_t begin, std::int64_t count, float* y) {
  const auto angle = [&](const char* table, std::int64_t i) {
    if (step.halved) i = (begin + i) / 2;
    return step.dtype == DType::bf16 ? load(reinterpret_cast<const Bf16*>(table)[i]) : reinterpret_cast<const float*>(table)[i];
  };
  for (std::int64_t i = 0; i + 1 < count; i += 2) {
    const float x0 = y[i], x1 = y[i + 1];
    y[i] = x0 * angle(cosines, i) - x1 * angle(sines, i);
    y[i + 1] = x1 * angle(cosines, i + 1) + x0 * angle(sines, i + 1);
  }
}

}  // namespace comfytp::backend::cpu
