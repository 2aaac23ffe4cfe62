#include "backend/cuda/kernels/group_norm.h"

#include <algorithm>

#include "backend/cuda/chain.cuh"
#include "backend/cuda/kernels/reduction.cuh"

namespace comfytp::backend::cuda {
namespace {

constexpr int kThreads = 256, kPerMultiprocessor = 4;

// A block sums one piece of a sample's rows over some of its groups: threads stand side by side along the channels, `lanes` rows at a
// time, each over its own channels, with kAhead rows in flight.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads) group_sums(const __grid_constant__ GroupNorm n, std::int64_t piece, const T* x, float* sums, float* shifts) {
  constexpr int kAhead = 4;
  extern __shared__ float2 cells[];  // [lanes][channels of the block]
  const std::int64_t sample = blockIdx.y, first = blockIdx.x * piece, last = min(first + piece, n.rows);
  const int group = static_cast<int>(n.channels / n.groups), channels = n.at_once * group, packs = channels / N;
  const int first_group = blockIdx.z * n.at_once;
  const int across = min(packs, kThreads), lanes = kThreads / across;
  const int lane = threadIdx.x / across, column = threadIdx.x % across;
  const T* origin = x + sample * n.rows * n.channels + std::int64_t{first_group} * group;
  const std::int64_t set = sample * n.groups + first_group;
  if (blockIdx.x == 0)
    for (int g = threadIdx.x; g < n.at_once; g += kThreads) shifts[set + g] = n.rows ? to_float(origin[g * group]) : 0.f;
  if (lane < lanes) {
    for (int pack = column; pack < packs; pack += across) {
      float shift[N], sum[N], squares[N];
#pragma unroll
      for (int i = 0; i < N; ++i) {
        shift[i] = n.rows ? to_float(origin[(pack * N + i) / group * group]) : 0.f;
        sum[i] = squares[i] = 0;
      }
      const std::int64_t step = n.channels * lanes;
      const T* p = origin + (first + lane) * n.channels + std::int64_t{pack} * N;
      std::int64_t row = first + lane;
      for (; row + (kAhead - 1) * lanes < last; row += kAhead * lanes, p += kAhead * step) {
        float v[kAhead][N];
#pragma unroll
        for (int a = 0; a < kAhead; ++a) load_floats<T, N>(p + a * step, v[a]);
#pragma unroll
        for (int a = 0; a < kAhead; ++a)
#pragma unroll
          for (int i = 0; i < N; ++i) {
            const float d = v[a][i] - shift[i];
            sum[i] += d;
            squares[i] += d * d;
          }
      }
      for (; row < last; row += lanes, p += step) {
        float v[N];
        load_floats<T, N>(p, v);
#pragma unroll
        for (int i = 0; i < N; ++i) {
          const float d = v[i] - shift[i];
          sum[i] += d;
          squares[i] += d * d;
        }
      }
#pragma unroll
      for (int i = 0; i < N; ++i) cells[lane * channels + pack * N + i] = {sum[i], squares[i]};
    }
  }
  __syncthreads();
  // A warp a group.
  const int count = lanes * group;
  for (int g = threadIdx.x / 32; g < n.at_once; g += kThreads / 32) {
    float sum = 0, squares = 0;
    for (int k = threadIdx.x % 32; k < count; k += 32) {
      const float2 cell = cells[(k / group) * channels + g * group + k % group];
      sum += cell.x;
      squares += cell.y;
    }
    sum = join_threads<32>(sum, static_cast<float*>(nullptr), Sum());
    squares = join_threads<32>(squares, static_cast<float*>(nullptr), Sum());
    if (threadIdx.x % 32 == 0) reinterpret_cast<float2*>(sums)[(set + g) * n.pieces + blockIdx.x] = {sum, squares};
  }
}

// Mean (from the shift) and mean square deviation of a group, by all lanes of a warp.
__device__ __forceinline__ float2 from_sums(const GroupNorm& n, const float* sums, std::int64_t set) {
  float sum = 0, squares = 0;
  for (int p = threadIdx.x % 32; p < n.pieces; p += 32) {
    const float2 piece = reinterpret_cast<const float2*>(sums)[set * n.pieces + p];
    sum += piece.x;
    squares += piece.y;
  }
  sum = join_threads<32>(sum, static_cast<float*>(nullptr), Sum());
  squares = join_threads<32>(squares, static_cast<float*>(nullptr), Sum());
  const float count = static_cast<float>(n.rows * (n.channels / n.groups));
  const float mean = count > 0 ? sum / count : 0.f;
  return {mean, count > 0 ? fmaxf(squares / count - mean * mean, 0.f) : 0.f};
}

// The same from the moments of parts (Chan et al. 1979).
__device__ __forceinline__ float2 from_moments(const GroupNorm& n, const float* moments, std::int64_t set) {
  float count = 0, mean = 0, squares = 0;
  for (int p = 0; p < n.parts; ++p) {
    const float* m = moments + (p * n.samples * n.groups + set) * 3;
    if (m[0] == 0) continue;
    const float total = count + m[0], delta = m[1] - mean;
    squares += m[2] + delta * delta * (count * m[0] / total);
    mean += delta * (m[0] / total);
    count = total;
  }
  return {mean, squares / count};
}

__global__ void group_moments(const __grid_constant__ GroupNorm n, const float* sums, const float* shifts, float* out) {
  const std::int64_t set = blockIdx.x * std::int64_t{blockDim.x / 32} + threadIdx.x / 32;
  if (set >= n.samples * n.groups) return;
  const float2 m = from_sums(n, sums, set);
  if (threadIdx.x % 32) return;
  const float count = static_cast<float>(n.rows * (n.channels / n.groups));
  out[set * 3] = count;
  out[set * 3 + 1] = shifts[set] + m.x;
  out[set * 3 + 2] = m.y * count;
}

template <typename T, int N>
__global__ void __launch_bounds__(kThreads, kPerMultiprocessor) group_norm(const __grid_constant__ GroupNorm n, std::int64_t piece, const T* x, const T* weight, const T* bias,
                                                       const float* statistics, const float* shifts, T* y) {
  constexpr int kAhead = 4;
  const int group = static_cast<int>(n.channels / n.groups), channels = n.at_once * group, first_group = blockIdx.z * n.at_once;
  extern __shared__ float shared[];  // of the block's groups: means, scales, shifts
  float *means = shared, *scales = means + n.at_once, *offsets = scales + n.at_once;
  const std::int64_t sample = blockIdx.y;
  for (int g = threadIdx.x / 32; g < n.at_once; g += kThreads / 32) {
    const std::int64_t set = sample * n.groups + first_group + g;
    const float2 m = shifts ? from_sums(n, statistics, set) : from_moments(n, statistics, set);
    if (threadIdx.x % 32 == 0) {
      // Differences from the shift, or from a mean that is given, are exact.
      means[g] = shifts ? m.x : 0.f;
      offsets[g] = shifts ? shifts[set] : m.x;
      scales[g] = rsqrtf(m.y + n.epsilon);
    }
  }
  __syncthreads();
  const int packs = channels / N, across = min(packs, kThreads), lanes = kThreads / across;
  const int lane = threadIdx.x / across, column = threadIdx.x % across;
  if (lane >= lanes) return;
  const std::int64_t first = blockIdx.x * piece, last = min(first + piece, n.rows), first_channel = std::int64_t{first_group} * group;
  const std::int64_t step = n.channels * lanes;
  for (int pack = column; pack < packs; pack += across) {
    // A thread keeps to its channels: what is done to them stays in registers.
    float factor[N], summand[N], origin[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int c = pack * N + i, g = c / group;
      factor[i] = scales[g] * to_float(weight[first_channel + c]);
      summand[i] = to_float(bias[first_channel + c]) - means[g] * factor[i];
      origin[i] = offsets[g];
    }
    const auto normed = [&](Elements<T, N> pack) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float v = (to_float(pack.v[i]) - origin[i]) * factor[i] + summand[i];
        pack.v[i] = from_float<T>(n.silu ? silu_of(v) : v);
      }
      return pack;
    };
    std::int64_t row = first + lane, at = (sample * n.rows + row) * n.channels + first_channel + pack * N;
    const auto in = [&](std::int64_t i) { return *reinterpret_cast<const Elements<T, N>*>(x + i); };
    const auto out = [&](std::int64_t i) -> Elements<T, N>& { return *reinterpret_cast<Elements<T, N>*>(y + i); };
    for (; row + (kAhead - 1) * lanes < last; row += kAhead * lanes, at += kAhead * step) {
      Elements<T, N> packs_ahead[kAhead];
#pragma unroll
      for (int a = 0; a < kAhead; ++a) packs_ahead[a] = in(at + a * step);
#pragma unroll
      for (int a = 0; a < kAhead; ++a) out(at + a * step) = normed(packs_ahead[a]);
    }
    for (; row < last; row += lanes, at += step) out(at) = normed(in(at));
  }
}

