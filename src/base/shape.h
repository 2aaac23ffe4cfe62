// Sizes, strides and intervals.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace comfytp {

using Shape = std::vector<std::int64_t>;

/// The elements of a shape; 1 for a scalar.
std::int64_t numel(const Shape& shape);

/// "[2,4,64,64]".
std::string to_string(const Shape& shape);

/// Strides in elements of a dense tensor whose last dimension is innermost.
Shape row_major_strides(const Shape& shape);

/// The half-open range [lo, hi) of one dimension.
struct Interval {
  std::int64_t lo = 0;
  std::int64_t hi = 0;
  std::int64_t size() const { return hi - lo; }
  bool operator==(const Interval&) const = default;
};

/// One interval a dimension: a rectangular part of a tensor.
using Box = std::vector<Interval>;

/// The whole of a shape.
Box whole_box(const Shape& shape);
/// The sizes of a box.
Shape shape_of(const Box& box);
/// The common part; empty intervals have lo == hi.
Interval intersect(Interval a, Interval b);

/// Cuts [0, size) into `shares.size()` neighbouring parts in proportion to the shares; returns shares.size() + 1
/// boundaries. Largest-remainder rounding, earlier parts first, so equal shares of 7 over 3 give 3, 2, 2.
std::vector<std::int64_t> proportional_bounds(std::int64_t size, const std::vector<double>& shares);

}  // namespace comfytp
