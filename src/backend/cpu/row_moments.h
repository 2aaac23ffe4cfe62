// Mean and squares of a row that lies in the cache: read twice, mean first, so that nothing cancels.
#pragma once

#include "backend/cpu/real.h"

namespace comfytp::backend::cpu {

/// The mean comes in two parts: `low` is what rounding took from the first.
template <typename T>
CTP_INLINE void moments(const T* x, std::int64_t count, float* mean, float* low, float* squares) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (std::int64_t i = 0; i < count; ++i) sum += load(x[i]);
  const float m = sum / static_cast<float>(count);
  float square_sum = 0, rest = 0;
#pragma omp simd reduction(+ : square_sum, rest)
  for (std::int64_t i = 0; i < count; ++i) {
    const float d = load(x[i]) - m;
    square_sum += d * d;
    rest += d;
  }
  *mean = m;
  *low = rest / static_cast<float>(count);
  *squares = square_sum - rest * rest / static_cast<float>(count);
}

template <typename T>
CTP_INLINE float mean_square(const T* x, std::int64_t count) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (std::int64_t i = 0; i < count; ++i) sum += load(x[i]) * load(x[i]);
  return sum / static_cast<float>(count);
}

}  // namespace comfytp::backend::cpu
