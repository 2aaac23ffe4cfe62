#include "backend/cuda/matmul.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

#include "backend/cuda/status.h"
#include "backend/cuda/stopwatch.h"
#include "backend/cuda/tuning.h"

namespace comfytp::backend::cuda {
namespace {

constexpr std::int64_t kMostWorkspace = std::int64_t{32} << 20;
constexpr int kCandidates = 12;

cudaDataType type_of(DType dtype) {
  switch (dtype) {
    case DType::f32: return CUDA_R_32F;
    case DType::f16: return CUDA_R_16F;
    case DType::f8_e4m3: return CUDA_R_8F_E4M3;
    case DType::f8_e5m2: return CUDA_R_8F_E5M2;
    default: return CUDA_R_16BF;
  }
}

std::string hex(const cublasLtMatmulAlgo_t& algorithm) {
  std::string text;
  for (auto word : algorithm.data) text += fmt::format("{:016x}", word);
  return text;
}

bool from_hex(const std::string& text, cublasLtMatmulAlgo_t& algorithm) {
  if (text.size() != 16 * std::size(algorithm.data)) return false;
  for (std::size_t i = 0; i < std::size(algorithm.data); ++i) {
    char* end = nullptr;
    const auto word = text.substr(16 * i, 16);
    algorithm.data[i] = std::strtoull(word.c_str(), &end, 16);
    if (*end) return false;
  }
  return true;
}

}  // namespace

Matmul::Matmul(Context& context, const MatmulSizes& sizes) : context_(context), sizes_(sizes) {
  const auto type = type_of(sizes.dtype);
  check(cublasLtMatmulDescCreate(&operation_, CUBLAS_COMPUTE_32F, CUDA_R_32F), "describing a matmul");
  const auto set = [&](auto attribute, const auto& value) {
    check(cublasLtMatmulDescSetAttribute(operation_, attribute, &value, sizeof value), "describing a matmul");
  };
  // cuBLAS is column-major: y^T [o, r] = w [o, i] x^T [i, r].
  set(CUBLASLT_MATMUL_DESC_TRANSA, sizes.w_transposed ? CUBLAS_OP_N : CUBLAS_OP_T);
  set(CUBLASLT_MATMUL_DESC_TRANSB, CUBLAS_OP_N);
  if (sizes.gelu) set(CUBLASLT_MATMUL_DESC_EPILOGUE, sizes.bias ? CUBLASLT_EPILOGUE_GELU_BIAS : CUBLASLT_EPILOGUE_GELU);
  else if (sizes.bias) set(CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);
  if (sizes.bias) set(CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, type);
  const auto layout = [&](cublasLtMatrixLayout_t& l, DType dtype, std::int64_t r, std::int64_t c, std::int64_t stride) {
    check(cublasLtMatrixLayoutCreate(&l, type_of(dtype), static_cast<std::uint64_t>(r), static_cast<std::uint64_t>(c), r), "describing a matrix");
    const int count = static_cast<int>(sizes.batch);
    if (count == 1) return;
    check(cublasLtMatrixLayoutSetAttribute(l, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &count, sizeof count), "describing a matrix");
    check(cublasLtMatrixLayoutSetAttribute(l, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &stride, sizeof stride), "describing a matrix");
  };
  const DType w_dtype = sizes.fp8_weight.value_or(sizes.dtype);
  if (sizes.w_transposed)
    layout(w_, w_dtype, sizes.outputs, sizes.inner, sizes.w_stride);
  else
    layout(w_, w_dtype, sizes.inner, sizes.outputs, sizes.w_stride);
  layout(x_, sizes.fp8_weight ? DType::f8_e4m3 : sizes.dtype, sizes.inner, sizes.rows, sizes.x_stride);
  layout(y_, sizes.dtype, sizes.outputs, sizes.rows, sizes.y_stride);
  try {
    choose();
  } catch (...) {
    release();
    throw;
  }
}

Matmul::~Matmul() { release(); }

void Matmul::release() {
  for (auto l : {x_, w_, y_})
    if (l) cublasLtMatrixLayoutDestroy(l);
  if (operation_) cublasLtMatmulDescDestroy(operation_);
}

void Matmul::choose() {
  const auto& s = sizes_;
  auto& tuning = tuning_of(context_);
  const auto stored = s.fp8_weight ? fmt::format(" of {}", name_of(*s.fp8_weight)) : "";
  const auto key = fmt::format("matmul {}{} {}x{}->{} batch {} strides {} {} {}{}{}{}", name_of(s.dtype), stored, s.rows, s.inner, s.outputs, s.batch, s.x_stride,
                               s.w_stride, s.y_stride, s.w_transposed ? " transposed" : "", s.bias ? " bias" : "",
                               s.gelu ? " gelu" : "");
  cublasLtMatmulHeuristicResult_t result{};
  if (const auto known = tuning.find(key); known && from_hex(*known, algorithm_) &&
      cublasLtMatmulAlgoCheck(context_.cublas, operation_, w_, x_, y_, y_, &algorithm_, &result) == CUBLAS_STATUS_SUCCESS &&
      static_cast<std::int64_t>(result.workspaceSize) <= kMostWorkspace) {
    workspace_ = static_cast<std::int64_t>(result.workspaceSize);
    return;
  }
  cublasLtMatmulPreference_t preference = nullptr;
  check(cublasLtMatmulPreferenceCreate(&preference), "choosing a matmul");
  const auto most = static_cast<std::uint64_t>(kMostWorkspace);
  cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &most, sizeof most);
  std::array<cublasLtMatmulHeuristicResult_t, kCandidates> found{};
  int count = 0;
  const auto status = cublasLtMatmulAlgoGetHeuristic(context_.cublas, operation_, w_, x_, y_, y_, preference, kCandidates, found.data(), &count);
  cublasLtMatmulPreferenceDestroy(preference);
  if (status != CUBLAS_STATUS_NOT_SUPPORTED && status != CUBLAS_STATUS_INVALID_VALUE) check(status, "choosing a matmul");
  require(status == CUBLAS_STATUS_SUCCESS && count > 0, "[cuda] cuBLASLt has no algorithm for {} on {} ({})", key, context_.name,
          cublasLtGetStatusString(status));
  int best = 0;
  const auto bytes = [&](std::int64_t elements, std::int64_t stride) { return (elements + stride * (s.batch - 1)) * size_of(s.dtype); };
  if (count > 1) {
    Stopwatch watch(context_.stream);
    void *x = watch.allocate(bytes(s.rows * s.inner, s.x_stride)), *w = watch.allocate(bytes(s.outputs * s.inner, s.w_stride)),
         *y = watch.allocate(bytes(s.rows * s.outputs, s.y_stride)), *bias = watch.allocate(s.outputs * size_of(s.dtype)),
       *work = watch.allocate(kMostWorkspace), *scale = watch.allocate(sizeof(float));
    float shortest = Stopwatch::kNever;
    for (int i = 0; x && w && y && bias && work && scale && i < count; ++i) {
      const auto& candidate = found[static_cast<std::size_t>(i)];
      if (candidate.state != CUBLAS_STATUS_SUCCESS) continue;
      const float ms = watch.time([&] {
        return launch(candidate.algo, x, w, bias, y, work, static_cast<std::int64_t>(candidate.workspaceSize), context_.stream,
                      static_cast<const float*>(scale)) == CUBLAS_STATUS_SUCCESS;
      });
      if (ms < shortest * 0.99f) shortest = ms, best = i;  // of equals the library's own preference
    }
  }
  algorithm_ = found[static_cast<std::size_t>(best)].algo;
  workspace_ = static_cast<std::int64_t>(found[static_cast<std::size_t>(best)].workspaceSize);
  tuning.store(key, hex(algorithm_));
}

