// group_norm and group_moments on [n, .., c] (channels innermost). The rows of a sample are cut into blocks whose size does
// not depend on the threads; every block gives its groups' moments, which are merged in order, so the bits are the same
// on any number of threads.
#include "backend/cpu/kernel_table.h"
#include "backend/cpu/parallel.h"
#include "backend/cpu/real.h"
#include "backend/cpu/workspace.h"
#include "graph/ops/moments.h"

namespace comfytp::backend::cpu {
namespace {

using Moments = graph::Moments<double>;

// Sums of x - shift and of its square for each channel; shift is the group's first element here, so nothing cancels.
template <typename T>
CTP_INLINE void channel_sums(const T* x, std::int64_t rows, std::int64_t channels, const float* shift, float* sums, float* squares) {
  for (std::int64_t c = 0; c < channels; ++c) sums[c] = squares[c] = 0;
  for (std::int64_t r = 0; r < rows; ++r) {
    const T* row = x + r * channels;
#pragma omp simd
    for (std::int64_t c = 0; c < channels; ++c) {
      const float d = load(row[c]) - shift[c];
      sums[c] += d;
      squares[c] += d * d;
    }
  }
}
template <bool kSilu, typename T>
CTP_INLINE void normalise(const T* x, T* y, std::int64_t rows, std::int64_t channels, const float* mean, const float* scale,
                          const float* bias) {
  for (std::int64_t r = 0; r < rows; ++r)
#pragma omp simd
    for (std::int64_t c = 0; c < channels; ++c) {
      const float v = (load(x[r * channels + c]) - mean[c]) * scale[c] + bias[c];
      store(y + r * channels + c, kSilu ? silu_of(v) : v);
    }
}

CTP_CLONES void sums_of(const float* x, std::int64_t rows, std::int64_t channels, const float* shift, float* sums, float* squares) {
  channel_sums(x, rows, channels, shift, sums, squares);
}
CTP_CLONES void sums_of(const Bf16* x, std::int64_t rows, std::int64_t channels, const float* shift, float* sums, float* squares) {
  channel_sums(x, rows, channels, shift, sums, squares);
}
CTP_CLONES void normalise_rows(bool silu, const float* x, float* y, std::int64_t rows, std::int64_t channels, const float* mean,
                               const float* scale, const float* bias) {
  if (silu)
    normalise<true>(x, y, rows, channels, mean, scale, bias);
  else
    normalise<false>(x, y, rows, channels, mean, scale, bias);
}
CTP_CLONES void normalise_rows(bool silu, const Bf16* x, Bf16* y, std::int64_t rows, std::int64_t channels, const float* mean,
                               const float* scale, const float* bias) {
  if (silu)
    normalise<true>(x, y, rows, channels, mean, scale, bias);
  else
    normalise<false>(x, y, rows, channels, mean, scale, bias);
}

struct Sizes {
  std::int64_t samples, channels, groups, rows, block, blocks;
  Sizes(const Shape& x, std::int64_t groups) : samples(x[0]), channels(x[1]), groups(groups), rows(numel(Shape(x.begin() + 2, x.end()))) {
    block = std::max<std::int64_t>(1, std::min(rows, 2 * kGrain / std::max<std::int64_t>(1, channels)));
    blocks = (rows + block - 1) / block;
  }
  std::int64_t height(std::int64_t b) const { return std::min(block, rows - b * block); }
};

/// The first half: moments [n, groups] of x.
template <typename T>
class Statistics {
 public:
  Statistics(const Sizes& sizes, int threads, Workspace& workspace) : s_(sizes) {
    blocks_ = workspace.take(s_.samples * s_.blocks * s_.groups * static_cast<std::int64_t>(sizeof(Moments)));
    scratch_ = workspace.take(threads * scratch_floats() * 4);
  }
  void run(const T* x, void* workspace, Moments* result) const {
    auto* parts = at<Moments>(workspace, blocks_);
    parallel(s_.samples * s_.blocks, row_grain(s_.block * s_.channels), [&](std::int64_t begin, std::int64_t end, int thread) {
      float* scratch = at<float>(workspace, scratch_) + thread * scratch_floats();
      for (std::int64_t i = begin; i < end; ++i) {
        const auto n = i / s_.blocks, b = i % s_.blocks;
        block(x + (n * s_.rows + b * s_.block) * s_.channels, s_.height(b), scratch, parts + i * s_.groups);
      }
    });
    for (std::int64_t n = 0; n < s_.samples; ++n)
      for (std::int64_t g = 0; g < s_.groups; ++g) {
        Moments total;
        for (std::int64_t b = 0; b < s_.blocks; ++b) total.merge(parts[(n * s_.blocks + b) * s_.groups + g]);
        result[n * s_.groups + g] = total;
      }
  }

 private:
  std::int64_t scratch_floats() const { return (3 * s_.channels + 15) / 16 * 16; }
  void block(const T* x, std::int64_t rows, float* scratch, Moments* groups) const {
    const auto width = s_.groups ? s_.channels / s_.groups : 0;
    float *shift = scratch, *sums = shift + s_.channels, *squares = sums + s_.channels;
    for (std::int64_t c = 0; c < s_.channels; ++c) shift[c] = load(x[c / width * width]);
    sums_of(x, rows, s_.channels, shift, sums, squares);
    for (std::int64_t g = 0; g < s_.groups; ++g) {
      double sum = 0, square = 0;
      for (std::int64_t c = g * width; c < (g + 1) * width; ++c) sum += sums[c], square += squares[c];
      const auto count = static_cast<double>(rows * width);
      groups[g] = {count, static_cast<double>(shift[g * width]) + sum / count, std::max(0.0, square - sum * sum / count)};
    }
  }

