#include "backend/cuda/hopper/gated_linear.h"

#include <algorithm>
#include <type_traits>

#include "backend/cuda/chain.cuh"
#include "backend/cuda/hopper/ptx.cuh"

namespace comfytp::backend::cuda::hopper {
namespace {

// A cluster of two blocks makes a tile of 256 rows and 128 columns. Each block has 128 of the rows, and reads half of the weights' tile for both:
// the first the value's 128 rows of it, the second the gate's, which lie below. In a block one thread orders what is read, and two warp
// groups multiply 64 rows each, with value and gate of an element in the same thread.
constexpr int kBlocks = 2, kRows = 128, kColumns = 128, kInner = 64, kStages = 4;
constexpr int kThreads = 3 * 128;
constexpr int kXBytes = kRows * kInner * 2, kWBytes = kColumns * kInner * 2, kStageBytes = kXBytes + 2 * kWBytes;
constexpr int kOutBytes = 64 * kColumns * 2;  // of a warp group
constexpr int kBand = 8;                      // clusters side by side along the rows, which share the weights' tiles in the L2 cache

struct Shared {
  alignas(1024) char stages[kStages][kStageBytes];
  alignas(1024) char out[2][kOutBytes];
  std::uint64_t full[kStages], empty[kStages];
};

struct Problem {
  int inner, outputs, row_tiles, column_tiles;
  const void *value_bias, *gate_bias;
};
struct Maps {
  CUtensorMap x, w[2], y;
};

struct Tile {
  int row, column;
};

__device__ __forceinline__ Tile tile_at(const Problem& p, int index) {
  const int band = index / (kBand * p.column_tiles), within = index - band * kBand * p.column_tiles;
  const int high = min(kBand, p.row_tiles - band * kBand);
  return {(band * kBand + within % high) * kRows * kBlocks, within / high * kColumns};
}

template <typename T>
__device__ __forceinline__ std::uint32_t pair_of(float first, float second);
template <>
__device__ __forceinline__ std::uint32_t pair_of<__half>(float first, float second) {
  const __half2 pair = __floats2half2_rn(first, second);
  return *reinterpret_cast<const std::uint32_t*>(&pair);
}
template <>
__device__ __forceinline__ std::uint32_t pair_of<__nv_bfloat16>(float first, float second) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
  return *reinterpret_cast<const std::uint32_t*>(&pair);
}
template <typename T>
__device__ __forceinline__ float2 floats_of(std::uint32_t pair) {
  const T* v = reinterpret_cast<const T*>(&pair);
  return {to_float(v[0]), to_float(v[1])};
}

// What a warp group made of a tile, rounded: pairs[j][below] of the columns 8 j.. as add_product() has them. The product and the way to memory
// come in kSlices slices between the products of the next tile, whose instructions leave the warps idle.
constexpr int kSlices = 8;
struct Projected {
  std::uint32_t value[16][2], gate[16][2];
  Tile tile;
  bool waits = false;
};

template <typename T>
__device__ __forceinline__ void round_sums(const Problem& p, const Tile& tile, float (&sums)[128], Projected& projected) {
  std::uint32_t bias[32];  // on their way while the last products run
#pragma unroll
  for (int j = 0; j < 32; ++j) {
    const int column = tile.column + j % 16 * 8 + threadIdx.x % 4 * 2;
    const T* from = static_cast<const T*>(j < 16 ? p.value_bias : p.gate_bias);
    bias[j] = from && column < p.outputs ? __ldg(reinterpret_cast<const std::uint32_t*>(from + column)) : 0u;
  }
  wait_products<0>();
#pragma unroll
  for (int j = 0; j < 32; ++j) {
    const float2 both = floats_of<T>(bias[j]);
#pragma unroll
    for (int below = 0; below < 2; ++below)
      (j < 16 ? projected.value : projected.gate)[j % 16][below] = pair_of<T>(sums[4 * j + 2 * below] + both.x, sums[4 * j + 2 * below + 1] + both.y);
  }
  projected.tile = tile;
  projected.waits = true;
}

template <typename T, StepKind ACTIVATION>
__device__ __forceinline__ std::uint32_t product(std::uint32_t value, std::uint32_t gate) {
  const float2 v = floats_of<T>(value), g = floats_of<T>(gate);
  float both[2] = {g.x, g.y};
  apply_activation(ACTIVATION, both);
  return pair_of<T>(v.x * both[0], v.y * both[1]);
}

// Slice S, through `out` in two tiles of 64 columns.
template <typename T, StepKind ACTIVATION, int S>
__device__ __forceinline__ void store_slice(const CUtensorMap* y, const Projected& projected, char* out, int group) {
  const int thread = threadIdx.x % 128, lane = thread % 32, row = thread / 32 * 16 + lane / 8 % 2 * 8 + lane % 8;
  if constexpr (S == 0) {
    if (thread == 0) wait_stores();
    sync_warp_group(group);
  }
  constexpr int j = S * (16 / kSlices);
  std::uint32_t v[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) v[i] = product<T, ACTIVATION>(projected.value[j + i / 2][i % 2], projected.gate[j + i / 2][i % 2]);
  const int line = j % 8 + lane / 16;  // of 8 in a row of 128 bytes, swizzled as the tensor map says
  store_matrices(out + j / 8 * (kOutBytes / 2) + row * 128 + (line ^ (row & 7)) * 16, v);
  if constexpr (S + 1 == kSlices) {
    fence_shared();
    sync_warp_group(group);
    if (thread == 0) {
      for (int half = 0; half < 2; ++half)
        store_tile(y, projected.tile.column + half * (kColumns / 2), projected.tile.row + (group - 1) * 64, out + half * (kOutBytes / 2));
      commit_stores();
    }
  }
}

// Calls body(integral_constant<FIRST>) to body(integral_constant<COUNT - 1>).
template <int COUNT, int FIRST = 0, typename Body>
__device__ __forceinline__ void unrolled(const Body& body) {
  if constexpr (FIRST < COUNT) {
    body(std::integral_constant<int, FIRST>());
    unrolled<COUNT, FIRST + 1>(body);
  }
}

template <typename T, StepKind ACTIVATION>
__global__ void __launch_bounds__(kThreads, 1) __cluster_dims__(kBlocks, 1, 1) gated_linear(const __grid_constant__ Problem p, const __grid_constant__ Maps maps) {
  extern __shared__ __align__(1024) char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const int rank = blockIdx.x % kBlocks, cluster = blockIdx.x / kBlocks, clusters = gridDim.x / kBlocks, tiles = p.row_tiles * p.column_tiles;
  const int steps = (p.inner + kInner - 1) / kInner, group = threadIdx.x / 128;
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      init_barrier(&shared.full[s], 1);
      init_barrier(&shared.empty[s], 2 * kBlocks);
    }
    fence_barriers();
    for (const auto* map : {&maps.x, &maps.w[rank], &maps.y}) prefetch_map(map);
  }
  sync_cluster();

  int stage = 0, phase = 0;
  const auto next = [&] {
    if (++stage == kStages) stage = 0, phase ^= 1;
  };
  if (group == 0) {
    give_registers<40>();
    if (threadIdx.x == 0) {
      for (int index = cluster; index < tiles; index += clusters) {
        const Tile tile = tile_at(p, index);
        for (int k = 0; k < steps; ++k, next()) {
          wait(&shared.empty[stage], phase ^ 1);
          expect_bytes(&shared.full[stage], kStageBytes);
          char* to = shared.stages[stage];
          load_tile(to, &maps.x, k * kInner, tile.row + rank * kRows, &shared.full[stage]);
          load_tile(to + kXBytes + rank * kWBytes, &maps.w[rank], k * kInner, tile.column, &shared.full[stage], std::uint16_t{(1 << kBlocks) - 1});
        }
      }
    }
  } else {
    take_registers<232>();
    Projected projected;
    const auto store = [&](auto slice) {
      if (projected.waits) store_slice<T, ACTIVATION, decltype(slice)::value>(&maps.y, projected, shared.out[group - 1], group);
    };
    for (int index = cluster; index < tiles; index += clusters) {
      Tile tile = tile_at(p, index);
      tile.row += rank * kRows;
      float sums[128];  // 64 of the value, 64 of the gate
      int last = 0;
      const auto release = [&] {
        if (threadIdx.x % 128 < kBlocks) arrive(&shared.empty[last], threadIdx.x % 128);
      };
      const auto multiply = [&](int k) {
        wait(&shared.full[stage], phase);
        const char* at = shared.stages[stage];
        const auto x = describe_tile(at + (group - 1) * 64 * kInner * 2), w = describe_tile(at + kXBytes);
        begin_products();
#pragma unroll
        for (int i = 0; i < kInner / 16; ++i) add_product<T>(sums, x + 2 * i, w + 2 * i, k > 0 || i > 0);
        commit_products();
        if (k > 0) {
          wait_products<1>();
          release();
        }
        last = stage;
        next();
      };
      unrolled<kSlices>([&](auto slice) {
        constexpr int k = decltype(slice)::value;
        if (k < steps) multiply(k);
        store(slice);
      });
      for (int k = kSlices; k < steps; ++k) multiply(k);
      round_sums<T>(p, tile, sums, projected);
      release();
    }
    unrolled<kSlices>(store);
    if (threadIdx.x % 128 == 0) wait_stores();
  }
  sync_cluster();  // no block goes while the other may still write to its memory or arrive at its barriers
}

