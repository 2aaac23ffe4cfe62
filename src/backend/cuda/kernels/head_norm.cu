#include "backend/cuda/kernels/head_norm.h"

#include <algorithm>

#include "backend/cuda/chain.cuh"
#include "backend/cuda/kernels/reduction.cuh"

namespace comfytp::backend::cuda {
namespace {

constexpr int kThreads = 128;
constexpr std::int64_t kMostHeads = 1024;
constexpr int kAtOnce = 4;  // heads that a thread has on their way: the memory needs so many bytes, and the angles are read once for all

// A block does one token's heads, LANES threads a head with a pack each.
template <typename T, int LANES, bool HALVED>
__global__ void __launch_bounds__(kThreads)
head_norm(const __grid_constant__ HeadNorm n, const T* x, const T* __restrict__ before, const T* __restrict__ weight,
          const float* __restrict__ cosines, const float* __restrict__ sines, T* z) {
  constexpr int N = Pack<T>::size, kColumns = LANES * N, kGroups = kThreads / LANES, kAngles = HALVED ? N / 2 : N;
  const int column = threadIdx.x % LANES * N, group = threadIdx.x / LANES;
  const std::int64_t sample = blockIdx.x / n.tokens, token = blockIdx.x - sample * n.tokens, base = std::int64_t{blockIdx.x} * n.heads * kColumns + column;
  const std::int64_t angle = sample * n.batch_stride + token * n.token_stride + (HALVED ? column / 2 : column);
  float c[kAngles], s[kAngles];
  load_floats<float, kAngles>(cosines + angle, c);
  load_floats<float, kAngles>(sines + angle, s);
  Pack<T> scale;
  if (weight) scale = load_pack(weight + column);
  for (int first = 0; first < n.heads; first += kGroups * kAtOnce) {
    Pack<T> packs[kAtOnce] = {};
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k)
      if (const int head = first + k * kGroups + group; head < n.heads) packs[k] = load_pack(x + base + head * kColumns);
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const int head = first + k * kGroups + group;
      if (first + k * kGroups >= n.heads) break;  // the same for all threads, which sum together below
      float v[N];
#pragma unroll
      for (int i = 0; i < N; ++i) v[i] = to_float(packs[k].v[i]);
      if (before && head < n.heads) {
        float bias[N];
        load_floats<T, N>(before + head * kColumns + column, bias);
#pragma unroll
        for (int i = 0; i < N; ++i) v[i] += bias[i];
      }
      float squares = 0;
#pragma unroll
      for (int i = 0; i < N; ++i) squares += v[i] * v[i];
      const float size = rsqrtf(join_threads<LANES>(squares, static_cast<float*>(nullptr), Sum()) / kColumns + n.epsilon);
#pragma unroll
      for (int i = 0; i < N; ++i) v[i] *= weight ? size * to_float(scale.v[i]) : size;
      Pack<T> turned;
#pragma unroll
      for (int i = 0; i < N; i += 2) {
        const int at = HALVED ? i / 2 : i, next = HALVED ? i / 2 : i + 1;
        turned.v[i] = from_float<T>(v[i] * c[at] - v[i + 1] * s[at]);
        turned.v[i + 1] = from_float<T>(v[i + 1] * c[next] + v[i] * s[next]);
      }
      if (head < n.heads) store_pack(z + base + head * kColumns, turned);
    }
  }
}

template <typename T, int LANES>
void launch(const HeadNorm& n, const RowNormOperands& o, cudaStream_t stream) {
  const auto kernel = n.halved ? head_norm<T, LANES, true> : head_norm<T, LANES, false>;
  const auto of = [](const void* p) { return static_cast<const T*>(p); };
  kernel<<<static_cast<unsigned>(n.batch * n.tokens), kThreads, 0, stream>>>(n, of(o.x), of(o.pre.at[0]), of(o.weight), static_cast<const float*>(o.post.at[0]),
                                                                            static_cast<const float*>(o.post.at[1]), static_cast<T*>(o.z));
}

template <typename T>
cudaError_t launch(const HeadNorm& n, const RowNormOperands& o, cudaStream_t stream) {
  switch (n.columns) {
    case 64: launch<T, 8>(n, o, stream); break;
    case 128: launch<T, 16>(n, o, stream); break;
    case 256: launch<T, 32>(n, o, stream); break;
    default: return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}

}  // namespace

std::optional<HeadNorm> as_head_norm(const RowNorm& n, DType dtype) {
  const auto &pre = n.pre, &post = n.post;
  const auto& turn = post.steps[0];
  if ((dtype != DType::f16 && dtype != DType::bf16) || n.centred || n.parts > 0 || n.bias_wide || n.x_wide || n.weight_wide || n.z_wide) return {};
  if (n.columns != 64 && n.columns != 128 && n.columns != 256) return {};
  if (post.count != 1 || turn.kind != StepKind::rope || !turn.wide || post.dims < 3 || !post.packs_of(8)) return {};
  if (turn.stride[post.dims - 2] != 0 || turn.stride[post.dims - 1] != 1) return {};
  HeadNorm heads;
  heads.columns = static_cast<int>(n.columns);
  if (post.size[post.dims - 2] > kMostHeads) return {};  // tokens of one angle, which a block each would have no work for
  heads.heads = static_cast<int>(post.size[post.dims - 2]);
  heads.tokens = post.size[post.dims - 3];
  heads.token_stride = turn.stride[post.dims - 3];
  if (post.dims == 4) {
    heads.batch = post.size[0];
    heads.batch_stride = turn.stride[0];
  }
  heads.epsilon = n.epsilon;
  heads.halved = turn.halved;
  if (pre.count == 0) return heads;
  const auto& bias = pre.steps[0];
  const bool by_head = pre.dims == 3 && pre.size[1] == heads.heads && bias.stride[0] == 0 && bias.stride[1] == n.columns && bias.stride[2] == 1;
  if (pre.count != 1 || bias.kind != StepKind::add || bias.wide || !by_head) return {};
  return heads;
}

cudaError_t launch_head_norm(const HeadNorm& n, const RowNormOperands& o, DType dtype, cudaStream_t stream) {
  return dtype == DType::f16 ? launch<__half>(n, o, stream) : launch<__nv_bfloat16>(n, o, stream);
}

}  // namespace comfytp::backend::cuda
