// attention, blockwise with a running softmax (Milakov & Gimelshein 2018, Dao et al. 2022): scores of a block of queries and
// a block of keys stay in the cache. All arithmetic in f32. Threads share heads and blocks of queries; each packs the keys
// and values of the head it is at.
#include <cstring>
#include <limits>

#include "backend/cpu/kernel_table.h"
#include "backend/cpu/parallel.h"
#include "backend/cpu/real.h"
#include "backend/cpu/workspace.h"
#include "base/error.h"

namespace comfytp::backend::cpu {
namespace {

constexpr std::int64_t kQueries = 32;  ///< of a block
constexpr std::int64_t kKeys = 256;    ///< of a block
constexpr std::int64_t kRows = 8;      ///< queries that a tile holds at most
constexpr std::int64_t kPanel = 32;    ///< columns that a panel of a packed matrix holds

// c [rows, columns] (+)= a [rows, inner] b, where b is packed in panels [inner][kPanel] and columns, the same multiple of
// 16, is at most kPanel. kTileRows rows and kVectors times 16 columns are kept in registers.
template <int kTileRows, int kVectors, bool kAccumulate>
CTP_INLINE void tile(const float* a, std::int64_t a_step, const float* b, std::int64_t inner, float* c, std::int64_t c_step) {
  typedef float Vector __attribute__((vector_size(64), aligned(4)));
  Vector sum[kTileRows][kVectors];
  for (int r = 0; r < kTileRows; ++r)
    for (int v = 0; v < kVectors; ++v) {
      if constexpr (kAccumulate)
        std::memcpy(&sum[r][v], c + r * c_step + 16 * v, sizeof(Vector));
      else
        sum[r][v] = Vector{};
    }
  for (std::int64_t i = 0; i < inner; ++i) {
    Vector column[kVectors];
    for (int v = 0; v < kVectors; ++v) std::memcpy(&column[v], b + i * kPanel + 16 * v, sizeof(Vector));
    for (int r = 0; r < kTileRows; ++r)
      for (int v = 0; v < kVectors; ++v) sum[r][v] += a[r * a_step + i] * column[v];
  }
  for (int r = 0; r < kTileRows; ++r)
    for (int v = 0; v < kVectors; ++v) std::memcpy(c + r * c_step + 16 * v, &sum[r][v], sizeof(Vector));
}

// c [rows, columns] (+)= a [rows, inner] b; b in panels that lie `panel_step` apart; rows are a multiple of kTileRows.
template <int kTileRows, int kVectors, bool kAccumulate>
CTP_INLINE void product(const float* a, std::int64_t rows, std::int64_t a_step, const float* b, std::int64_t panel_step, std::int64_t inner,
                        float* c, std::int64_t c_step, std::int64_t columns) {
  for (std::int64_t j = 0; j < columns; j += 16 * kVectors) {
    const float* panel = b + j / kPanel * panel_step + j % kPanel;
    const bool narrow = kVectors > 1 && columns - j < 16 * kVectors;
    for (std::int64_t r = 0; r < rows; r += kTileRows) {
      if (narrow)
        tile<kTileRows, 1, kAccumulate>(a + r * a_step, a_step, panel, inner, c + r * c_step + j, c_step);
      else
        tile<kTileRows, kVectors, kAccumulate>(a + r * a_step, a_step, panel, inner, c + r * c_step + j, c_step);
    }
  }
}

/// The state of one block of queries; `columns` is the value's size rounded up to 16.
struct Block {
  const float* query;  ///< [kQueries, d], scaled
  float* scores;       ///< [kQueries, kKeys]
  float* sum;          ///< [kQueries, columns], not yet divided
  float* top;          ///< the largest score so far
  float* total;        ///< the sum of exponentials so far
  std::int64_t rows;   ///< queries, rounded up to what a tile holds
};

/// What is added to the scores, or says which keys count; for the block's queries and keys.
struct Mask {
  const std::uint8_t* seen = nullptr;
  const float* added = nullptr;
  const Bf16* added_bf16 = nullptr;
  std::int64_t step = 0;  ///< from query to query
  std::int64_t last = 0;  ///< the last query that is real
  void move_keys(std::int64_t count) {
    if (seen) seen += count;
    if (added) added += count;
    if (added_bf16) added_bf16 += count;
  }
};
CTP_INLINE void apply(const Mask& mask, std::int64_t query, float* scores, std::int64_t count) {
  const auto first = std::min(query, mask.last) * mask.step;
  constexpr float kUnseen = -std::numeric_limits<float>::infinity();
  if (mask.seen)
    for (std::int64_t k = 0; k < count; ++k) scores[k] = mask.seen[first + k] ? scores[k] : kUnseen;
  if (mask.added)
    for (std::int64_t k = 0; k < count; ++k) scores[k] += mask.added[first + k];
  if (mask.added_bf16)
    for (std::int64_t k = 0; k < count; ++k) scores[k] += load(mask.added_bf16[first + k]);
}

template <int kTileRows, int kVectors>
CTP_INLINE void step(const Block& s, const float* keys, std::int64_t d, const float* values, std::int64_t value_panel, std::int64_t columns,
                     std::int64_t count, const Mask& mask) {
  const std::int64_t padded = (count + 15) / 16 * 16;
  product<kTileRows, kVectors, false>(s.query, s.rows, d, keys, d * kPanel, d, s.scores, kKeys, padded);
  for (std::int64_t q = 0; q < s.rows; ++q) {
    float* row = s.scores + q * kKeys;
    apply(mask, q, row, count);
    float top = s.top[q];
#pragma omp simd reduction(max : top)
    for (std::int64_t k = 0; k < count; ++k) top = row[k] > top ? row[k] : top;
    if (top == -std::numeric_limits<float>::infinity()) {  // no key is seen so far
      for (std::int64_t k = 0; k < count; ++k) row[k] = 0;
      continue;
    }
    float total = 0;
#pragma omp simd reduction(+ : total)
    for (std::int64_t k = 0; k < count; ++k) {
      row[k] = exp_of(row[k] - top);
      total += row[k];
    }
    const float shrink = s.top[q] == -std::numeric_limits<float>::infinity() ? 0 : exp_of(s.top[q] - top);
    s.total[q] = s.total[q] * shrink + total;
    s.top[q] = top;
    float* sum = s.sum + q * columns;
#pragma omp simd
    for (std::int64_t c = 0; c < columns; ++c) sum[c] *= shrink;
  }
  product<kTileRows, kVectors, true>(s.scores, s.rows, kKeys, values, value_panel, count, s.sum, columns, columns);
}

// 16 accumulators of 512 bits where there are 32 registers of that size, 4 of 512 (8 of 256) bits elsewhere.
CTP_CLONES void wide_step(const Block& s, const float* keys, std::int64_t d, const float* values, std::int64_t value_panel,
                          std::int64_t columns, std::int64_t count, const Mask& mask) {
  step<kRows, 2>(s, keys, d, values, value_panel, columns, count, mask);
}
CTP_CLONES void narrow_step(const Block& s, const float* keys, std::int64_t d, const float* values, std::int64_t value_panel,
                            std::int64_t columns, std::int64_t count, const Mask& mask) {
  step<kRows / 2, 1>(s, keys, d, values, value_panel, columns, count, mask);
}
bool has_wide_registers() {
#if defined(__GNUC__) && defined(__x86_64__)
  return __builtin_cpu_supports("avx512f");
#else
  return false;
#endif
}

template <typename T>
class AttentionKernel final : public Kernel {
 public:
  explicit AttentionKernel(const Site& site)
      : heads_(site.shape(0)[1]),
        heads_a_group_(site.shape(1)[1] ? heads_ / site.shape(1)[1] : 1),
        queries_(site.shape(0)[2]),
        keys_(site.shape(2)[2]),
        d_(site.shape(0)[3]),
        e_(site.shape(2)[3]),
        columns_((e_ + 15) / 16 * 16),
        jobs_(site.shape(0)[0] * heads_),
        scale_(static_cast<float>(site.attrs().real("scale"))),
        step_(has_wide_registers() ? wide_step : narrow_step) {
    for (std::size_t i = 0; i < 3; ++i) strides_[i] = strides_of(site.in[i]);
    strides_[3] = strides_of(site.out[0]);
    padded_keys_ = (keys_ + kPanel - 1) / kPanel * kPanel;
    key_panels_ = work_.take(padded_keys_ * d_ * 4);
    value_panels_ = work_.take((columns_ + kPanel - 1) / kPanel * kPanel * keys_ * 4);
    query_ = work_.take(kQueries * d_ * 4);
    scores_ = work_.take(kQueries * kKeys * 4);
    sum_ = work_.take(kQueries * columns_ * 4);
    top_ = work_.take(2 * kQueries * 4);
    threads_ = site.threads;
    if (site.in.size() < 4) return;
    mask_element_ = size_of(site.in[3].type.dtype);
    mask_seen_ = site.in[3].type.dtype == DType::boolean;
    mask_strides_ = row_major_strides(site.shape(3));
    for (std::size_t i = 0; i < 3; ++i)
      if (site.shape(3)[i] == 1) mask_strides_[i] = 0;
  }
  std::int64_t workspace_bytes() const override { return threads_ * work_.bytes(); }
  void run(std::span<const void* const> in, std::span<void* const> out, void* workspace) override {
    if (e_ == 0) return;
    const auto *q = static_cast<const T*>(in[0]), *k = static_cast<const T*>(in[1]), *v = static_cast<const T*>(in[2]);
    auto* y = static_cast<T*>(out[0]);
    const auto blocks = (queries_ + kQueries - 1) / kQueries;
    parallel(jobs_ * blocks, 1, [&](std::int64_t begin, std::int64_t end, int thread) {
      void* work = at(workspace, thread * work_.bytes());
      std::int64_t packed = -1;
      for (std::int64_t i = begin; i < end; ++i) {
        const auto job = i / blocks, first = i % blocks * kQueries;
        if (job != std::exchange(packed, job)) pack(k + offset(1, job), v + offset(2, job), work);
        const Mask mask = in.size() == 4 ? mask_of(in[3], job, first) : Mask{};
        block(q + offset(0, job) + first * strides_[0][2], y + offset(3, job) + first * strides_[3][2],
              std::min(kQueries, queries_ - first), mask, work);
      }
    });
  }

