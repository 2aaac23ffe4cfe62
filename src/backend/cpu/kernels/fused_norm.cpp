// fused_norm: a row goes through the steps before the norm, the norm and those behind it while it is in the cache.
#include "backend/cpu/kernel_table.h"
#include "backend/cpu/parallel.h"
#include "backend/cpu/row_moments.h"
#include "backend/cpu/steps.h"

namespace comfytp::backend::cpu {
namespace {

CTP_CLONES void layer_norm_row(float* row, std::int64_t count, double epsilon) {
  float mean, low, squares;
  moments(row, count, &mean, &low, &squares);
  const auto scale = static_cast<float>(1 / std::sqrt(static_cast<double>(squares) / static_cast<double>(count) + epsilon));
#pragma omp simd
  for (std::int64_t i = 0; i < count; ++i) row[i] = (row[i] - mean - low) * scale;
}

CTP_CLONES void rms_norm_row(float* row, std::int64_t count, double epsilon) {
  const auto scale = static_cast<float>(1 / std::sqrt(static_cast<double>(mean_square(row, count)) + epsilon));
#pragma omp simd
  for (std::int64_t i = 0; i < count; ++i) row[i] *= scale;
}

class FusedNormKernel final : public Kernel {
 public:
  explicit FusedNormKernel(const Site& site)
      : x_(site.in[0].type.dtype),
        y_(site.out[0].type.dtype),
        z_(site.out.back().type.dtype),
        parameters_(static_cast<int>(graph::steps_of(site.attrs().text("affine")).size())),
        behind_pre_(1 + graph::operand_count(site.attrs().text("pre"))),
        behind_norm_(behind_pre_ + static_cast<std::size_t>(parameters_)),
        weight_(parameters_ > 0 ? step_function("mul", site.in[behind_pre_].type.dtype) : nullptr),
        bias_(parameters_ > 1 ? step_function("add", site.in[behind_pre_ + 1].type.dtype) : nullptr),
        norm_(site.attrs().text("norm") == "rms_norm" ? rms_norm_row : layer_norm_row),
        epsilon_(site.attrs().real("epsilon")),
        threads_(site.threads),
        pre_(chain(site, "pre", 1)),
        post_(chain(site, "post", behind_norm_)) {}
  std::int64_t workspace_bytes() const override { return threads_ * stride() * static_cast<std::int64_t>(sizeof(float)); }

  void run(std::span<const void* const> in, std::span<void* const> out, void* workspace) override {
    const auto size = pre_.row_size();
    const auto row_of = [&](void* data, DType dtype, std::int64_t r) { return static_cast<char*>(data) + r * size * size_of(dtype); };
    parallel(pre_.rows(), row_grain(size), [&](std::int64_t begin, std::int64_t end, int thread) {
      float* row = static_cast<float*>(workspace) + thread * stride();
      for (std::int64_t r = begin; r < end; ++r) {
        load_row(static_cast<const char*>(in[0]) + r * size * size_of(x_), x_, row, size);
        pre_.apply(r, 0, size, in.data() + 1, row);
        if (out.size() == 2) {
          char* y = row_of(out[0], y_, r);
          store_row(row, y_, y, size);
          load_row(y, y_, row, size);  // rounded as its other readers see it
        }
        norm_(row, size, epsilon_);
        if (parameters_ > 0) weight_(row, in[behind_pre_], 1, size);
        if (parameters_ > 1) bias_(row, in[behind_pre_ + 1], 1, size);
        post_.apply(r, 0, size, in.data() + behind_norm_, row);
        store_row(row, z_, row_of(out.back(), z_, r), size);
      }
    });
  }

 private:
  static StepChain chain(const Site& site, const char* steps, std::size_t first) {
    return {site.attrs().text(steps), site.in[0], site.in.subspan(first), site.shape(0).size() - 1, StepChain::Rows::innermost};
  }
  std::int64_t stride() const { return (pre_.row_size() + 15) / 16 * 16; }

  DType x_, y_, z_;
  int parameters_;
  std::size_t behind_pre_, behind_norm_;
  StepFunction weight_, bias_;
  void (*norm_)(float* row, std::int64_t count, double epsilon);
  double epsilon_;
  int threads_;
  StepChain pre_, post_;
};

const bool registered = register_kernel("fused_norm", {[](const Site& site) -> std::unique_ptr<Kernel> {
                                          expect_real(site, site.in[0].type.dtype);
                                          return std::make_unique<FusedNormKernel>(site);
                                        }});

}  // namespace
}  // namespace comfytp::backend::cpu
