#include "backend/cuda/kernels/group_norm.h"

#include <algorithm>

#include "backend/cuda/chain.cuh"

namespace comfytp::backend::cuda {
namespace {

constexpr int kThreads = 256;

struct Moments {
  float count = 0, mean = 0, squares = 0;
  // Chan et al. 1979.
  __device__ __forceinline__ void merge(const Moments& o) {
    if (o.count == 0) return;
    const float total = count + o.count, delta = o.mean - mean;
    squares += o.squares + delta * delta * (count * o.count / total);
    mean += delta * (o.count / total);
    count = total;
  }
};

// A block measures one piece of a sample's rows: threads stand side by side along the channels, `lanes` rows at a time, each over
// its own channels.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads) group_moments(const __grid_constant__ GroupNorm n, std::int64_t piece, const T* x, float* out,
                                                          float* shifts) {
  extern __shared__ float shared[];
  const std::int64_t sample = blockIdx.y, first = blockIdx.x * piece, last = min(first + piece, n.rows);
  const int packs = static_cast<int>(n.channels / N), group = static_cast<int>(n.channels / n.groups);
  const int across = min(packs, kThreads), lanes = kThreads / across;
  const int lane = threadIdx.x / across, column = threadIdx.x % across;
  const T* origin = x + sample * n.rows * n.channels;
  if (blockIdx.x == 0)
    for (int g = threadIdx.x; g < n.groups; g += kThreads) shifts[sample * n.groups + g] = to_float(origin[std::int64_t{g} * group]);
  Moments* cells = reinterpret_cast<Moments*>(shared);  // [lanes][channels]
  if (lane < lanes) {
    for (int pack = column; pack < packs; pack += across) {
      float shift[N], sum[N], squares[N];
      int count = 0;
      const T* p = x + (sample * n.rows + first + lane) * n.channels + std::int64_t{pack} * N;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        shift[i] = to_float(origin[(pack * N + i) / group * group]);
        sum[i] = squares[i] = 0;
      }
      for (std::int64_t row = first + lane; row < last; row += lanes, p += n.channels * lanes) {
        float v[N];
        load_floats<T, N>(p, v);
        ++count;
#pragma unroll
        for (int i = 0; i < N; ++i) {
          const float d = v[i] - shift[i];
          sum[i] += d;
          squares[i] += d * d;
        }
      }
      const float c = static_cast<float>(count);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        Moments m;
        if (count > 0) m = {c, sum[i] / c, fmaxf(squares[i] - sum[i] * sum[i] / c, 0.f)};
        cells[lane * n.channels + pack * N + i] = m;
      }
    }
  }
  __syncthreads();
  // Some threads for each group, so that all of them have a part of the merging; then one.
  const int helpers = max(1, kThreads / n.groups);
  for (int base = 0; base < n.groups; base += kThreads / helpers) {
    const int g = base + static_cast<int>(threadIdx.x) / helpers, h = static_cast<int>(threadIdx.x) % helpers;
    Moments m;
    const bool mine = g < n.groups && static_cast<int>(threadIdx.x) / helpers < kThreads / helpers;
    if (mine)
      for (int k = h; k < lanes * group; k += helpers) m.merge(cells[(k / group) * n.channels + g * group + k % group]);
    __syncthreads();
    Moments* parts = cells + lanes * n.channels;
    if (mine) parts[threadIdx.x] = m;
    __syncthreads();
    if (mine && h == 0) {
      for (int k = 1; k < helpers; ++k) m.merge(parts[threadIdx.x + k]);
      float* to = out + ((std::int64_t{blockIdx.x} * n.samples + sample) * n.groups + g) * 3;
      to[0] = m.count;
      to[1] = m.mean;
      to[2] = m.squares;
    }
  }
}

__global__ void merge_moments(int parts, std::int64_t groups, const float* moments, const float* shifts, float* out) {
  const std::int64_t g = blockIdx.x * std::int64_t{blockDim.x} + threadIdx.x;
  if (g >= groups) return;
  Moments m;
  for (int p = 0; p < parts; ++p) {
    const float* from = moments + (p * groups + g) * 3;
    m.merge({from[0], from[1], from[2]});
  }
  out[g * 3] = m.count;
  out[g * 3 + 1] = m.mean + shifts[g];
  out[g * 3 + 2] = m.squares;
}

