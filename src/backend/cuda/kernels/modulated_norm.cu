#include "backend/cuda/kernels/modulated_norm.h"

#include <array>

#include "backend/cuda/chain.cuh"
#include "backend/cuda/kernels/row_statistics.cuh"

namespace comfytp::backend::cuda {
namespace {

// Of the longest blocks, so that registers leave room for all the threads that a multiprocessor takes.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ != 800 && __CUDA_ARCH__ != 900 && __CUDA_ARCH__ != 1000 && __CUDA_ARCH__ != 1030
constexpr int kLongBlocks = 1;  // 1536 threads
#else
constexpr int kLongBlocks = 2;  // 2048
#endif

template <typename T>
struct Operands {
  const T *x, *residual, *sum;                           // rows
  const T *bias, *gate, *weight, *shift, *scale, *factor, *offset;  // vectors
  T *y, *z;
};

// v with the operand that begins at `from`, where there is one. It is loaded when it is used, since registers are what keeps rows from being under
// way side by side (with all vectors loaded ahead, 64 of them instead of 30, the whole took 1.4 times as long), and vectors come from a cache.
template <typename T, typename Apply>
__device__ __forceinline__ void with(const T* from, std::int64_t at, float (&v)[Pack<T>::size], const Apply& apply) {
  if (!from) return;
  const auto pack = load_pack(from + at);
#pragma unroll
  for (int i = 0; i < Pack<T>::size; ++i) v[i] = apply(v[i], to_float(pack.v[i]));
}

// A row in the registers of LANES threads of a warp or, where LANES is 0, of a whole block.
template <typename T, int PACKS, int LANES>
__global__ void __launch_bounds__(LANES ? 128 : 1024, !LANES ? kLongBlocks : PACKS == 1 ? 12 : 8)
modulated_norm(const __grid_constant__ ModulatedNorm n, const __grid_constant__ Operands<T> o) {
  constexpr int N = Pack<T>::size, kRows = LANES ? 128 / LANES : 1;
  const int threads = LANES ? LANES : static_cast<int>(blockDim.x), thread = LANES ? threadIdx.x % LANES : threadIdx.x, packs = n.columns / N;
  const unsigned given = blockIdx.x * kRows + (LANES ? threadIdx.x / LANES : 0), rows = static_cast<unsigned>(n.rows);
  const unsigned row = given < rows ? given : rows - 1;  // what has no row computes the last one too, and keeps it to itself
  const std::int64_t base = std::int64_t{row} * n.columns;
  const std::int64_t sample = n.rows_of_sample ? row / static_cast<unsigned>(n.rows_of_sample) : 0;
  const auto plus = [](float a, float b) { return a + b; };
  const auto times = [](float a, float b) { return a * b; };
  bool there[PACKS];
  float v[PACKS][N];
#pragma unroll
  for (int k = 0; k < PACKS; ++k) {
    const int pack = thread + k * threads, column = pack * N;
    there[k] = pack < packs;
    if (there[k]) load_floats<T, N>(o.x + base + column, v[k]);
  }
#pragma unroll
  for (int k = 0; k < PACKS; ++k) {
    if (!there[k]) continue;
    const int column = (thread + k * threads) * N;
    with(o.bias, sample * n.bias.stride + column, v[k], plus);
    with(o.gate, sample * n.gate.stride + column, v[k], times);
    with(o.residual, base + column, v[k], plus);
    if (!o.y) continue;
    Pack<T> y;  // which the norm sees as its other readers do
#pragma unroll
    for (int i = 0; i < N; ++i) {
      y.v[i] = from_float<T>(v[k][i]);
      v[k][i] = to_float(y.v[i]);
    }
    if (given < rows) store_pack(o.y + base + column, y);
  }
  const auto of_row = row_statistics<N, PACKS, LANES>(v, there, packs, n.centred, n.epsilon);
#pragma unroll
  for (int k = 0; k < PACKS; ++k) {
    if (!there[k]) continue;
    const int column = (thread + k * threads) * N;
#pragma unroll
    for (int i = 0; i < N; ++i) v[k][i] = (v[k][i] - of_row.mean) * of_row.scale;
    with(o.weight, column, v[k], times);
    with(o.shift, column, v[k], plus);
    with(o.scale, sample * n.scale.stride + column, v[k], [](float a, float b) { return a * (1.f + b); });
    with(o.factor, sample * n.factor.stride + column, v[k], times);
    with(o.offset, sample * n.offset.stride + column, v[k], plus);
    with(o.sum, base + column, v[k], plus);
    if (given < rows) store_floats<T, N>(o.z + base + column, v[k]);
  }
}

template <typename T, int PACKS, int LANES>
void launch(const ModulatedNorm& n, const Operands<T>& o, cudaStream_t stream) {
  constexpr int rows = LANES ? 128 / LANES : 1;
  const auto threads = LANES ? 128u : static_cast<unsigned>((n.columns / Pack<T>::size + 31) / 32 * 32);
  modulated_norm<T, PACKS, LANES><<<static_cast<unsigned>((n.rows + rows - 1) / rows), threads, 0, stream>>>(n, o);
}

template <typename T>
cudaError_t launch(const ModulatedNorm& n, const RowNormOperands& given, cudaStream_t stream) {
  const auto of = [](const void* p) { return static_cast<const T*>(p); };
  const auto in = [&](const ChainOperands& operands, int i) { return i < 0 ? nullptr : of(operands.at[i]); };
  const Operands<T> o{of(given.x),
                      in(given.pre, n.residual),
                      in(given.post, n.sum),
                      in(given.pre, n.bias.operand),
                      in(given.pre, n.gate.operand),
                      of(given.weight),
                      of(given.bias),
                      in(given.post, n.scale.operand),
                      in(given.post, n.factor.operand),
                      in(given.post, n.offset.operand),
                      static_cast<T*>(given.y),
                      static_cast<T*>(given.z)};
  const int packs = n.columns / Pack<T>::size;
  if (packs <= 16) launch<T, 1, 16>(n, o, stream);
  else if (packs <= 32) launch<T, 1, 32>(n, o, stream);
  else if (packs <= 64) launch<T, 2, 32>(n, o, stream);
  else if (packs <= 1024) launch<T, 1, 0>(n, o, stream);
  else return cudaErrorInvalidValue;
  return cudaGetLastError();
}

// What a step's operand is: like the value, or a vector along the columns.
class StepOperand {
 public:
  StepOperand(const Chain& chain, const ChainStep& step) : chain_(chain), step_(step), last_(chain.dims - 1) {}
  bool rows() const {
    for (std::int64_t d = last_, size = 1; d >= 0; size *= chain_.size[d--])
      if (step_.stride[d] != size) return false;
    return true;
  }
  bool vector() const { return step_.stride[last_] == 1 && (last_ < 1 || step_.stride[last_ - 1] == 0) && last_ <= 2; }
  /// Of a vector: 0 where all samples have one.
  std::int64_t stride() const { return last_ == 2 ? step_.stride[0] : 0; }
  std::int64_t rows_of_sample() const { return last_ == 2 ? chain_.size[1] : 0; }

