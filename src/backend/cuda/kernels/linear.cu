#include "backend/cuda/kernels/linear.h"

#include "backend/cuda/chain.cuh"

namespace comfytp::backend::cuda {
namespace {

// One warp an output; the rows' sums stand side by side in its registers.
template <typename T, int ROWS>
__global__ void __launch_bounds__(256) few_rows(int rows, int inner, std::int64_t outputs, const T* x, const T* w, const __grid_constant__ Chain chain,
                                                const __grid_constant__ ChainOperands operands, T* y) {
  constexpr int N = Pack<T>::size;
  const std::int64_t o = blockIdx.x * std::int64_t{8} + threadIdx.x / 32;
  if (o >= outputs) return;
  const int lane = threadIdx.x % 32;
  float sum[ROWS] = {};
  const T* row = w + o * inner;
  for (int i = lane * N; i < inner; i += 32 * N) {
    float a[N], b[N];
    load_floats<T, N>(row + i, a);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      if (r >= rows) break;
      load_floats<T, N>(x + std::int64_t{r} * inner + i, b);
#pragma unroll
      for (int k = 0; k < N; ++k) sum[r] += a[k] * b[k];
    }
  }
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
#pragma unroll
    for (int k = 16; k > 0; k /= 2) sum[r] += __shfl_xor_sync(~0u, sum[r], k);
    if (r >= rows || lane != 0) continue;
    float v[1][1] = {{sum[r]}};
    const bool there[1] = {true};
    apply_chain<T, 1, 1, ChainKind::any>(chain, operands, PackIndex(chain, static_cast<unsigned>(r * outputs + o)), there, v);
    y[r * outputs + o] = from_float<T>(v[0][0]);
  }
}

}  // namespace

cudaError_t launch_few_rows(DType dtype, std::int64_t rows, std::int64_t inner, std::int64_t outputs, const void* x, const void* w, const Chain& chain,
                            const ChainOperands& operands, void* y, cudaStream_t stream) {
  if (rows == 0 || outputs == 0) return cudaSuccess;
  const auto blocks = static_cast<unsigned>((outputs + 7) / 8);
  const bool known = with_real(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto run = [&](auto kernel) {
      kernel<<<blocks, 256, 0, stream>>>(static_cast<int>(rows), static_cast<int>(inner), outputs, static_cast<const T*>(x), static_cast<const T*>(w), chain,
                                         operands, static_cast<T*>(y));
    };
    if (rows <= 2)
      run(few_rows<T, 2>);
    else
      run(few_rows<T, kFewRows>);
  });
  return known ? cudaGetLastError() : cudaErrorInvalidValue;
}

}  // namespace comfytp::backend::cuda
