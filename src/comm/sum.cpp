#include "comm/sum.h"

#include <algorithm>
#include <vector>

#include "base/simd.h"

namespace comfytp::comm {
namespace {

constexpr std::int64_t kBlock = 1024;  // of fp32: stays in the first cache

CTP_CLONES void add_block(float* sum, const float* x, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) sum[i] += x[i];
}

// A loop over one dimension, with the strides in bytes of the operands and then of the output.
struct Loop {
  std::int64_t size;
  std::vector<std::int64_t> strides;
};

// The dimensions that move, the output's innermost last; neighbours that are one run in all tensors are merged.
std::vector<Loop> loops_of(std::span<const TensorView> in, const TensorView& out) {
  std::vector<Loop> loops, merged;
  for (std::size_t d = 0; d < out.shape.size(); ++d) {
    if (out.shape[d] == 1) continue;
    Loop loop{out.shape[d], {}};
    for (const auto& v : in) loop.strides.push_back(v.strides[d] * size_of(v.dtype));
    loop.strides.push_back(out.strides[d] * size_of(out.dtype));
    loops.push_back(std::move(loop));
  }
  std::stable_sort(loops.begin(), loops.end(), [](const Loop& a, const Loop& b) { return a.strides.back() > b.strides.back(); });
  for (auto& loop : loops) {
    bool one_run = !merged.empty();
    for (std::size_t k = 0; one_run && k < loop.strides.size(); ++k) one_run = merged.back().strides[k] == loop.strides[k] * loop.size;
    if (one_run)
      merged.back() = {merged.back().size * loop.size, loop.strides};
    else
      merged.push_back(std::move(loop));
  }
  if (merged.empty()) merged.push_back({1, std::vector<std::int64_t>(in.size() + 1, size_of(out.dtype))});
  return merged;
}

// `n` elements that lie `stride` bytes apart, as floats; `buffer` is used where they have to be moved.
const float* load(const char* data, std::int64_t stride, DType dtype, std::int64_t n, float* buffer) {
  if (stride == size_of(dtype)) {
    if (dtype == DType::f32) return reinterpret_cast<const float*>(data);
    convert(data, dtype, buffer, DType::f32, n);
  } else {
    for (std::int64_t i = 0; i < n; ++i) convert(data + i * stride, dtype, buffer + i, DType::f32, 1);
  }
  return buffer;
}

void store(const float* values, char* data, std::int64_t stride, DType dtype, std::int64_t n) {
  if (stride == size_of(dtype)) return convert(values, DType::f32, data, dtype, n);
  for (std::int64_t i = 0; i < n; ++i) convert(values + i, DType::f32, data + i * stride, dtype, 1);
}

void sum_run(const std::vector<char*>& at, const Loop& loop, DType dtype) {
  float total[kBlock], buffer[kBlock];
  const std::size_t count = at.size() - 1;
  for (std::int64_t i = 0; i < loop.size; i += kBlock) {
    const auto n = std::min(kBlock, loop.size - i);
    const float* first = load(at[0] + i * loop.strides[0], loop.strides[0], dtype, n, total);
    if (first != total) std::copy_n(first, n, total);
    for (std::size_t k = 1; k < count; ++k) add_block(total, load(at[k] + i * loop.strides[k], loop.strides[k], dtype, n, buffer), n);
    store(total, at[count] + i * loop.strides[count], loop.strides[count], dtype, n);
  }
}

}  // namespace

void sum(std::span<const TensorView> in, const TensorView& out) {
  if (out.numel() == 0) return;
  const auto loops = loops_of(in, out);
  std::vector<char*> at;
  for (const auto& v : in) at.push_back(static_cast<char*>(v.data));
  at.push_back(static_cast<char*>(out.data));
  std::vector<std::int64_t> index(loops.size() - 1, 0);
  for (;;) {
    sum_run(at, loops.back(), out.dtype);
    std::size_t d = index.size();
    for (; d > 0; --d) {
      const Loop& loop = loops[d - 1];
      const bool more = ++index[d - 1] < loop.size;
      for (std::size_t k = 0; k < at.size(); ++k) at[k] += more ? loop.strides[k] : -(loop.size - 1) * loop.strides[k];
      if (more) break;
      index[d - 1] = 0;
    }
    if (d == 0) return;
  }
}

}  // namespace comfytp::comm