 private:
  const Chain& chain_;
  const ChainStep& step_;
  const int last_;
};

}  // namespace

std::optional<ModulatedNorm> as_modulated_norm(const RowNorm& norm, DType dtype) {
  if ((dtype != DType::f16 && dtype != DType::bf16) || norm.parts > 0 || norm.columns % 8 != 0 || norm.columns > 1024 * 8) return {};
  if (norm.x_wide || norm.weight_wide || norm.bias_wide || norm.y_wide || norm.z_wide) return {};
  ModulatedNorm n;
  n.rows = norm.rows;
  n.columns = static_cast<int>(norm.columns);
  n.centred = norm.centred;
  n.epsilon = norm.epsilon;
  // Puts a chain's steps into places that stand in this order.
  struct Place {
    StepKind kind;
    ModulatedNorm::Vector* vector;
    int* rows;
  };
  const auto place = [&](const Chain& chain, auto places) {
    auto next = places.begin();
    for (int s = 0; s < chain.count; ++s) {
      const auto& step = chain.steps[s];
      const StepOperand operand(chain, step);
      if (step.operand < 0 || step.wide || step.kind == StepKind::rope || !chain.packs_of(8)) return false;
      const auto takes = [&](const Place& p) { return p.kind == step.kind && (p.rows ? operand.rows() : operand.vector()); };
      while (next != places.end() && !takes(*next)) ++next;
      if (next == places.end()) return false;
      if (next->rows) {
        *next->rows = step.operand;
      } else {
        const auto stride = operand.stride();
        if (stride >= std::int64_t{1} << 31 || operand.rows_of_sample() >= std::int64_t{1} << 31) return false;
        *next->vector = {step.operand, static_cast<int>(stride)};
        const auto rows = stride ? static_cast<int>(operand.rows_of_sample()) : 0;
        if (rows && n.rows_of_sample && rows != n.rows_of_sample) return false;
        if (rows) n.rows_of_sample = rows;
      }
      ++next;
    }
    return true;
  };
  const std::array before = {Place{StepKind::add, &n.bias, nullptr}, Place{StepKind::mul, &n.gate, nullptr}, Place{StepKind::add, nullptr, &n.residual}};
  const std::array behind = {Place{StepKind::add_one_mul, &n.scale, nullptr}, Place{StepKind::mul, &n.factor, nullptr},
                             Place{StepKind::add, &n.offset, nullptr}, Place{StepKind::add, nullptr, &n.sum}};
  if (!place(norm.pre, before) || !place(norm.post, behind)) return {};
  return n;
}

cudaError_t launch_modulated_norm(const ModulatedNorm& n, const RowNormOperands& o, DType dtype, cudaStream_t stream) {
  return dtype == DType::f16 ? launch<__half>(n, o, stream) : launch<__nv_bfloat16>(n, o, stream);
}

}  // namespace comfytp::backend::cuda