cublasStatus_t Matmul::launch(const cublasLtMatmulAlgo_t& algorithm, const void* x, const void* w, const void* bias, void* y, void* workspace,
                              std::int64_t bytes, cudaStream_t stream, const float* x_scale) {
  const float one = 1, zero = 0;
  if (sizes_.bias) {
    const auto status = cublasLtMatmulDescSetAttribute(operation_, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias, sizeof bias);
    if (status != CUBLAS_STATUS_SUCCESS) return status;
  }
  if (sizes_.fp8_weight) {
    const auto status = cublasLtMatmulDescSetAttribute(operation_, CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, &x_scale, sizeof x_scale);
    if (status != CUBLAS_STATUS_SUCCESS) return status;
  }
  return cublasLtMatmul(context_.cublas, operation_, &one, w, w_, x, x_, &zero, y, y_, y, y_, &algorithm, workspace, static_cast<std::size_t>(bytes),
                        stream);
}

void Matmul::run(const void* x, const void* w, const void* bias, void* y, void* workspace, const float* x_scale) {
  check(launch(algorithm_, x, w, bias, y, workspace, workspace_, context_.stream, x_scale), "matmul");
}

std::shared_ptr<Matmul> matmul_if_any(Context& context, const MatmulSizes& sizes) {
  try {
    return std::make_shared<Matmul>(context, sizes);
  } catch (const DeviceFailure&) {
    throw;
  } catch (const Error&) {
    return nullptr;
  }
}

}  // namespace comfytp::backend::cuda
