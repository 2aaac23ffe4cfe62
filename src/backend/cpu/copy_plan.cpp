#include "backend/cpu/copy_plan.h"

#include <algorithm>
#include <numeric>

#include "backend/cpu/parallel.h"
#include "base/error.h"

namespace comfytp::backend::cpu {
namespace {

constexpr std::int64_t kTile = 32;

template <typename T>
void write_transposed(const T* tile, T* target, std::int64_t rows, std::int64_t columns, std::int64_t row_step) {
  for (std::int64_t r = 0; r < rows; ++r)
    for (std::int64_t c = 0; c < columns; ++c) target[r * row_step + c] = tile[c * kTile + r];
}

template <typename T>
void copy_strided(const void* source, std::int64_t from, void* target, std::int64_t to, std::int64_t count) {
  const auto* in = static_cast<const T*>(source);
  auto* out = static_cast<T*>(target);
  for (std::int64_t i = 0; i < count; ++i) out[i * to] = in[i * from];
}

void copy_strided(int element, const void* source, std::int64_t from, void* target, std::int64_t to, std::int64_t count) {
  if (element == 1) copy_strided<std::uint8_t>(source, from, target, to, count);
  if (element == 2) copy_strided<std::uint16_t>(source, from, target, to, count);
  if (element == 4) copy_strided<std::uint32_t>(source, from, target, to, count);
  if (element == 8) copy_strided<std::uint64_t>(source, from, target, to, count);
}

}  // namespace

CopyPlan::CopyPlan(const Shape& shape, DType from, const Shape& from_strides, DType to, const Shape& to_strides)
    : from_(from), to_(to), empty_(comfytp::numel(shape) == 0) {
  require(from == to || (to != DType::f8_e4m3 && to != DType::f8_e5m2), "[cast] cannot convert {} to {}", name_of(from), name_of(to));
  graph::Order order = graph::row_major(shape.size());
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return to_strides[a] > to_strides[b]; });
  outer_ = nest<2>(shape, order, {from_strides, to_strides});
  inner_ = outer_.back();
  outer_.pop_back();
  if (inner_.step[0] != 1 && inner_.step[1] == 1) {
    const auto it = std::find_if(outer_.begin(), outer_.end(), [](const Loop<2>& l) { return l.step[0] == 1; });
    if (it != outer_.end()) {
      across_ = *it;
      outer_.erase(it);
    }
  }
  for (const auto& loop : outer_) outer_size_ *= loop.size;
}

void CopyPlan::run(const void* source, void* target) const {
  if (empty_) return;
  if (across_.size > 1)
    tiles(static_cast<const char*>(source), static_cast<char*>(target));
  else
    rows(static_cast<const char*>(source), static_cast<char*>(target));
}

void CopyPlan::offsets(std::int64_t index, std::int64_t& from, std::int64_t& to) const {
  from = to = 0;
  for (std::size_t i = outer_.size(); i-- > 0;) {
    const auto at = index % outer_[i].size;
    index /= outer_[i].size;
    from += at * outer_[i].step[0];
    to += at * outer_[i].step[1];
  }
}

void CopyPlan::rows(const char* source, char* target) const {
  const int s = size_of(from_), t = size_of(to_);
  const bool dense = inner_.step[0] == 1 && inner_.step[1] == 1;
  // A single long row is cut into pieces, many short rows are not.
  const std::int64_t pieces = dense ? std::max<std::int64_t>(1, inner_.size / kGrain) : 1;
  parallel(outer_size_ * pieces, row_grain(inner_.size / pieces), [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t i = begin; i < end; ++i) {
      std::int64_t from, to;
      offsets(i / pieces, from, to);
      const auto lo = inner_.size * (i % pieces) / pieces, hi = inner_.size * (i % pieces + 1) / pieces;
      if (dense) {
        convert(source + (from + lo) * s, from_, target + (to + lo) * t, to_, hi - lo);
        continue;
      }
      from += lo * inner_.step[0];
      to += lo * inner_.step[1];
      if (from_ == to_) {
        copy_strided(s, source + from * s, inner_.step[0], target + to * t, inner_.step[1], hi - lo);
        continue;
      }
      for (std::int64_t k = 0; k < hi - lo; ++k)
        convert(source + (from + k * inner_.step[0]) * s, from_, target + (to + k * inner_.step[1]) * t, to_, 1);
    }
  });
}

void CopyPlan::tiles(const char* source, char* target) const {
  const int s = size_of(from_), t = size_of(to_);
  const auto strips = (across_.size + kTile - 1) / kTile;
  parallel(outer_size_ * strips, row_grain(kTile * inner_.size), [&](std::int64_t begin, std::int64_t end, int) {
    alignas(64) char tile[kTile * kTile * 8];
    for (std::int64_t i = begin; i < end; ++i) {
      std::int64_t from, to;
      offsets(i / strips, from, to);
      const auto first = i % strips * kTile, height = std::min(kTile, across_.size - first);
      from += first;
      to += first * across_.step[1];
      for (std::int64_t column = 0; column < inner_.size; column += kTile) {
        const auto width = std::min(kTile, inner_.size - column);
        for (std::int64_t c = 0; c < width; ++c)
          convert(source + (from + (column + c) * inner_.step[0]) * s, from_, tile + c * kTile * t, to_, height);
        char* out = target + (to + column) * t;
        const auto step = across_.step[1];
        if (t == 1) write_transposed(reinterpret_cast<std::uint8_t*>(tile), reinterpret_cast<std::uint8_t*>(out), height, width, step);
        if (t == 2) write_transposed(reinterpret_cast<std::uint16_t*>(tile), reinterpret_cast<std::uint16_t*>(out), height, width, step);
        if (t == 4) write_transposed(reinterpret_cast<std::uint32_t*>(tile), reinterpret_cast<std::uint32_t*>(out), height, width, step);
        if (t == 8) write_transposed(reinterpret_cast<std::uint64_t*>(tile), reinterpret_cast<std::uint64_t*>(out), height, width, step);
      }
    }
  });
}

}  // namespace comfytp::backend::cpu