template <typename Kernel>
cudaError_t allow_shared(Kernel kernel, std::size_t bytes) {
  return bytes > 48 * 1024 ? cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)) : cudaSuccess;
}

template <typename Body>
cudaError_t with_packs(const GroupNorm& n, DType dtype, bool packs, const Body& body) {
  cudaError_t status = cudaErrorInvalidValue;
  with_real(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (packs && n.channels % Pack<T>::size == 0 && n.at_once * (n.channels / n.groups) % Pack<T>::size == 0)
      status = body(tag, std::integral_constant<int, Pack<T>::size>());
    else
      status = body(tag, std::integral_constant<int, 1>());
  });
  return status;
}

}  // namespace

void divide(GroupNorm& n, DType dtype) {
  if (n.groups == 0) return;
  const std::int64_t group = n.channels / n.groups, pack = 16 / size_of(dtype);
  for (n.at_once = 1; n.at_once < n.groups; ++n.at_once)
    if (n.groups % n.at_once == 0 && n.at_once * group % pack == 0 && n.at_once * group * size_of(dtype) >= 256) break;
  const std::int64_t others = std::max<std::int64_t>(1, n.samples * (n.groups / n.at_once));
  n.pieces = static_cast<int>(std::clamp<std::int64_t>(n.rows / 16, 1, std::max<std::int64_t>(1, blocks_at_once(3) / others)));
}

