// Elementwise functions of one operand: one pass over memory, in place where the lowering wants it.
#include <cmath>

#include "backend/cpu/kernel_table.h"
#include "backend/cpu/parallel.h"
#include "backend/cpu/real.h"

namespace comfytp::backend::cpu {
namespace {

using Map = void (*)(const void* x, void* y, std::int64_t count, DType dtype);

template <typename T, typename F>
CTP_INLINE void map(const void* x, void* y, std::int64_t count, F function) {
  const auto* from = static_cast<const T*>(x);
  auto* to = static_cast<T*>(y);
#pragma omp simd
  for (std::int64_t i = 0; i < count; ++i) store(to + i, function(load(from[i])));
}

// A function as its kernel, vectorised for each instruction set; VALUE is an expression of the float v.
#define COMFYTP_UNARY(NAME, VALUE)                                                  \
  CTP_CLONES void NAME##_f32(const void* x, void* y, std::int64_t count, DType) {   \
    map<float>(                                                                     \
        x, y, count, [](float v) __attribute__((always_inline)) { return VALUE; }); \
  }                                                                                 \
  CTP_CLONES void NAME##_bf16(const void* x, void* y, std::int64_t count, DType) {  \
    map<Bf16>(                                                                      \
        x, y, count, [](float v) __attribute__((always_inline)) { return VALUE; }); \
  }
COMFYTP_UNARY(silu, silu_of(v))
COMFYTP_UNARY(gelu, gelu_of(v))
COMFYTP_UNARY(gelu_tanh, gelu_tanh_of(v))
COMFYTP_UNARY(sigmoid, sigmoid_of(v))
COMFYTP_UNARY(tanh, tanh_of(v))
COMFYTP_UNARY(exp, std::exp(v))
COMFYTP_UNARY(log, std::log(v))
COMFYTP_UNARY(sin, std::sin(v))
COMFYTP_UNARY(cos, std::cos(v))
COMFYTP_UNARY(relu, v < 0 ? 0.0f : v)
COMFYTP_UNARY(sqrt, std::sqrt(v))
COMFYTP_UNARY(rsqrt, 1.0f / std::sqrt(v))
COMFYTP_UNARY(abs, std::fabs(v))
COMFYTP_UNARY(neg, -v)
COMFYTP_UNARY(logical_not, v == 0 ? 1.0f : 0.0f)
#undef COMFYTP_UNARY

// Integers and bool, an element at a time.
template <double (*kFunction)(double)>
void any(const void* x, void* y, std::int64_t count, DType dtype) {
  for (std::int64_t i = 0; i < count; ++i) store_element(y, dtype, i, kFunction(load_element(x, dtype, i)));
}
double relu_any(double v) { return v > 0 ? v : 0; }
double abs_any(double v) { return std::abs(v); }
double neg_any(double v) { return -v; }
double logical_not_any(double v) { return v == 0 ? 1 : 0; }

class UnaryKernel final : public Kernel {
 public:
  UnaryKernel(Map map, std::int64_t count, DType dtype) : map_(map), count_(count), dtype_(dtype) {}
  void run(std::span<const void* const> in, std::span<void* const> out, void*) override {
    const auto* x = static_cast<const char*>(in[0]);
    auto* y = static_cast<char*>(out[0]);
    const auto element = size_of(dtype_);
    parallel(count_, kGrain,
             [&](std::int64_t begin, std::int64_t end, int) { map_(x + begin * element, y + begin * element, end - begin, dtype_); });
  }

 private:
  Map map_;
  std::int64_t count_;
  DType dtype_;
};

template <Map kF32, Map kBf16>
std::unique_ptr<Kernel> make(const Site& site) {
  const auto dtype = site.in[0].type.dtype;
  expect_real(site, dtype);
  return std::make_unique<UnaryKernel>(dtype == DType::f32 ? kF32 : kBf16, numel(site.shape(0)), dtype);
}

template <Map kF32, Map kBf16, Map kAny>
std::unique_ptr<Kernel> make_any(const Site& site) {
  const auto dtype = site.in[0].type.dtype;
  if (is_float(dtype)) return make<kF32, kBf16>(site);
  return std::make_unique<UnaryKernel>(kAny, numel(site.shape(0)), dtype);
}

const bool registered =
    register_kernel("silu", {make<silu_f32, silu_bf16>}) && register_kernel("gelu", {make<gelu_f32, gelu_bf16>}) &&
    register_kernel("gelu_tanh", {make<gelu_tanh_f32, gelu_tanh_bf16>}) && register_kernel("sigmoid", {make<sigmoid_f32, sigmoid_bf16>}) &&
    register_kernel("tanh", {make<tanh_f32, tanh_bf16>}) && register_kernel("exp", {make<exp_f32, exp_bf16>}) &&
    register_kernel("log", {make<log_f32, log_bf16>}) && register_kernel("sin", {make<sin_f32, sin_bf16>}) &&
    register_kernel("cos", {make<cos_f32, cos_bf16>}) && register_kernel("sqrt", {make<sqrt_f32, sqrt_bf16>}) &&
    register_kernel("rsqrt", {make<rsqrt_f32, rsqrt_bf16>}) && register_kernel("relu", {make_any<relu_f32, relu_bf16, any<relu_any>>}) &&
    register_kernel("abs", {make_any<abs_f32, abs_bf16, any<abs_any>>}) &&
    register_kernel("neg", {make_any<neg_f32, neg_bf16, any<neg_any>>}) &&
    register_kernel("logical_not", {make_any<logical_not_f32, logical_not_bf16, any<logical_not_any>>});

}  // namespace
}  // namespace comfytp::backend::cpu
