// silu, gelu, sin, cos: one pass over memory, in place where the lowering wants it.
#include "backend/cpu/kernel_table.h"
#include "backend/cpu/parallel.h"
#include "backend/cpu/real.h"

namespace comfytp::backend::cpu {
namespace {

enum class Function { silu, gelu, sin, cos };

template <Function f, typename T>
CTP_INLINE void map(const T* x, T* y, std::int64_t count) {
#pragma omp simd
  for (std::int64_t i = 0; i < count; ++i) {
    const float v = load(x[i]);
    if constexpr (f == Function::silu) store(y + i, silu_of(v));
    if constexpr (f == Function::gelu) store(y + i, gelu_of(v));
    if constexpr (f == Function::sin) store(y + i, std::sin(v));
    if constexpr (f == Function::cos) store(y + i, std::cos(v));
  }
}

CTP_CLONES void silu_f32(const float* x, float* y, std::int64_t count) { map<Function::silu>(x, y, count); }
CTP_CLONES void silu_bf16(const Bf16* x, Bf16* y, std::int64_t count) { map<Function::silu>(x, y, count); }
CTP_CLONES void gelu_f32(const float* x, float* y, std::int64_t count) { map<Function::gelu>(x, y, count); }
CTP_CLONES void gelu_bf16(const Bf16* x, Bf16* y, std::int64_t count) { map<Function::gelu>(x, y, count); }
void sin_f32(const float* x, float* y, std::int64_t count) { map<Function::sin>(x, y, count); }
void sin_bf16(const Bf16* x, Bf16* y, std::int64_t count) { map<Function::sin>(x, y, count); }
void cos_f32(const float* x, float* y, std::int64_t count) { map<Function::cos>(x, y, count); }
void cos_bf16(const Bf16* x, Bf16* y, std::int64_t count) { map<Function::cos>(x, y, count); }

template <typename T>
class UnaryKernel final : public Kernel {
 public:
  using Map = void (*)(const T*, T*, std::int64_t);
  UnaryKernel(Map map, std::int64_t count) : map_(map), count_(count) {}
  void run(std::span<const void* const> in, std::span<void* const> out, void*) override {
    const auto* x = static_cast<const T*>(in[0]);
    auto* y = static_cast<T*>(out[0]);
    parallel(count_, kGrain, [&](std::int64_t begin, std::int64_t end, int) { map_(x + begin, y + begin, end - begin); });
  }

 private:
  Map map_;
  std::int64_t count_;
};

template <void (*kF32)(const float*, float*, std::int64_t), void (*kBf16)(const Bf16*, Bf16*, std::int64_t)>
std::unique_ptr<Kernel> make(const Site& site) {
  const auto dtype = site.in[0].type.dtype;
  expect_real(site, dtype);
  const auto count = numel(site.shape(0));
  if (dtype == DType::bf16) return std::make_unique<UnaryKernel<Bf16>>(kBf16, count);
  return std::make_unique<UnaryKernel<float>>(kF32, count);
}

const bool registered = register_kernel("silu", {make<silu_f32, silu_bf16>}) && register_kernel("gelu", {make<gelu_f32, gelu_bf16>}) &&
                        register_kernel("sin", {make<sin_f32, sin_bf16>}) && register_kernel("cos", {make<cos_f32, cos_bf16>});

}  // namespace
}  // namespace comfytp::backend::cpu