 private:
  static Shape strides_of(const Operand& operand) {
    Shape strides = graph::strides_of(operand.type.shape, operand.order);
    require(strides[3] == 1 || operand.type.shape[3] <= 1, "[attention] expected d innermost but got another order");
    return strides;
  }
  // Of a job's head; keys and values have fewer heads where a group of queries' heads shares them.
  std::int64_t offset(int operand, std::int64_t job) const {
    const auto head = job % heads_ / (operand == 1 || operand == 2 ? heads_a_group_ : 1);
    return job / heads_ * strides_[operand][0] + head * strides_[operand][1];
  }
  Mask mask_of(const void* data, std::int64_t job, std::int64_t first) const {
    const auto* from = static_cast<const char*>(data) +
                       (job / heads_ * mask_strides_[0] + job % heads_ * mask_strides_[1] + first * mask_strides_[2]) * mask_element_;
    Mask mask;
    mask.step = mask_strides_[2];
    mask.last = queries_ - first - 1;
    if (mask_seen_)
      mask.seen = reinterpret_cast<const std::uint8_t*>(from);
    else if (mask_element_ == 4)
      mask.added = reinterpret_cast<const float*>(from);
    else
      mask.added_bf16 = reinterpret_cast<const Bf16*>(from);
    return mask;
  }