template <typename T, int N>
__global__ void __launch_bounds__(kThreads) group_norm(const __grid_constant__ GroupNorm n, std::int64_t piece, const T* x, const T* weight, const T* bias,
                                                       const float* moments, const float* shifts, T* y) {
  extern __shared__ float groups[];         // [groups] means, [groups] scales
  float* shared = groups + 2 * n.groups;    // [channels] factors, summands, shifts
  const std::int64_t sample = blockIdx.y;
  const int group = static_cast<int>(n.channels / n.groups);
  Moments* merged = reinterpret_cast<Moments*>(shared);
  // `helpers` neighbouring threads merge a group's parts.
  const int helpers = max(1, kThreads / n.groups), at_once = kThreads / helpers;
  for (int base = 0; base < n.groups; base += at_once) {
    const int slot = static_cast<int>(threadIdx.x) / helpers, g = base + slot, h = static_cast<int>(threadIdx.x) % helpers;
    const bool mine = slot < at_once && g < n.groups;
    Moments m;
    if (mine)
      for (int p = h; p < n.parts; p += helpers) {
        const float* from = moments + ((p * n.samples + sample) * n.groups + g) * 3;
        m.merge({from[0], from[1], from[2]});
      }
    __syncthreads();
    if (mine) merged[threadIdx.x] = m;
    __syncthreads();
    if (mine && h == 0) {
      for (int k = 1; k < helpers; ++k) m.merge(merged[threadIdx.x + k]);
      groups[g] = m.mean;
      groups[n.groups + g] = rsqrtf(m.squares / m.count + n.epsilon);
    }
    __syncthreads();
  }
  // y = (x - shift) * factor + summand, the summand being of the mean's distance from the shift.
  for (int c = threadIdx.x; c < n.channels; c += kThreads) {
    const int g = c / group;
    const float factor = groups[n.groups + g] * to_float(weight[c]);
    shared[c] = factor;
    shared[n.channels + c] = to_float(bias[c]) - groups[g] * factor;
    shared[2 * n.channels + c] = shifts ? shifts[sample * n.groups + g] : 0.f;
  }
  __syncthreads();
  const int packs = static_cast<int>(n.channels / N);
  const std::int64_t first = blockIdx.x * piece, rows = min(piece, n.rows - first);
  const std::int64_t base = (sample * n.rows + first) * n.channels;
  for (std::int64_t i = threadIdx.x; i < rows * packs; i += kThreads) {
    float v[N];
    load_floats<T, N>(x + base + i * N, v);
    const int c = static_cast<int>(static_cast<unsigned>(i) % static_cast<unsigned>(packs)) * N;
#pragma unroll
    for (int k = 0; k < N; ++k) {
      v[k] = (v[k] - shared[2 * n.channels + c + k]) * shared[c + k] + shared[n.channels + c + k];
      if (n.silu) v[k] = silu_of(v[k]);
    }
    store_floats<T, N>(y + base + i * N, v);
  }
}

bool aligned(const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; }

// A block of the norm handles so many rows: enough work to outweigh the merging, enough blocks to fill the device.
std::int64_t norm_piece(const GroupNorm& n) {
  return std::clamp<std::int64_t>(n.samples * n.rows / (132 * 4), 1, std::max<std::int64_t>(1, (std::int64_t{1} << 30) / std::max<std::int64_t>(1, n.channels)));
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
    if (packs && n.channels % Pack<T>::size == 0)
      status = body(tag, std::integral_constant<int, Pack<T>::size>());
    else
      status = body(tag, std::integral_constant<int, 1>());
  });
  return status;
}

}  // namespace

std::int64_t GroupNorm::pieces() const { return std::clamp<std::int64_t>(rows / 16, 1, std::max<std::int64_t>(1, 264 / std::max<std::int64_t>(1, samples))); }

cudaError_t launch_group_moments(const GroupNorm& n, DType dtype, const void* x, float* moments, float* shifts, cudaStream_t stream) {
  if (n.samples == 0 || n.groups == 0) return cudaSuccess;
  const std::int64_t pieces = n.pieces(), piece = (n.rows + pieces - 1) / pieces;
  return with_packs(n, dtype, aligned(x), [&](auto tag, auto size) {
    using T = typename decltype(tag)::type;
    constexpr int N = decltype(size)::value;
    const std::int64_t across = std::min<std::int64_t>(n.channels / N, kThreads), lanes = kThreads / std::max<std::int64_t>(1, across);
    const std::size_t bytes = static_cast<std::size_t>(lanes * n.channels + kThreads) * sizeof(Moments);
    if (const auto status = allow_shared(group_moments<T, N>, bytes); status != cudaSuccess) return status;
    group_moments<T, N><<<dim3(static_cast<unsigned>(pieces), static_cast<unsigned>(n.samples)), kThreads, bytes, stream>>>(
        n, piece, static_cast<const T*>(x), moments, shifts);
    return cudaGetLastError();
  });
}

cudaError_t launch_merge_moments(int parts, std::int64_t groups, const float* moments, const float* shifts, float* merged, cudaStream_t stream) {
  if (groups == 0) return cudaSuccess;
  merge_moments<<<static_cast<unsigned>((groups + 127) / 128), 128, 0, stream>>>(parts, groups, moments, shifts, merged);
  return cudaGetLastError();
}

cudaError_t launch_group_norm(const GroupNorm& n, DType dtype, const void* x, const void* weight, const void* bias, const float* moments,
                              const float* shifts, void* y, cudaStream_t stream) {
  if (n.samples * n.rows * n.channels == 0) return cudaSuccess;
  return with_packs(n, dtype, aligned(x) && aligned(y), [&](auto tag, auto size) {
    using T = typename decltype(tag)::type;
    constexpr int N = decltype(size)::value;
    const std::int64_t piece = norm_piece(n);
    const std::size_t bytes = static_cast<std::size_t>(2 * n.groups) * sizeof(float) +
                              std::max(static_cast<std::size_t>(3 * n.channels) * sizeof(float), kThreads * sizeof(Moments));
    if (const auto status = allow_shared(group_norm<T, N>, bytes); status != cudaSuccess) return status;
    group_norm<T, N><<<dim3(static_cast<unsigned>((n.rows + piece - 1) / piece), static_cast<unsigned>(n.samples)), kThreads, bytes, stream>>>(
        n, piece, static_cast<const T*>(x), static_cast<const T*>(weight), static_cast<const T*>(bias), moments, shifts, static_cast<T*>(y));
    return cudaGetLastError();
  });
}

}  // namespace comfytp::backend::cuda