// Null where the driver has none.
decltype(&cuTensorMapEncodeTiled) map_encoder() {
  static const auto found = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult result{};
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &result);
    return result == cudaDriverEntryPointSuccess ? reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry) : nullptr;
  }();
  return found;
}

// Tiles of 64 columns, swizzled, of a matrix [rows, columns].
bool encode(CUtensorMap& map, DType dtype, const void* data, std::int64_t rows, std::int64_t columns, int tile_rows) {
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)}, strides[1] = {static_cast<cuuint64_t>(columns) * 2};
  const cuuint32_t box[2] = {64, static_cast<cuuint32_t>(tile_rows)}, steps[2] = {1, 1};
  return map_encoder()(&map, dtype == DType::f16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void*>(data), sizes, strides,
                       box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                       CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

template <typename T, StepKind ACTIVATION>
cudaError_t launch(const Problem& problem, const Maps& maps, cudaStream_t stream) {
  const auto kernel = gated_linear<T, ACTIVATION>;
  constexpr int kShared = sizeof(Shared);
  if (const auto status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared); status != cudaSuccess) return status;
  const auto clusters = std::min<std::int64_t>(std::int64_t{problem.row_tiles} * problem.column_tiles, blocks_at_once(1) / kBlocks);
  kernel<<<static_cast<unsigned>(clusters * kBlocks), kThreads, kShared, stream>>>(problem, maps);
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch(StepKind activation, const Problem& problem, const Maps& maps, cudaStream_t stream) {
  switch (activation) {
    case StepKind::gelu: return launch<T, StepKind::gelu>(problem, maps, stream);
    case StepKind::gelu_tanh: return launch<T, StepKind::gelu_tanh>(problem, maps, stream);
    case StepKind::silu: return launch<T, StepKind::silu>(problem, maps, stream);
    case StepKind::sigmoid: return launch<T, StepKind::sigmoid>(problem, maps, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace

bool takes(const GatedLinear& l, const cudaDeviceProp& device) {
  constexpr std::int64_t kMost = 1 << 30;
  return device.major == 9 && device.minor == 0 && (l.dtype == DType::f16 || l.dtype == DType::bf16) && l.rows > 0 && l.inner > 0 && l.outputs > 0 &&
         l.rows < kMost && l.inner < kMost && l.outputs < kMost && l.inner % 8 == 0 && l.outputs % 8 == 0 && map_encoder();
}

cudaError_t launch_gated_linear(const GatedLinear& l, const GatedLinearOperands& o, cudaStream_t stream) {
  for (const void* p : {o.x, o.value, o.gate, o.value_bias, o.gate_bias, static_cast<const void*>(o.y)})
    if (!aligned(p)) return cudaErrorInvalidValue;
  const auto tiles = [](std::int64_t size, int tile) { return static_cast<int>((size + tile - 1) / tile); };
  const Problem problem{static_cast<int>(l.inner), static_cast<int>(l.outputs), tiles(l.rows, kRows * kBlocks), tiles(l.outputs, kColumns), o.value_bias, o.gate_bias};
  Maps maps{};
  if (!map_encoder() || !encode(maps.x, l.dtype, o.x, l.rows, l.inner, kRows) || !encode(maps.w[0], l.dtype, o.value, l.outputs, l.inner, kColumns) ||
      !encode(maps.w[1], l.dtype, o.gate, l.outputs, l.inner, kColumns) || !encode(maps.y, l.dtype, o.y, l.rows, l.outputs, 64))
    return cudaErrorInvalidValue;
  return l.dtype == DType::f16 ? launch<__half>(l.activation, problem, maps, stream) : launch<__nv_bfloat16>(l.activation, problem, maps, stream);
}

}  // namespace comfytp::backend::cuda::hopper