cudaError_t launch_group_sums(const GroupNorm& n, DType dtype, const void* x, float* sums, float* shifts, cudaStream_t stream) {
  if (n.samples == 0 || n.groups == 0) return cudaSuccess;
  const std::int64_t piece = (n.rows + n.pieces - 1) / n.pieces;
  return with_packs(n, dtype, aligned(x), [&](auto tag, auto size) {
    using T = typename decltype(tag)::type;
    constexpr int N = decltype(size)::value;
    const std::int64_t channels = n.at_once * (n.channels / n.groups);
    const std::int64_t across = std::min<std::int64_t>(channels / N, kThreads), lanes = kThreads / std::max<std::int64_t>(1, across);
    const std::size_t bytes = static_cast<std::size_t>(lanes * channels) * sizeof(float2);
    if (const auto status = allow_shared(group_sums<T, N>, bytes); status != cudaSuccess) return status;
    const dim3 grid(static_cast<unsigned>(n.pieces), static_cast<unsigned>(n.samples), static_cast<unsigned>(n.groups / n.at_once));
    group_sums<T, N><<<grid, kThreads, bytes, stream>>>(n, piece, static_cast<const T*>(x), sums, shifts);
    return cudaGetLastError();
  });
}

cudaError_t launch_group_moments(const GroupNorm& n, const float* sums, const float* shifts, float* moments, cudaStream_t stream) {
  if (n.sets() == 0) return cudaSuccess;
  group_moments<<<static_cast<unsigned>((n.sets() + 3) / 4), 128, 0, stream>>>(n, sums, shifts, moments);
  return cudaGetLastError();
}

cudaError_t launch_group_norm(const GroupNorm& n, DType dtype, const void* x, const void* weight, const void* bias, const float* statistics,
                              const float* shifts, void* y, cudaStream_t stream) {
  if (n.samples * n.rows * n.channels == 0) return cudaSuccess;
  return with_packs(n, dtype, aligned(x) && aligned(y), [&](auto tag, auto size) {
    using T = typename decltype(tag)::type;
    constexpr int N = decltype(size)::value;
    // Enough work in a block to outweigh its preparations, enough blocks to fill the device.
    const std::int64_t channels = n.at_once * (n.channels / n.groups), others = n.samples * (n.groups / n.at_once);
    const std::int64_t least = std::max<std::int64_t>(1, kThreads * 4 * N / channels);
    const std::int64_t blocks = blocks_at_once(kPerMultiprocessor);
    const std::int64_t piece = std::clamp<std::int64_t>((others * n.rows + blocks - 1) / blocks, least, std::max<std::int64_t>(least, (1 << 28) / channels));
    const std::size_t bytes = static_cast<std::size_t>(3 * n.at_once) * sizeof(float);
    if (const auto status = allow_shared(group_norm<T, N>, bytes); status != cudaSuccess) return status;
    const dim3 grid(static_cast<unsigned>((n.rows + piece - 1) / piece), static_cast<unsigned>(n.samples), static_cast<unsigned>(n.groups / n.at_once));
    group_norm<T, N><<<grid, kThreads, bytes, stream>>>(
        n, piece, static_cast<const T*>(x), static_cast<const T*>(weight), static_cast<const T*>(bias), statistics, shifts, static_cast<T*>(y));
    return cudaGetLastError();
  });
}

}  // namespace comfytp::backend::cuda
