// layer_norm, rms_norm and row_moments.
#include "backend/cpu/kernel_table.h"
#include "backend/cpu/parallel.h"
#include "backend/cpu/row_moments.h"
#include "graph/ops/moments.h"

namespace comfytp::backend::cpu {
namespace {

using Moments = graph::Moments<double>;

template <typename T>
CTP_INLINE void normalise(const T* x, const T* weight, const T* bias, T* y, std::int64_t count, float mean, float low, float scale) {
#pragma omp simd
  for (std::int64_t i = 0; i < count; ++i) store(y + i, (load(x[i]) - mean - low) * scale * load(weight[i]) + load(bias[i]));
}

template <typename T>
CTP_INLINE void scale_by(const T* x, const T* weight, T* y, std::int64_t count, float scale) {
#pragma omp simd
  for (std::int64_t i = 0; i < count; ++i) store(y + i, load(x[i]) * scale * load(weight[i]));
}

CTP_CLONES void moments_of(const float* x, std::int64_t count, float* mean, float* low, float* squares) {
  moments(x, count, mean, low, squares);
}
CTP_CLONES void moments_of(const Bf16* x, std::int64_t count, float* mean, float* low, float* squares) {
  moments(x, count, mean, low, squares);
}
CTP_CLONES void normalise_row(const float* x, const float* w, const float* b, float* y, std::int64_t count, float mean, float low,
                              float scale) {
  normalise(x, w, b, y, count, mean, low, scale);
}
CTP_CLONES void normalise_row(const Bf16* x, const Bf16* w, const Bf16* b, Bf16* y, std::int64_t count, float mean, float low,
                              float scale) {
  normalise(x, w, b, y, count, mean, low, scale);
}

CTP_CLONES float mean_square_of(const float* x, std::int64_t count) { return mean_square(x, count); }
CTP_CLONES float mean_square_of(const Bf16* x, std::int64_t count) { return mean_square(x, count); }
CTP_CLONES void scale_row(const float* x, const float* w, float* y, std::int64_t count, float scale) { scale_by(x, w, y, count, scale); }
CTP_CLONES void scale_row(const Bf16* x, const Bf16* w, Bf16* y, std::int64_t count, float scale) { scale_by(x, w, y, count, scale); }

// Row r's moments, merged over the parts of [parts, rows, 3].
Moments merged(const void* moments, std::int64_t parts, std::int64_t rows, std::int64_t r) {
  Moments total;
  for (std::int64_t p = 0; p < parts; ++p) {
    const float* part = static_cast<const float*>(moments) + (p * rows + r) * 3;
    total.merge({part[0], part[1], part[2]});
  }
  return total;
}

std::int64_t rows_of(const Shape& shape) { return numel(Shape(shape.begin(), shape.end() - 1)); }

template <typename T>
class RowMomentsKernel final : public Kernel {
 public:
  explicit RowMomentsKernel(const Site& site) : rows_(rows_of(site.shape(0))), size_(site.shape(0).back()) {}
  void run(std::span<const void* const> in, std::span<void* const> out, void*) override {
    const auto* x = static_cast<const T*>(in[0]);
    auto* y = static_cast<float*>(out[0]);
    parallel(rows_, row_grain(size_), [&](std::int64_t begin, std::int64_t end, int) {
      for (std::int64_t r = begin; r < end; ++r) {
        float mean = 0, low = 0, squares = 0;
        if (size_) moments_of(x + r * size_, size_, &mean, &low, &squares);
        y[3 * r] = static_cast<float>(size_);
        y[3 * r + 1] = mean + low;
        y[3 * r + 2] = squares;
      }
    });
  }

 private:
  std::int64_t rows_, size_;
};

template <typename T>
class LayerNormKernel final : public Kernel {
 public:
  explicit LayerNormKernel(const Site& site)
      : rows_(rows_of(site.shape(0))),
        size_(site.shape(0).back()),
        epsilon_(site.attrs().real("epsilon")),
        parts_(site.in.size() == 4 ? site.shape(3)[0] : 0) {}
  void run(std::span<const void* const> in, std::span<void* const> out, void*) override {
    if (size_ == 0) return;
    const auto *x = static_cast<const T*>(in[0]), *weight = static_cast<const T*>(in[1]), *bias = static_cast<const T*>(in[2]);
    auto* y = static_cast<T*>(out[0]);
    parallel(rows_, row_grain(size_), [&](std::int64_t begin, std::int64_t end, int) {
      for (std::int64_t r = begin; r < end; ++r) {
        float mean, low, squares;
        double count = static_cast<double>(size_);
        if (in.size() == 4) {
          const auto total = merged(in[3], parts_, rows_, r);
          count = total.count;
          mean = static_cast<float>(total.mean);
          low = static_cast<float>(total.mean - mean);
          squares = static_cast<float>(total.squares);
        } else {
          moments_of(x + r * size_, size_, &mean, &low, &squares);
        }
        const auto scale = static_cast<float>(1 / std::sqrt(squares / count + epsilon_));
        normalise_row(x + r * size_, weight, bias, y + r * size_, size_, mean, low, scale);
      }
    });
  }

 private:
  std::int64_t rows_, size_;
  double epsilon_;
  std::int64_t parts_;
};

template <typename T>
class RmsNormKernel final : public Kernel {
 public:
  explicit RmsNormKernel(const Site& site)
      : rows_(rows_of(site.shape(0))),
        size_(site.shape(0).back()),
        epsilon_(site.attrs().real("epsilon")),
        parts_(site.in.size() == 3 ? site.shape(2)[0] : 0) {}
  void run(std::span<const void* const> in, std::span<void* const> out, void*) override {
    if (size_ == 0) return;
    const auto *x = static_cast<const T*>(in[0]), *weight = static_cast<const T*>(in[1]);
    auto* y = static_cast<T*>(out[0]);
    parallel(rows_, row_grain(size_), [&](std::int64_t begin, std::int64_t end, int) {
      for (std::int64_t r = begin; r < end; ++r) {
        double square;
        if (in.size() == 3) {
          const auto total = merged(in[2], parts_, rows_, r);
          square = total.squares / total.count + total.mean * total.mean;
        } else {
          square = mean_square_of(x + r * size_, size_);
        }
        scale_row(x + r * size_, weight, y + r * size_, size_, static_cast<float>(1 / std::sqrt(square + epsilon_)));
      }
    });
  }

 private:
  std::int64_t rows_, size_;
  double epsilon_;
  std::int64_t parts_;
};

template <template <typename> class K>
std::unique_ptr<Kernel> make(const Site& site) {
  const auto dtype = site.in[0].type.dtype;
  expect_real(site, dtype);
  if (dtype == DType::bf16) return std::make_unique<K<Bf16>>(site);
  return std::make_unique<K<float>>(site);
}

const bool registered = register_kernel("layer_norm", {make<LayerNormKernel>}) && register_kernel("rms_norm", {make<RmsNormKernel>}) &&
                        register_kernel("row_moments", {make<RowMomentsKernel>});

}  // namespace
}  // namespace comfytp::backend::cpu