  void pack(const T* k, const T* v, void* work) const {
    auto* keys = at<float>(work, key_panels_);
    for (std::int64_t s = 0; s < padded_keys_; ++s) {
      float* column = keys + s / kPanel * kPanel * d_ + s % kPanel;
      for (std::int64_t c = 0; c < d_; ++c) column[c * kPanel] = s < keys_ ? load(k[s * strides_[1][2] + c]) : 0.0f;
    }
    auto* values = at<float>(work, value_panels_);
    for (std::int64_t p = 0; p < columns_; p += kPanel)
      for (std::int64_t s = 0; s < keys_; ++s) {
        float* row = values + p * keys_ + s * kPanel;
        const T* from = v + s * strides_[2][2] + p;
        for (std::int64_t c = 0; c < kPanel; ++c) row[c] = p + c < e_ ? load(from[c]) : 0.0f;
      }
  }

  void block(const T* q, T* y, std::int64_t count, Mask mask, void* work) const {
    auto* query = at<float>(work, query_);
    const Block s{query,
                  at<float>(work, scores_),
                  at<float>(work, sum_),
                  at<float>(work, top_),
                  at<float>(work, top_) + kQueries,
                  (count + kRows - 1) / kRows * kRows};
    for (std::int64_t i = 0; i < s.rows; ++i) {
      for (std::int64_t c = 0; c < d_; ++c) query[i * d_ + c] = i < count ? load(q[i * strides_[0][2] + c]) * scale_ : 0.0f;
      s.top[i] = -std::numeric_limits<float>::infinity();
      s.total[i] = 0;
    }
    std::memset(s.sum, 0, static_cast<std::size_t>(s.rows * columns_ * 4));
    for (std::int64_t key = 0; key < keys_; key += kKeys, mask.move_keys(kKeys))
      step_(s, at<float>(work, key_panels_) + key * d_, d_, at<float>(work, value_panels_) + key * kPanel, keys_ * kPanel, columns_,
            std::min(kKeys, keys_ - key), mask);
    for (std::int64_t i = 0; i < count; ++i) {
      const float scale = s.total[i] == 0 ? 0 : 1 / s.total[i];  // a query that sees no key gives 0
      for (std::int64_t c = 0; c < e_; ++c) store(y + i * strides_[3][2] + c, s.sum[i * columns_ + c] * scale);
    }
  }

  std::int64_t heads_, heads_a_group_, queries_, keys_, d_, e_, columns_, jobs_;
  float scale_;
  decltype(&wide_step) step_;
  Shape strides_[4];
  Shape mask_strides_;
  std::int64_t mask_element_ = 0;
  bool mask_seen_ = false;
  std::int64_t padded_keys_, threads_;
  Workspace work_;  ///< of one thread
  std::int64_t key_panels_, value_panels_, query_, scores_, sum_, top_;
};

std::unique_ptr<Kernel> make(const Site& site) {
  const auto dtype = site.in[0].type.dtype;
  expect_real(site, dtype);
  if (dtype == DType::bf16) return std::make_unique<AttentionKernel<Bf16>>(site);
  return std::make_unique<AttentionKernel<float>>(site);
}

const bool registered = register_kernel("attention", {make});

}  // namespace
}  // namespace comfytp::backend::cpu
