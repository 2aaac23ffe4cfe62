#include "backend/cuda/kernels/pointwise.h"

#include "backend/cuda/chain.cuh"

namespace comfytp::backend::cuda {
namespace {

constexpr int kThreads = 256;

// One pack a thread: what hides the memory's time is many threads, and so few registers.
template <typename T, int N, ChainKind KIND>
__global__ void __launch_bounds__(kThreads) pointwise(const __grid_constant__ Chain chain, const __grid_constant__ ChainOperands operands, const void* x,
                                                      bool x_wide, void* y, bool y_wide, unsigned packs) {
  const unsigned i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= packs) return;
  float v[1][N];
  load_floats<T, N>(x, std::int64_t{i} * N, KIND != ChainKind::plain && x_wide, v[0]);
  const bool there[1] = {true};
  apply_chain<T, N, 1, KIND>(chain, operands, PackIndex(chain, i * N), there, v);
  store_floats<T, N>(y, std::int64_t{i} * N, KIND != ChainKind::plain && y_wide, v[0]);
}

template <typename T, int N, ChainKind KIND>
void launch(const Chain& chain, const ChainOperands& operands, const void* x, bool x_wide, void* y, bool y_wide, std::int64_t count, cudaStream_t stream) {
  const auto packs = static_cast<unsigned>(count / N);
  pointwise<T, N, KIND><<<(packs + kThreads - 1) / kThreads, kThreads, 0, stream>>>(chain, operands, x, x_wide, y, y_wide, packs);
}

}  // namespace

cudaError_t launch_pointwise(const Chain& chain, const ChainOperands& operands, DType x_dtype, DType y_dtype, DType dtype, const void* x, void* y,
                             cudaStream_t stream) {
  std::int64_t count = 1;
  for (int d = 0; d < chain.dims; ++d) count *= chain.size[d];
  if (count == 0) return cudaSuccess;
  if (count >= std::int64_t{1} << 32) return cudaErrorInvalidValue;
  const bool x_wide = x_dtype == DType::f32, y_wide = y_dtype == DType::f32;
  const bool all_aligned = operands.aligned() && aligned(x) && aligned(y);
  const auto kind = chain.kind();
  const bool known = with_real(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int N = Pack<T>::size;
    const bool packs = all_aligned && chain.packs_of(N);
    if (packs && kind == ChainKind::plain && !x_wide && !y_wide)
      launch<T, N, ChainKind::plain>(chain, operands, x, x_wide, y, y_wide, count, stream);
    else if (packs && kind != ChainKind::any)
      launch<T, N, ChainKind::wide>(chain, operands, x, x_wide, y, y_wide, count, stream);
    else if (packs)
      launch<T, N, ChainKind::any>(chain, operands, x, x_wide, y, y_wide, count, stream);
    else if (chain.pairs())
      launch<T, 2, ChainKind::any>(chain, operands, x, x_wide, y, y_wide, count, stream);
    else
      launch<T, 1, ChainKind::any>(chain, operands, x, x_wide, y, y_wide, count, stream);
  });
  return known ? cudaGetLastError() : cudaErrorInvalidValue;
}

}  // namespace comfytp::backend::cuda
