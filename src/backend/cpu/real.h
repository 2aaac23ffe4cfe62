// Elements of the dtypes that kernels compute in, and functions of them that the compiler can vectorise.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

#include "base/dtype.h"
#include "base/simd.h"

namespace comfytp::backend::cpu {

struct Bf16 {
  std::uint16_t bits;
};

CTP_INLINE float load(float v) { return v; }
CTP_INLINE float load(Bf16 v) { return std::bit_cast<float>(std::uint32_t{v.bits} << 16); }
CTP_INLINE void store(float* p, float v) { *p = v; }
CTP_INLINE void store(Bf16* p, float v) {
  const auto u = std::bit_cast<std::uint32_t>(v);
  const std::uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16, quiet = (u >> 16) | 0x40u;
  p->bits = static_cast<std::uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
}
CTP_INLINE void store(std::uint8_t* p, bool v) { *p = v; }

/// e^x within 2 units in the last place; inputs are clamped to [-87, 88].
CTP_INLINE float exp_of(float x) {
  x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const float shifted = x * 1.44269504f + kMagic;
  const float n = shifted - kMagic;
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;  // ln 2 in two parts, so that n * the first is exact
  float p = 1.0f / 5040;                                         // Taylor: |r| <= ln 2 / 2, the rest is below 1e-8
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return p * std::bit_cast<float>((std::bit_cast<std::uint32_t>(shifted) - std::bit_cast<std::uint32_t>(kMagic) + 127u) << 23);
}

CTP_INLINE float sigmoid_of(float x) { return 1.0f / (1.0f + exp_of(-x)); }
CTP_INLINE float silu_of(float x) { return x / (1.0f + exp_of(-x)); }

/// Near 0 from the series, since 1 - 2 / (e^2x + 1) would cancel.
CTP_INLINE float tanh_of(float x) {
  const float far = 1.0f - 2.0f / (exp_of(2.0f * x) + 1.0f), y = x * x;
  const float near = x * (1.0f + y * (-1.0f / 3 + y * (2.0f / 15 + y * (-17.0f / 315))));
  return y < 0.01f ? near : far;
}

/// x * Phi(x) with erf after Abramowitz & Stegun 7.1.26 (absolute error below 1.5e-7).
CTP_INLINE float gelu_of(float x) {
  const float z = std::fabs(x) * 0.70710678f;
  const float t = 1.0f / (1.0f + 0.3275911f * z);
  const float p = t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
  const float tail = 0.5f * p * exp_of(-z * z);  // Phi(-|x|)
  return x * (x < 0 ? tail : 1.0f - tail);
}
CTP_INLINE float gelu_tanh_of(float x) {
  return x * sigmoid_of(1.59576912f * (x + 0.044715f * x * x * x));
}  // (1 + tanh(z)) / 2 = sigmoid(2z)

}  // namespace comfytp::backend::cpu