  Sizes s_;
  std::int64_t blocks_, scratch_;
};

template <typename T>
class GroupMomentsKernel final : public Kernel {
 public:
  explicit GroupMomentsKernel(const Site& site)
      : sizes_(site.shape(0), site.attrs().integer("groups")), statistics_(sizes_, site.threads, workspace_) {
    moments_ = workspace_.take(sizes_.samples * sizes_.groups * static_cast<std::int64_t>(sizeof(Moments)));
  }
  std::int64_t workspace_bytes() const override { return workspace_.bytes(); }
  void run(std::span<const void* const> in, std::span<void* const> out, void* workspace) override {
    auto* moments = at<Moments>(workspace, moments_);
    statistics_.run(static_cast<const T*>(in[0]), workspace, moments);
    auto* y = static_cast<float*>(out[0]);
    for (std::int64_t i = 0; i < sizes_.samples * sizes_.groups; ++i)
      for (double v : {moments[i].count, moments[i].mean, moments[i].squares}) *y++ = static_cast<float>(v);
  }

 private:
  Sizes sizes_;
  Workspace workspace_;
  Statistics<T> statistics_;
  std::int64_t moments_;
};

template <typename T>
class GroupNormKernel final : public Kernel {
 public:
  explicit GroupNormKernel(const Site& site)
      : sizes_(site.shape(0), site.attrs().integer("groups")),
        statistics_(sizes_, site.threads, workspace_),
        epsilon_(site.attrs().real("epsilon")),
        silu_(site.attrs().text_or("activation", "") == "silu"),
        parts_(site.in.size() == 4 ? site.shape(3)[0] : 0) {
    moments_ = workspace_.take(sizes_.samples * sizes_.groups * static_cast<std::int64_t>(sizeof(Moments)));
    table_ = workspace_.take(sizes_.samples * 3 * sizes_.channels * 4);
  }
  std::int64_t workspace_bytes() const override { return workspace_.bytes(); }
  void run(std::span<const void* const> in, std::span<void* const> out, void* workspace) override {
    const auto& s = sizes_;
    if (s.samples * s.rows * s.channels == 0) return;
    const auto* x = static_cast<const T*>(in[0]);
    auto* y = static_cast<T*>(out[0]);
    auto* moments = at<Moments>(workspace, moments_);
    if (in.size() == 4)
      merge(static_cast<const float*>(in[3]), moments);
    else
      statistics_.run(x, workspace, moments);

    auto* table = at<float>(workspace, table_);  // of each sample: mean, scale, bias by channel
    const auto *weight = static_cast<const T*>(in[1]), *bias = static_cast<const T*>(in[2]);
    for (std::int64_t n = 0; n < s.samples; ++n) {
      float* row = table + n * 3 * s.channels;
      for (std::int64_t c = 0; c < s.channels; ++c) {
        const auto& m = moments[n * s.groups + c / (s.channels / s.groups)];
        const double scale = load(weight[c]) / std::sqrt(m.squares / m.count + epsilon_);
        row[c] = static_cast<float>(m.mean);
        row[s.channels + c] = static_cast<float>(scale);
        row[2 * s.channels + c] = static_cast<float>(load(bias[c]) - (m.mean - row[c]) * scale);  // with what rounding took from the mean
      }
    }
    parallel(s.samples * s.blocks, row_grain(s.block * s.channels), [&](std::int64_t begin, std::int64_t end, int) {
      for (std::int64_t i = begin; i < end; ++i) {
        const auto n = i / s.blocks, b = i % s.blocks, first = (n * s.rows + b * s.block) * s.channels;
        const float* row = table + n * 3 * s.channels;
        normalise_rows(silu_, x + first, y + first, s.height(b), s.channels, row, row + s.channels, row + 2 * s.channels);
      }
    });
  }

 private:
  void merge(const float* given, Moments* moments) const {
    const auto count = sizes_.samples * sizes_.groups;
    for (std::int64_t i = 0; i < count; ++i) {
      moments[i] = {};
      for (std::int64_t p = 0; p < parts_; ++p) {
        const float* part = given + (p * count + i) * 3;
        moments[i].merge({part[0], part[1], part[2]});
      }
    }
  }

  Sizes sizes_;
  Workspace workspace_;
  Statistics<T> statistics_;
  double epsilon_;
  bool silu_;
  std::int64_t parts_;
  std::int64_t moments_, table_;
};

template <template <typename> class K>
std::unique_ptr<Kernel> make(const Site& site) {
  const auto dtype = site.in[0].type.dtype;
  expect_real(site, dtype);
  if (dtype == DType::bf16) return std::make_unique<K<Bf16>>(site);
  return std::make_unique<K<float>>(site);
}

const bool registered =
    register_kernel("group_norm", {make<GroupNormKernel>}) && register_kernel("group_moments", {make<GroupMomentsKernel>});

}  // namespace
}  // namespace comfytp::backend::cpu
